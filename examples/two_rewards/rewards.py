"""Two rewards: one sample at a time, and a batch at a time in the shape that TRL made common."""

from __future__ import annotations

from engine import Sample, reward


@reward(weight=1.0, timeout=10)
def names_the_capital(sample: Sample) -> float:
    """1 if the answer names the capital; columns of the data row are attributes of `sample.row`."""
    return float(sample.row.capital in sample.completion)


def brevity(completions: list[str], **columns: list) -> list[float]:
    """From 1 for an empty answer down to 0 for one of 100 characters or more."""
    return [max(0.0, 1 - len(text) / 100) for text in completions]
