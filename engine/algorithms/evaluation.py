"""Statistics of an evaluation: scores with their standard errors, without which they cannot be compared.

Legend: P prompts; N predictions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def pass_at_k(
    num_samples_P: Sequence[int] | np.ndarray, num_passed_P: Sequence[int] | np.ndarray, k: int
) -> tuple[float, float]:
    """Mean over prompts of the chance that at least one of k samples passes, and its standard error.

    The unbiased estimator 1 - C(n - c, k) / C(n, k) of Chen et al. 2021 (arXiv:2107.03374), from n >= k samples of
    which c passed, computed in exact integers.

    Args:
        num_samples_P: [P] samples of each prompt, n.
        num_passed_P: [P] those of them that passed, c.
        k: samples that one may draw.

    Returns:
        (mean, standard error across prompts); the standard error of a single prompt is NaN.

    Raises:
        ValueError: for no prompt, k < 1, k > n, or c outside [0, n].
    """
    if len(num_samples_P) != len(num_passed_P):
        raise ValueError(f"{len(num_samples_P)} prompts have samples, but {len(num_passed_P)} have passes")
    chances = []
    for n, c in zip(map(int, num_samples_P), map(int, num_passed_P), strict=True):
        if not 1 <= k <= n:
            raise ValueError(f"pass@{k} needs 1 <= k <= samples of each prompt, but one has {n}")
        if not 0 <= c <= n:
            raise ValueError(f"{c} of {n} samples cannot have passed")
        chances.append((math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k))
    return mean_and_standard_error(chances)


def mean_and_standard_error(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """The mean of independent values (one per prompt), and its standard error: unbiased std / sqrt(how many).

    Clustering by prompt follows Miller 2024 (arXiv:2411.00640): average the samples of one prompt first.

    Args:
        values: at least one number.

    Returns:
        (mean, standard error); the standard error of a single value is NaN, of equal ones exactly 0.

    Raises:
        ValueError: for no value.
    """
    values_P = np.asarray(values, dtype=np.float64)
    if values_P.size == 0:
        raise ValueError("there is nothing to average: the evaluation has no prompt")
    if values_P.size == 1:
        return float(values_P[0]), math.nan
    deviation = float(values_P.std(ddof=1)) if values_P.min() < values_P.max() else 0.0
    return float(values_P.mean()), deviation / math.sqrt(values_P.size)


def calibration_error(
    probabilities_N: Sequence[float] | np.ndarray, outcomes_N: Sequence[float] | np.ndarray, *, bins: int = 10
) -> float:
    """Expected calibration error (Guo et al. 2017, arXiv:1706.04599): how far predicted chances are from what happened.

    Predictions go into `bins` equal intervals (a, b] of [0, 1], the first with its lower end; the result is the mean
    over predictions of |share of its bin that came true - mean prediction of its bin|, in [0, 1].

    Of a preference model, predict something that can go both ways: for pairs stored with the winner first, the
    confidence max(p, 1 - p), and as its outcome p > 0.5.

    Args:
        probabilities_N: [N] predicted chances, in [0, 1].
        outcomes_N: [N] bool, or numbers in [0, 1].
        bins: at least 1. More bins hide less, but their shares are noisier, which raises the result.

    Raises:
        ValueError: for no prediction, different sizes, numbers outside [0, 1] (NaN included), or no bin.
    """
    chances_N, came_true_N = (np.asarray(x, dtype=np.float64) for x in (probabilities_N, outcomes_N))
    if chances_N.ndim != 1 or chances_N.shape != came_true_N.shape or chances_N.size == 0:
        raise ValueError(f"one outcome per prediction is needed: {came_true_N.shape} for {chances_N.shape}")
    if not all(bool(((x >= 0) & (x <= 1)).all()) for x in (chances_N, came_true_N)):
        raise ValueError("predicted chances and outcomes must be in [0, 1]")
    if bins < 1:
        raise ValueError(f"bins must be at least 1, not {bins}")
    bin_N = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], chances_N, side="left")
    # |bin| / N * |mean difference of the bin| = |sum of differences| / N
    return float(np.abs(np.bincount(bin_N, weights=came_true_N - chances_N)).sum() / chances_N.size)


def length_correlation(values_B: np.ndarray, lengths_B: np.ndarray) -> float:
    """Pearson's correlation of a reward with the response's length, over the samples that have the reward.

    0 where either is the same for all, or fewer than two samples have one.

    Args:
        values_B: [B] rewards; NaN is "no opinion".
        lengths_B: [B] tokens.
    """
    held = ~np.isnan(values_B)
    values, lengths = values_B[held].astype(np.float64), lengths_B[held].astype(np.float64)
    if len(values) < 2 or np.ptp(values) == 0 or np.ptp(lengths) == 0:
        return 0.0
    return float(np.corrcoef(values, lengths)[0, 1])
