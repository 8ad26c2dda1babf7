"""Distance to the reference policy: per-token estimators, and controllers of its weight."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch


def kl_estimate(logp_T: torch.Tensor, ref_logp_T: torch.Tensor, kind: Literal["k1", "k2", "k3"]) -> torch.Tensor:
    """[T] estimates of KL(policy || reference) from the policy's own samples.

    Schulman 2020, "Approximating KL Divergence" (joschu.net/blog/kl-approx.html). With r = ref_logp - logp:
    k1 = -r (unbiased, may be negative), k2 = r^2 / 2 (biased, low variance), k3 = exp(r) - 1 - r (unbiased, >= 0).

    Values are not clamped. Where exp(r) is beyond the dtype (r > 88.7 in float32), k3 and its gradient are the
    dtype's largest finite number, so that one such token gives neither inf nor NaN.

    Args:
        logp_T: [T] log-probs of the sampled tokens under the policy.
        ref_logp_T: [T] the same under the reference.
        kind: "k1", "k2" or "k3".

    Raises:
        ValueError: for an unknown kind, or inputs of different sizes.
    """
    if logp_T.shape != ref_logp_T.shape:
        raise ValueError(f"one number per token is needed: {list(ref_logp_T.shape)} for {list(logp_T.shape)}")
    if kind == "k1":
        return logp_T - ref_logp_T
    if kind == "k2":
        return (logp_T - ref_logp_T).square() / 2
    if kind == "k3":
        return _K3.apply(ref_logp_T - logp_T)
    raise ValueError(f"kind must be one of k1, k2, k3, not {kind!r}")


class _K3(torch.autograd.Function):
    """exp(r) - 1 - r, whose derivative exp(r) - 1 saturates instead of overflowing.

    Clamping r instead would turn the derivative's sign around: only the -r would be left.
    """

    @staticmethod
    def forward(ctx: Any, r_T: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(r_T)
        return (torch.expm1(r_T) - r_T).clamp(max=torch.finfo(r_T.dtype).max)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_T: torch.Tensor) -> torch.Tensor:
        (r_T,) = ctx.saved_tensors
        largest = torch.finfo(r_T.dtype).max
        return (grad_T * torch.expm1(r_T).clamp(max=largest)).clamp(-largest, largest)


class FixedKL:
    """A KL coefficient that stays as it is (Ziegler et al. 2019, arXiv:1909.08593, the fixed variant)."""

    def __init__(self, init: float) -> None:
        self.value = init

    def update(self, kl: float, num_steps: int) -> None:
        """Nothing changes."""


class AdaptiveKL:
    """A KL coefficient that steers the KL to a target (Ziegler et al. 2019, arXiv:1909.08593, section 2.2).

    Args:
        init: first value.
        target: wanted KL, in the unit of the `kl` given to `update`.
        horizon: the value changes by about 20 % at most in this many steps, in the unit of `num_steps`.

    Raises:
        ValueError: if target or horizon is not positive.
    """

    def __init__(self, init: float, target: float, horizon: float) -> None:
        if not (target > 0 and horizon > 0):
            raise ValueError(f"target and horizon must be positive, not {target} and {horizon}")
        self.value, self.target, self.horizon = init, target, horizon

    def update(self, kl: float, num_steps: int) -> None:
        """value *= 1 + clip(kl / target - 1, -0.2, 0.2) * num_steps / horizon.

        Raises:
            ValueError: if kl is NaN, or if so many steps at once could turn the coefficient negative, which would
                reward the distance; the value stays.
        """
        if 0.2 * num_steps >= self.horizon:
            raise ValueError(f"num_steps must be below 5 * horizon, but is {num_steps} for a horizon of {self.horizon}")
        if math.isnan(kl):
            raise ValueError("kl is NaN: skip the update of the coefficient together with that of the policy")
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * num_steps / self.horizon
