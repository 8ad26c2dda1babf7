"""Rewards in the batch contract that both sides take: `f(completions, **columns)`."""

from __future__ import annotations

from typing import Any


def share_of_e(completions: list[str], **_: Any) -> list[float]:
    """The share of the letter e in an answer's characters."""
    return [completion.count("e") / max(1, len(completion)) for completion in completions]


def right_answer(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """1 where the first line is the answer."""
    return [float(c.partition("\n")[0].strip() == a) for c, a in zip(completions, answer, strict=True)]
