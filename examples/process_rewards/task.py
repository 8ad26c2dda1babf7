"""The successors of digits, one step each: " 4 ; 2 ; 5 ;" for 3 1 4, and 0 for 9. A step can be checked alone.

A solution is right when all its steps are, so that who is told no more than that must be lucky first.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from engine import Sample, reward

DIGITS = 4
MISTAKES = 0.3
"""Of the steps in what the model has read."""


def prompt_of(digits: list[int]) -> str:
    """The digits, as the model reads them."""
    return "".join(f" {digit}" for digit in digits) + " ="


def problems(split: str, size: int = 400) -> Iterator[dict]:
    """Prompts with their digits; the splits share none."""
    chosen = random.Random(7).sample(range(10**DIGITS), 2 * size)
    for number in chosen[:size] if split == "train" else chosen[size:]:
        digits = [int(digit) for digit in f"{number:0{DIGITS}d}"]
        yield {"prompt": prompt_of(digits), "digits": digits}


def transcripts(size: int = 20_000) -> Iterator[dict]:
    """Solutions by authors who write any digit now and then."""
    draw = random.Random(1)
    for _ in range(size):
        digits = [draw.randrange(10) for _ in range(DIGITS)]
        said = [draw.randrange(10) if draw.random() < MISTAKES else (digit + 1) % 10 for digit in digits]
        yield {"text": prompt_of(digits) + "".join(f" {digit} ;" for digit in said)}


def verdicts(sample: Sample) -> list[float]:
    """1 for each step that is right; a step too many is wrong."""
    right = [str((digit + 1) % 10) for digit in sample.row.digits]
    said = [step.strip(" ;") for step in sample.step_texts]
    return [float(i < len(right) and step == right[i]) for i, step in enumerate(said)]


@reward
def steps_right(sample: Sample) -> list[float] | None:
    """A reward for each step."""
    return verdicts(sample) or None


@reward
def share_right(sample: Sample) -> float:
    """Share of the steps that are right."""
    return sum(verdicts(sample)) / DIGITS


@reward
def all_right(sample: Sample) -> float:
    """1 if all steps are there and right."""
    return float(verdicts(sample) == [1.0] * DIGITS)
