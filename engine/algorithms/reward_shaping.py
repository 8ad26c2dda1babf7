"""From one score per sample to what is learnt from: a penalty for length, and one reward per token.

Legend: T response tokens of all samples, one sample after the other; B samples, `seq_lens [B]` tokens each.
Nothing returned here carries a gradient.
"""

from __future__ import annotations

import torch

from engine.algorithms.aggregate import Lengths, as_lens, checked_lens


def overlong_penalty(seq_lens: Lengths, *, max_len: int, fraction: float) -> torch.Tensor:
    """[B] float64 in [0, 1]: soft overlong punishment (DAPO, Yu et al. 2025, arXiv:2503.14476, equation 13).

    0 up to max_len * (1 - fraction) tokens, 1 at `max_len` and beyond, linear between. The paper's sign is turned:
    this is to be subtracted from the score.

    Args:
        seq_lens: [B] tokens of each response.
        max_len: tokens at which a response is cut, above 0.
        fraction: the last part of `max_len`, over which the penalty grows, in (0, 1].

    Raises:
        ValueError: for a max_len or a fraction out of range, or a negative length.
    """
    if max_len <= 0 or not 0 < fraction <= 1:
        raise ValueError(f"max_len must be above 0 and fraction in (0, 1], not {max_len} and {fraction}")
    left_B = max_len - as_lens(seq_lens).double()
    penalty_B = (1 - left_B / (max_len * fraction)).clamp(0, 1)
    return penalty_B.masked_fill(penalty_B < 1e-9, 0)  # a rounding error must not tell equal scores apart


@torch.no_grad()
def token_rewards(
    scores_B: torch.Tensor, seq_lens: Lengths, kl_T: torch.Tensor | None = None, *, kl_coef: float = 0.0
) -> torch.Tensor:
    """[T] the sample's score on its last token, minus kl_coef * KL on every token.

    Ziegler et al. 2019 (arXiv:1909.08593), per token as in Ouyang et al. 2022 (arXiv:2203.02155). A sample without a
    token gets nothing.

    Args:
        scores_B: [B] finite scores.
        seq_lens: [B] tokens of each sample.
        kl_T: [T] estimates of the KL to the reference (`engine.algorithms.kl.kl_estimate`).
        kl_coef: weight of the KL.

    Returns:
        [T] in the dtype of `scores_B`.

    Raises:
        ValueError: for a kl_coef without kl_T, or sizes that do not fit together.
    """
    if kl_T is None and kl_coef != 0:
        raise ValueError(f"kl_coef is {kl_coef}, but there is no kl_T to weigh")
    rewards_T = scores_B.new_zeros(int(as_lens(seq_lens).sum())) if kl_T is None else -kl_coef * kl_T.to(scores_B)
    lens_B = checked_lens(seq_lens, rewards_T)
    if lens_B.shape != scores_B.shape:
        raise ValueError(f"one score per sample is needed: {list(scores_B.shape)} for {list(lens_B.shape)}")
    has_token_B = lens_B > 0
    rewards_T[lens_B.cumsum(0)[has_token_B] - 1] += scores_B[has_token_B]
    return rewards_T
