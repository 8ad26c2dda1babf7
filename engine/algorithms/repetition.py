"""How far a response repeats itself."""

from __future__ import annotations

from collections.abc import Sequence


def repeated_fraction(token_ids: Sequence[int], n: int = 4) -> float:
    """Share of a response's n-grams that occurred in it before (1 - distinct-n, Li et al. 2016, arXiv:1510.03055).

    0 for a response of fewer than n tokens.

    Raises:
        ValueError: for an n below 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    ngrams = [tuple(token_ids[i : i + n]) for i in range(len(token_ids) - n + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
