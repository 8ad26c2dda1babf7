"""The critic's loss, per token, and how much its values explain.

Legend: T response tokens of all samples, one sample after the other.
"""

from __future__ import annotations

import torch


def clipped_value_loss(
    values_T: torch.Tensor, old_values_T: torch.Tensor, returns_T: torch.Tensor, *, clip: float = 0.2
) -> torch.Tensor:
    """[T] 0.5 * max((value - return)^2, (clipped value - return)^2), of PPO's reference implementation.

    The clipped value is at most `clip` away from the old one; a value that left this range on its way to the return
    has gradient 0 (Schulman et al. 2017, arXiv:1707.06347; written out by Engstrom et al. 2020, arXiv:2005.12729,
    section 3). The bound is in units of the return.

    Args:
        values_T: [T] values of the critic in training; only they receive a gradient.
        old_values_T: [T] values of the critic that the update started from.
        returns_T: [T] targets.
        clip: at least 0; infinity turns clipping off.

    Raises:
        ValueError: for a clip that is negative or NaN, or inputs of different sizes.
    """
    if not clip >= 0:
        raise ValueError(f"clip must be at least 0, not {clip}")
    for other_T in (old_values_T, returns_T):
        if other_T.shape != values_T.shape:
            raise ValueError(f"one number per token is needed: {list(other_T.shape)} for {list(values_T.shape)}")
    old_values_T, returns_T = old_values_T.detach(), returns_T.detach()
    clipped_T = values_T.clamp(old_values_T - clip, old_values_T + clip)
    return 0.5 * torch.maximum((values_T - returns_T).square(), (clipped_T - returns_T).square())


@torch.no_grad()
def explained_variance(values_T: torch.Tensor, returns_T: torch.Tensor) -> float:
    """1 - Var(returns - values) / Var(returns): 1 for perfect values, 0 for a constant, below 0 for worse than that.

    Computed in float64; a metric of PPO's reference implementation (arXiv:2403.17031). An error that is the same for
    every token is not seen.

    Args:
        values_T: [T] values that the critic gave.
        returns_T: [T] what it should have given.

    Returns:
        0.0 where the returns do not vary (or there are none): nothing is there to be explained.

    Raises:
        ValueError: for inputs of different sizes.
    """
    if returns_T.shape != values_T.shape:
        raise ValueError(f"one number per token is needed: {list(returns_T.shape)} for {list(values_T.shape)}")
    values_T, returns_T = values_T.double(), returns_T.double()
    if len(returns_T) == 0 or returns_T.max() == returns_T.min():
        return 0.0
    variance = float(returns_T.var(correction=0))
    return 1 - float((returns_T - values_T).var(correction=0)) / variance if variance > 0 else 0.0
