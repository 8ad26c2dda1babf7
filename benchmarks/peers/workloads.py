"""The work that both sides are given: a model, rows in the order of training, sizes. Seeded, so equal wherever made."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine.data.sampler import RowSampler

SEED = 0
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "one", "and", "two", "are", "three"]
REAL_MODEL = "models/SmolLM2-135M-Instruct"
Row = dict[str, Any]


@dataclass(frozen=True)
class Workload:
    """What is trained, and how much."""

    kind: Literal["grpo", "sft", "dpo"]
    model: str
    """"tiny" (two layers with random weights, as in the tests), or a folder."""
    steps: int
    warmup: int
    """First steps that are not measured: memory is touched for the first time."""
    rows_per_step: int
    """Prompts, conversations or pairs of one optimizer update."""
    make_rows: Callable[[random.Random, int], list[Row]]
    learning_rate: float = 1e-5
    max_length: int = 512
    """Longest sequence, in tokens."""
    group: int = 8
    """Responses to a prompt."""
    max_new_tokens: int = 32
    reward: str = "share_of_e"
    """Function of rewards.py."""
    target: float | None = None
    """Mean reward of the last `window` steps that training is to reach."""
    window: int = 3
    tokens_per_microbatch: int = 4096
    beta: float = 0.1

    @property
    def rows(self) -> list[Row]:
        """One for each place in a step: nothing is seen twice."""
        return self.make_rows(random.Random(SEED), self.steps * self.rows_per_step)

    @property
    def samples_per_step(self) -> int:
        """Sequences of one optimizer update."""
        return self.rows_per_step * {"grpo": self.group, "sft": 1, "dpo": 2}[self.kind]


def text(source: random.Random, words: int) -> str:
    """So many words of a small vocabulary, which every tokenizer here cuts about alike."""
    return " ".join(source.choices(WORDS, k=words))


def skewed(source: random.Random, *, median: float, spread: float, most: int) -> int:
    """A length from a lognormal distribution, cut at `most`."""
    return max(1, min(most, round(math.exp(source.gauss(math.log(median), spread)))))


def prompts(median: int, most: int) -> Callable[[random.Random, int], list[Row]]:
    """Prompts of skewed lengths."""

    def make(source: random.Random, count: int) -> list[Row]:
        return [{"prompt": text(source, skewed(source, median=median, spread=0.4, most=most))} for _ in range(count)]

    return make


def answers(names: tuple[str, ...], median: int, most: int) -> Callable[[random.Random, int], list[Row]]:
    """A short prompt, and for each name an answer of skewed length."""

    def make(source: random.Random, count: int) -> list[Row]:
        rows = []
        for _ in range(count):
            row = {"prompt": text(source, source.randint(4, 12))}
            for name in names:
                row[name] = " " + text(source, skewed(source, median=median, spread=0.9, most=most))
            rows.append(row)
        return rows

    return make


def sums(source: random.Random, count: int) -> list[Row]:
    """Sums and differences of two digits after one worked example, as in the quickstart; repeated when they run out."""
    problems = [(f"{a} {sign} {b} =", str(a + b if sign == "+" else a - b)) for a in range(10) for b in range(10)
                for sign in "+-"]  # fmt: skip
    rows: list[Row] = []
    while len(rows) < count:
        source.shuffle(problems)
        rows += [{"prompt": f"2 + 3 = 5\n{question}", "answer": answer} for question, answer in problems]
    return rows[:count]


WORKLOADS = {
    "grpo-tiny": Workload(
        "grpo", "tiny", steps=60, warmup=10, rows_per_step=8, make_rows=prompts(8, 16), max_new_tokens=16,
        max_length=192, learning_rate=1e-4,
    ),
    "grpo-135m": Workload(
        "grpo", REAL_MODEL, steps=6, warmup=3, rows_per_step=4, make_rows=prompts(36, 64), max_new_tokens=32,
        max_length=160,
    ),
    "learn-tiny": Workload(
        "grpo", "tiny", steps=60, warmup=3, rows_per_step=8, make_rows=prompts(8, 16), max_new_tokens=16,
        max_length=192, learning_rate=1e-2, target=0.5,
    ),
    "learn-135m": Workload(
        "grpo", REAL_MODEL, steps=24, warmup=1, rows_per_step=8, make_rows=sums, max_new_tokens=6, max_length=64,
        reward="right_answer", target=0.6,
    ),
    "sft-tiny": Workload(
        "sft", "tiny", steps=60, warmup=10, rows_per_step=16, make_rows=answers(("completion",), 12, 48),
        max_length=256, learning_rate=1e-3,
    ),
    "sft-135m": Workload(
        "sft", REAL_MODEL, steps=8, warmup=3, rows_per_step=16, make_rows=answers(("completion",), 40, 400),
    ),
    "dpo-tiny": Workload(
        "dpo", "tiny", steps=60, warmup=10, rows_per_step=8, make_rows=answers(("chosen", "rejected"), 12, 48),
        max_length=256, learning_rate=1e-3,
    ),
    "dpo-135m": Workload(
        "dpo", REAL_MODEL, steps=6, warmup=3, rows_per_step=8, make_rows=answers(("chosen", "rejected"), 40, 400),
    ),
}  # fmt: skip


def write_rows(workload: Workload, folder: Path) -> tuple[Path, Path]:
    """The rows for Gnomon, which shuffles them, and for TRL, in the order in which Gnomon will train them."""
    rows = workload.rows
    ours, theirs = folder / "rows.jsonl", folder / "rows_in_order.jsonl"
    ours.write_text("".join(json.dumps(row) + "\n" for row in rows))
    order = RowSampler(len(rows), seed=SEED).next(len(rows))
    theirs.write_text("".join(json.dumps(rows[i]) + "\n" for i in order))
    return ours, theirs
