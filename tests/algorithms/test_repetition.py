"""Repetition of a response."""

from __future__ import annotations

import pytest

from engine.algorithms.repetition import repeated_fraction


@pytest.mark.parametrize(
    ("tokens", "n", "expected"),
    [
        ([], 4, 0.0),
        ([1, 1, 1], 4, 0.0),
        ([1, 2, 3, 4, 5], 4, 0.0),
        ([7] * 10, 4, 6 / 7),
        ([1, 2, 1, 2, 1], 2, 0.5),
        ([5, 5], 1, 0.5),
    ],
)
def test_it_is_the_share_of_ngrams_that_occurred_before(tokens, n, expected):
    assert repeated_fraction(tokens, n) == pytest.approx(expected)


def test_an_ngram_has_a_token():
    with pytest.raises(ValueError, match="at least 1"):
        repeated_fraction([1], 0)
