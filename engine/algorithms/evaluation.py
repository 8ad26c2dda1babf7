"""Statistics of an evaluation, each with its standard error: a score without one cannot be compared.

Legend: P prompts.
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
        (mean, standard error); the standard error of a single value is NaN.

    Raises:
        ValueError: for no value.
    """
    values_P = np.asarray(values, dtype=np.float64)
    if values_P.size == 0:
        raise ValueError("there is nothing to average: the evaluation has no prompt")
    error = float(values_P.std(ddof=1)) / math.sqrt(values_P.size) if values_P.size > 1 else math.nan
    return float(values_P.mean()), error
