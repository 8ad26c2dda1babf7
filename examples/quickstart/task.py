"""Sums and differences of two one-digit numbers from reasoning-gym, with a reward that checks the answer."""

from __future__ import annotations

import random
from typing import Any

import reasoning_gym

from engine import Sample, reward

HELD_OUT = 0.3
EXAMPLE = "2 + 3 = 5\n"


def rows(split: str) -> list[dict[str, Any]]:
    """The problems of "train" or "held_out": each of the 200 belongs to one of the two, by a fixed shuffle."""
    problems = reasoning_gym.create_dataset(
        "chain_sum", min_terms=2, max_terms=2, min_digits=1, max_digits=1, size=2000, seed=0
    )
    answers = {item["question"].rpartition(": ")[2]: item["answer"] for item in problems}
    questions = sorted(answers)
    random.Random(0).shuffle(questions)
    cut = int(len(questions) * HELD_OUT)
    chosen = questions[:cut] if split == "held_out" else questions[cut:]
    return [{"prompt": EXAMPLE + question, "answer": answers[question]} for question in chosen]


@reward(timeout=10)
def correct(sample: Sample) -> float:
    """1 if the response is the answer and nothing else, else 0."""
    return float(sample.completion.strip() == sample.row.answer)
