"""Accelerators by the numbers that time and memory follow from: the makers' data sheets, or this machine, measured.

All rates are peaks for dense matrices, in one direction; what of them a program reaches is said in step_time.py.

    H100, H200   NVIDIA H100 and H200 Tensor Core GPU data sheets, SXM; 400 Gb/s network adapter per GPU as in DGX H100
    A100-80G     NVIDIA A100 Tensor Core GPU data sheet, SXM; 200 Gb/s per GPU as in DGX A100
    B200         NVIDIA Blackwell data sheet, HGX B200 divided by 8; 400 Gb/s per GPU as in DGX B200
    L40S         NVIDIA L40S data sheet; no NVLink, so devices talk over PCIe; 200 Gb/s per GPU assumed

Of float32, the rate without tensor cores: torch does not use TF32 unless told to. Memory is what is sold, in powers of
two for the A100 and H100 (80 GiB), in powers of ten for the others.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from engine.config import UserError

GIB = 2**30
GB = 10**9


@dataclass(frozen=True)
class Accelerator:
    """One device. Bytes, FLOP/s and bytes/s."""

    name: str
    memory: int
    """Of the device; on the CPU, of the whole machine, which all processes share."""
    bfloat16_flops: float
    float32_flops: float
    bandwidth: float
    """Between the chip and its memory."""
    link: float
    """Between devices of one node."""
    host: float
    """Between the device and its host's memory."""
    network: float
    """Between nodes, for each device."""

    def flops(self, dtype: str) -> float:
        """Of matrices of this type (`bfloat16`, `float32`)."""
        return self.bfloat16_flops if dtype == "bfloat16" else self.float32_flops

    def with_threads(self, threads: int) -> Accelerator:
        """A process of so many threads, where a thread was measured: more arithmetic, the same memory."""
        if self.name != "cpu":
            return self
        factor = min(threads, os.cpu_count() or 1)
        flops = self.float32_flops * factor
        return replace(self, bfloat16_flops=flops, float32_flops=flops)


_TABLE = {
    accelerator.name: accelerator
    for accelerator in (
        Accelerator("A100-80G", 80 * GIB, 312e12, 19.5e12, 2.039e12, 300e9, 32e9, 25e9),
        Accelerator("H100", 80 * GIB, 989e12, 67e12, 3.35e12, 450e9, 64e9, 50e9),
        Accelerator("H200", 141 * GB, 989e12, 67e12, 4.8e12, 450e9, 64e9, 50e9),
        Accelerator("B200", 180 * GB, 2250e12, 75e12, 7.7e12, 900e9, 64e9, 50e9),
        Accelerator("L40S", 48 * GB, 362e12, 91.6e12, 0.864e12, 32e9, 32e9, 25e9),
    )
}
NAMES = (*_TABLE, "cpu")
"""What can be asked for."""

MEASURED_SIZE = 1024
"""Rows of the square matrices of the CPU's measurement: 2 GFLOP a product, 4 MiB a matrix."""
MEASURED_BYTES = 64 * 2**20
"""Memory that is copied: more than caches hold."""
MEASURED_SECONDS = 0.15
"""Of each measurement."""


def accelerator(name: str) -> Accelerator:
    """An accelerator of the table, or `cpu`: one thread on this machine, measured now.

    Raises:
        UserError: the table has no such name.
    """
    if name.lower() == "cpu":
        return _measured_cpu()
    found = next((known for known in _TABLE if known.lower() == name.lower()), None)
    if found is None:
        raise UserError(f"--accelerator: {name!r} is not known; known: {', '.join(NAMES)}")
    return _TABLE[found]


def _measured_cpu() -> Accelerator:
    import psutil
    import torch

    from engine.algorithms.products import matmul

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        square = torch.ones(MEASURED_SIZE, MEASURED_SIZE)
        flops = 2 * MEASURED_SIZE**3 * _per_second(lambda: matmul(square, square))
        block = torch.ones(MEASURED_BYTES // 4)
        target = torch.empty_like(block)
        bandwidth = 2 * MEASURED_BYTES * _per_second(lambda: target.copy_(block))  # read and written
    finally:
        torch.set_num_threads(before)
    copies = bandwidth / 2
    memory = psutil.virtual_memory().total
    return Accelerator("cpu", memory, flops, flops, bandwidth, copies, copies, copies)


def _per_second(action: Callable[[], object]) -> float:
    """How often something can be done; the best of its repetitions, since others work on this machine too."""
    action()
    best, end = float("inf"), time.perf_counter() + MEASURED_SECONDS
    while (start := time.perf_counter()) < end:
        action()
        best = min(best, time.perf_counter() - start)
    return 1.0 / best
