"""Losses of reward models: from pairs, from rankings, from labelled reasoning steps.

Legend: N pairs; K answers of all ranked lists, one list after the other; S reasoning steps. A score is what the
model gives to one answer; only score differences within a prompt matter, except for `process_bce`.
"""

from __future__ import annotations

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from engine.algorithms.aggregate import Lengths, checked_lens


def bradley_terry(
    chosen_N: torch.Tensor, rejected_N: torch.Tensor, *, margin: torch.Tensor | float | None = None
) -> torch.Tensor:
    """[N] -logsigmoid(chosen - rejected - margin).

    Bradley & Terry 1952 (doi:10.2307/2334029), as a loss of reward models in arXiv:2203.02155; the margin, larger
    for clearer preferences, is Llama 2's (arXiv:2307.09288, equation 2).

    Args:
        chosen_N: [N] scores of the preferred answers.
        rejected_N: [N] scores of the other answers.
        margin: [N], or one number for all pairs; None is 0. It receives no gradient.

    Raises:
        ValueError: for inputs of different sizes.
    """
    _check_one_each(chosen_N, rejected_N, "chosen")
    difference_N = chosen_N - rejected_N
    if isinstance(margin, torch.Tensor):
        _check_one_each(chosen_N, margin, "pair")
        difference_N = difference_N - margin.detach().to(difference_N)
    elif margin is not None:
        difference_N = difference_N - margin
    return -logsigmoid(difference_N)


def plackett_luce(scores_K: torch.Tensor, ranks_K: torch.Tensor, list_lens: Lengths) -> torch.Tensor:
    """[lists] negative log-likelihood of each ranking under the Plackett-Luce model.

    The sum over items of logsumexp{scores of the same list whose rank is not better} - its score (Plackett 1975,
    doi:10.2307/2346567; Luce 1959). Tied items each have the whole tie in their sum (Breslow 1974,
    doi:10.2307/2529620). Two untied items give `bradley_terry`; a list of one, or of none, gives 0.

    Args:
        scores_K: [K].
        ranks_K: [K] 1 is best; only the order within a list matters.
        list_lens: [lists] items of each list, adding up to K. Work and memory grow with lists * longest list^2.

    Raises:
        ValueError: for inputs of different sizes, lengths that do not add up to K, or a rank that is NaN.
    """
    _check_one_each(scores_K, ranks_K, "item")
    if bool(ranks_K.isnan().any()):
        raise ValueError("a rank is NaN: leave unranked items out")
    lens_L = checked_lens(list_lens, scores_K)
    width = max(lens_L.tolist(), default=0)
    real_LK = torch.arange(width, device=lens_L.device) < lens_L[:, None]
    scores_LK = scores_K.new_zeros(real_LK.shape).masked_scatter(real_LK, scores_K)
    ranks_LK = ranks_K.new_zeros(real_LK.shape).masked_scatter(real_LK, ranks_K)
    not_better_LKK = (ranks_LK[:, None, :] >= ranks_LK[:, :, None]) & real_LK[:, None, :] & real_LK[:, :, None]
    itself_KK = torch.eye(width, dtype=torch.bool, device=lens_L.device)
    gap_LKK = (scores_LK[:, None, :] - scores_LK[:, :, None]).masked_fill(~(not_better_LKK | itself_KK), -torch.inf)
    return gap_LKK.logsumexp(2).sum(1)  # padding has only itself to compare with: log(exp(0)) = 0


def process_bce(step_logits_S: torch.Tensor, step_labels_S: torch.Tensor) -> torch.Tensor:
    """[S] binary cross-entropy of each reasoning step's logit (process reward models, arXiv:2305.20050).

    Args:
        step_logits_S: [S] logits of "this step is right".
        step_labels_S: [S] bool, or numbers in [0, 1]: the share of continuations from this step that end in the
            right answer (Math-Shepherd, arXiv:2312.08935). They receive no gradient.

    Raises:
        ValueError: for a label outside [0, 1] (NaN included), or inputs of different sizes.
    """
    _check_one_each(step_logits_S, step_labels_S, "step")
    labels_S = step_labels_S.detach().to(step_logits_S)
    if not bool(((labels_S >= 0) & (labels_S <= 1)).all()):
        raise ValueError("labels of steps must be in [0, 1]: 1 is a right step")
    return binary_cross_entropy_with_logits(step_logits_S, labels_S, reduction="none")


def _check_one_each(scores: torch.Tensor, other: torch.Tensor, what: str) -> None:
    if other.shape != scores.shape or scores.dim() != 1:
        raise ValueError(f"one number per {what} is needed, flat: {list(other.shape)} for {list(scores.shape)}")
