"""Advantages: how much better than expected a token or a sample was. Nothing returned here carries a gradient.

Legend: T response tokens of all samples, one sample after the other; B samples, `seq_lens [B]` tokens each; G groups.
Statistics belong to the global batch: call these once on all samples, never per micro-batch. Scores are finite;
whoever makes them sees to that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from engine.algorithms.aggregate import Lengths, checked_lens

GroupIds = torch.Tensor | np.ndarray | Sequence[int]


@torch.no_grad()
def gae(
    rewards_T: torch.Tensor,
    values_T: torch.Tensor,
    seq_lens: Lengths,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
    bootstrap: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438).

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1}, within a sample; returns = A + V.
    Only the policy's own tokens are steps: nothing decays across tool or observation tokens, which are not passed.

    Args:
        rewards_T: [T] reward received after each token.
        values_T: [T] value of the state before each token.
        seq_lens: [B] tokens of each sample.
        gamma: discount per token.
        lam: weight of longer-horizon estimates.
        bootstrap: [B] value of the state after each sample's last token, 0 where the sample ended there; None is
            all 0. Not used for a sample without a token.

    Returns:
        (advantages_T, returns_T), not whitened.

    Raises:
        ValueError: if the sizes do not fit together.
    """
    lens_B = checked_lens(seq_lens, values_T)
    if rewards_T.shape != values_T.shape or (bootstrap is not None and bootstrap.shape != lens_B.shape):
        raise ValueError("gae needs one reward per value, and one bootstrap value per sample")
    next_values_T = torch.zeros_like(values_T)
    next_values_T[:-1] = values_T[1:]
    last_B = lens_B.cumsum(0) - 1
    tail_B = torch.zeros_like(last_B, dtype=values_T.dtype) if bootstrap is None else bootstrap.to(values_T)
    next_values_T[last_B[lens_B > 0]] = tail_B[lens_B > 0]
    deltas_T = rewards_T + gamma * next_values_T - values_T
    advantages_T = _decayed_sums(deltas_T, lens_B, gamma * lam)
    return advantages_T, advantages_T + values_T


@torch.no_grad()
def discounted_returns(rewards_T: torch.Tensor, seq_lens: Lengths, *, gamma: float = 1.0) -> torch.Tensor:
    """[T] reward-to-go, G_t = r_t + gamma G_{t+1} within each sample (Williams 1992, doi:10.1007/BF00992696).

    Args:
        rewards_T: [T] reward received after each token.
        seq_lens: [B] tokens of each sample.
        gamma: discount per token.

    Raises:
        ValueError: if the lengths do not add up to T.
    """
    return _decayed_sums(rewards_T, checked_lens(seq_lens, rewards_T), gamma)


@torch.no_grad()
def group_relative(
    scores_B: torch.Tensor,
    group_ids: GroupIds,
    *,
    scale: Literal["std", "none", "batch"] = "std",
    eps: float = 1e-6,
) -> torch.Tensor:
    """[B] score minus the mean score of the sample's group, scaled (GRPO, Shao et al. 2024, arXiv:2402.03300).

    A group of one sample, and a group whose scores are all equal, gets exactly 0.

    Args:
        scores_B: [B] finite scores.
        group_ids: [B] any integers in any order; equal ids are one group.
        scale: "std" divides by (unbiased standard deviation of the group + eps), "none" by nothing (Dr. GRPO,
            arXiv:2503.20783), "batch" by (unbiased standard deviation of all raw scores + eps) (arXiv:2508.08221).
        eps: keeps the divisor away from 0.

    Raises:
        ValueError: for an unknown scale, or not one group id per score.
    """
    if scale not in ("std", "none", "batch"):
        raise ValueError(f"scale must be one of std, none, batch, not {scale!r}")
    deviation_B, size_B, index_B, flat_B = _deviations(scores_B, group_ids)
    if scale == "std":
        squares_B = _group_sums(deviation_B.square(), index_B)[index_B]
        deviation_B = deviation_B / ((squares_B / (size_B - 1).clamp(min=1)).sqrt() + eps)
    elif scale == "batch" and len(scores_B) > 1:
        deviation_B = deviation_B / (scores_B.std() + eps)
    return deviation_B.masked_fill(flat_B, 0)


@torch.no_grad()
def step_relative(
    rewards_T: torch.Tensor, step_ends_T: torch.Tensor, seq_lens: Lengths, group_ids: GroupIds, *, eps: float = 1e-6
) -> torch.Tensor:
    """[T] GRPO with process supervision (Shao et al. 2024, arXiv:2402.03300, section 4.1.3).

    Every step's reward is normalised among all steps of its group; a token's advantage is the sum of those of its own
    and the later steps. A sample's last token ends a step, whether it is marked or not.

    Args:
        rewards_T: [T] reward received after each token; what lies within a step counts at its end.
        step_ends_T: [T] bool, True at the last token of each step.
        seq_lens: [B] tokens of each sample.
        group_ids: [B] any integers in any order; equal ids are one group.
        eps: keeps the divisor away from 0.

    Raises:
        ValueError: if the sizes do not fit together.
    """
    lens_B = checked_lens(seq_lens, rewards_T)
    checked_lens(seq_lens, step_ends_T)
    last_T = step_ends_T.bool().clone()
    last_T[lens_B.cumsum(0)[lens_B > 0] - 1] = True
    ends = last_T.nonzero()[:, 0]
    sums = rewards_T.cumsum(0)[ends].diff(prepend=rewards_T.new_zeros(1))
    groups_T = torch.repeat_interleave(torch.as_tensor(group_ids), lens_B)
    normalized_T = torch.zeros_like(rewards_T)
    normalized_T[ends] = group_relative(sums, groups_T[ends], eps=eps)
    return _decayed_sums(normalized_T, lens_B, 1.0)


@torch.no_grad()
def leave_one_out(scores_B: torch.Tensor, group_ids: GroupIds) -> torch.Tensor:
    """[B] score minus the mean score of the others in the group (RLOO, Ahmadian et al. 2024, arXiv:2402.14740).

    A group of one sample, and a group whose scores are all equal, gets exactly 0.

    Args:
        scores_B: [B] finite scores.
        group_ids: [B] any integers in any order; equal ids are one group.

    Raises:
        ValueError: if there is not one group id per score.
    """
    deviation_B, size_B, _, flat_B = _deviations(scores_B, group_ids)
    return (deviation_B * size_B / (size_B - 1).clamp(min=1)).masked_fill(flat_B, 0)


@torch.no_grad()
def best_of_n(scores_B: torch.Tensor, group_ids: GroupIds) -> torch.Tensor:
    """[B] weights of rejection sampling (best-of-n; RAFT, Dong et al. 2023, arXiv:2304.06767).

    1 for the best sample of each group, shared equally by those that tie for it, and 0 for the others. A group of one
    sample, and a group whose scores are all equal, gets exactly 0: nothing was better than anything else.

    Args:
        scores_B: [B] finite scores.
        group_ids: [B] any integers in any order; equal ids are one group.

    Raises:
        ValueError: if there is not one group id per score.
    """
    index_B, high_G, low_G = _groups(scores_B, group_ids)
    best_B = scores_B == high_G[index_B]
    ties_B = _group_sums(best_B.long(), index_B)[index_B]
    return (best_B.to(scores_B.dtype) / ties_B).masked_fill((high_G == low_G)[index_B], 0)


@torch.no_grad()
def best_and_worst(scores_B: torch.Tensor, group_ids: GroupIds) -> torch.Tensor:
    """[N, 2] int64: positions of the best and the worst sample of each group whose scores differ.

    They are the pairs of online DPO (Guo et al. 2024, arXiv:2402.04792). Groups come in the order in which they first
    appear; of equal scores the first position counts. A group of one sample makes no pair.

    Args:
        scores_B: [B] finite scores.
        group_ids: [B] any integers in any order; equal ids are one group.

    Raises:
        ValueError: if there is not one group id per score.
    """
    index_B, high_G, low_G = _groups(scores_B, group_ids)
    position_B = torch.arange(len(scores_B), device=scores_B.device)

    def first(wanted_B: torch.Tensor) -> torch.Tensor:
        at_B = position_B.masked_fill(~wanted_B, len(scores_B))
        return torch.zeros_like(high_G, dtype=torch.int64).scatter_reduce(0, index_B, at_B, "amin", include_self=False)

    best_G, worst_G = first(scores_B == high_G[index_B]), first(scores_B == low_G[index_B])
    order_G = first(torch.ones_like(position_B, dtype=torch.bool)).argsort()
    return torch.stack([best_G, worst_G], 1)[order_G][(high_G > low_G)[order_G]]


@torch.no_grad()
def whiten(x_T: torch.Tensor, *, eps: float = 1e-8) -> torch.Tensor:
    """[T] (x - mean) / sqrt(unbiased variance + eps), as PPO does with advantages (arXiv:2403.17031).

    One element, and elements that are all equal, give exactly 0.
    """
    if len(x_T) < 2 or x_T.max() == x_T.min():
        return torch.zeros_like(x_T)
    return (x_T - x_T.mean()) / (x_T.var() + eps).sqrt()


def _decayed_sums(x_T: torch.Tensor, lens_B: torch.Tensor, decay: float) -> torch.Tensor:
    """y_t = x_t + decay * y_{t+1} within each sample, in log2(longest sample) passes over all tokens.

    After the pass with shift s, y_t holds the terms x_t ... x_{t+2s-1}: twice as many as before it.
    """
    y_T = x_T.clone()
    ends_T = torch.repeat_interleave(lens_B.cumsum(0), lens_B)
    following_T = ends_T - 1 - torch.arange(len(x_T), device=x_T.device)  # tokens after this one in its sample
    longest = int(lens_B.max()) if len(lens_B) else 0
    shift = 1
    while shift < longest:
        y_T[:-shift] += torch.where(following_T[:-shift] >= shift, decay**shift * y_T[shift:], 0)
        shift *= 2
    return y_T


def _deviations(
    scores_B: torch.Tensor, group_ids: GroupIds
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per sample: score - group mean, size of its group, index of its group, whether its group's scores are equal."""
    index_B, high_G, low_G = _groups(scores_B, group_ids)
    size_G = torch.bincount(index_B, minlength=len(high_G))
    mean_G = _group_sums(scores_B, index_B) / size_G
    return scores_B - mean_G[index_B], size_G[index_B], index_B, (high_G == low_G)[index_B]


def _groups(scores_B: torch.Tensor, group_ids: GroupIds) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Index of each sample's group [B], and each group's highest and lowest score [G]."""
    ids_B = group_ids if isinstance(group_ids, torch.Tensor) else torch.tensor(group_ids, dtype=torch.int64)
    if scores_B.dim() != 1 or ids_B.shape != scores_B.shape:
        raise ValueError(f"group_ids must be one per score: {list(ids_B.shape)} for {list(scores_B.shape)}")
    groups_G, index_B = torch.unique(ids_B.to(scores_B.device), return_inverse=True)
    empty_G = scores_B.new_zeros(len(groups_G))
    high_G = empty_G.scatter_reduce(0, index_B, scores_B, "amax", include_self=False)
    low_G = empty_G.scatter_reduce(0, index_B, scores_B, "amin", include_self=False)
    return index_B, high_G, low_G


def _group_sums(x_B: torch.Tensor, index_B: torch.Tensor) -> torch.Tensor:
    """[G] sums over the samples with each index."""
    groups = int(index_B.max()) + 1 if len(index_B) else 0
    return x_B.new_zeros(groups).index_add(0, index_B, x_B)
