"""Matrix products, by the faster of the libraries that torch brings.

On the CPU torch multiplies float32 matrices with MKL, which takes AVX-512 on Intel's processors and keeps to AVX2 on
those of other makers. oneDNN, to which torch gives 16-bit numbers alone, takes AVX-512 on any, and so needs half the
time.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

CPU_DESCRIPTION = Path("/proc/cpuinfo")
WORTH_IT = 2**21
"""Multiplications from which oneDNN's dearer call pays."""


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this CPU has AVX-512 and MKL does not use it."""
    backends = torch.backends
    if backends.cpu.get_cpu_capability() != "AVX512" or not (
        backends.mkldnn.is_available() and backends.mkl.is_available()
    ):
        return False
    return CPU_DESCRIPTION.exists() and "GenuineIntel" not in CPU_DESCRIPTION.read_text()


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[M, K] @ [K, N], without a gradient."""
    return _onednn(a, b.T) if _goes_to_onednn(a, b, len(a) * b.numel()) else a @ b


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """[..., K] and [N, K] -> [..., N], as torch.nn.functional.linear, with its gradients."""
    if not _goes_to_onednn(x, weight, x.numel() * len(weight)):
        return torch.nn.functional.linear(x, weight, bias)
    if torch.is_grad_enabled():
        return _Linear.apply(x, weight, bias)
    return _onednn_linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    """The weight is read through `ctx.saved_tensors`, hence as it is (gathered) at the time of the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        wants_x, wants_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if wants_weight else None, weight if wants_x else None)
        return _onednn_linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            _onednn(rows, weight.T).view(*grad.shape[:-1], -1) if wants_x else None,
            _onednn(rows.T, x.reshape(-1, x.shape[-1]).T) if wants_weight else None,
            rows.sum(0) if wants_bias else None,
        )


def product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a @ b summed and returned in `dtype`; the factors have it too, or are 16-bit numbers on a GPU."""
    return matmul(a, b) if a.dtype == dtype else torch.mm(a, b, out_dtype=dtype)


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b, where a [M, K] is the larger factor."""
    if a.dtype != total.dtype:
        total += product(a, b, total.dtype)
    elif _goes_to_onednn(a, b, len(a) * b.numel()):
        total += _onednn(b.T, a).T  # oneDNN copies the first factor if it is transposed
    else:
        total.addmm_(a, b)


def factor_dtype(*factors: torch.Tensor) -> torch.dtype:
    """What factors are multiplied in: themselves where all are 16-bit numbers of one kind on a GPU, whose products are
    exact in float32; else `compute_dtype`."""
    [first, *others] = factors
    small = first.dtype in (torch.bfloat16, torch.float16) and first.device.type == "cuda"
    alike = all((x.dtype, x.device.type) == (first.dtype, first.device.type) for x in others)
    return first.dtype if small and alike else compute_dtype(*factors)


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """float64 if a tensor is, else float32."""
    return torch.float64 if torch.float64 in [tensor.dtype for tensor in tensors] else torch.float32


def _goes_to_onednn(a: torch.Tensor, b: torch.Tensor, work: int) -> bool:
    on_cpu = a.device.type == b.device.type == "cpu"
    return on_cpu and work >= WORTH_IT and a.dtype == b.dtype == torch.float32 and onednn_is_faster()


def _onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return _onednn(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], len(weight))


def _onednn(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """[M, K] and [N, K] -> [M, N]."""
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
