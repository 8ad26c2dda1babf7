"""What a side's run comes to: the steps of its training, and what its processes held and did meanwhile."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Step:
    """One optimizer update and all that led to it. Times are unix seconds; a step begins where the last one ended."""

    began_at: float
    ended_at: float
    samples: int
    """Sequences trained on: responses, rows, or both answers of each pair."""
    trained_tokens: int
    """Of these sequences, prompts included, each token once."""
    generated_tokens: int = 0
    reward: float | None = None
    loss: float | None = None
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds of named parts."""

    @property
    def seconds(self) -> float:
        """From the end of the step before to its own."""
        return self.ended_at - self.began_at


@dataclass(frozen=True)
class Run:
    """One run of one side."""

    side: str
    started_at: float
    """The process was started."""
    training_at: float
    """Everything was loaded, and training began (a reference's pass over the rows, if there is one, is part of it)."""
    steps: tuple[Step, ...]
    reference_s: float = 0.0
    """Seconds in which a frozen reference looked at all rows, before the first step."""
    settings: dict[str, Any] = field(default_factory=dict)
    """As given to the side."""

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self), indent=1, default=str))

    @staticmethod
    def read(path: Path) -> Run:
        """What `write` wrote."""
        raw = json.loads(path.read_text())
        return Run(**raw | {"steps": tuple(Step(**step) for step in raw["steps"])})


@dataclass(frozen=True)
class Speed:
    """What is compared, over the steps after the warm-up."""

    step_s: float
    """Median."""
    samples_per_s: float
    generated_per_s: float
    trained_per_s: float
    first_loss: float | None


def speed(steps: Sequence[Step], *, warmup: int) -> Speed:
    """Rates are totals over total seconds.

    Raises:
        ValueError: no step is left.
    """
    measured = steps[warmup:]
    if not measured:
        raise ValueError(f"{len(steps)} steps, of which {warmup} are the warm-up: none is left to measure")
    seconds = sum(step.seconds for step in measured)
    ordered = sorted(step.seconds for step in measured)
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return Speed(
        step_s=median,
        samples_per_s=sum(step.samples for step in measured) / seconds,
        generated_per_s=sum(step.generated_tokens for step in measured) / seconds,
        trained_per_s=sum(step.trained_tokens for step in measured) / seconds,
        first_loss=steps[0].loss,
    )


def reached(steps: Sequence[Step], target: float, *, window: int) -> int | None:
    """The first step, counted from 1, at which the mean reward of the last `window` steps is at least `target`."""
    rewards = [step.reward for step in steps]
    for last in range(window, len(rewards) + 1):
        seen = [reward for reward in rewards[last - window : last] if reward is not None]
        if len(seen) == window and sum(seen) / window >= target:
            return last
    return None


def seconds_to(run: Run, target: float, *, window: int) -> float | None:
    """Seconds from the start of training to the end of the step at which the target is reached; None if it never is."""
    step = reached(run.steps, target, window=window)
    return None if step is None else run.steps[step - 1].ended_at - run.training_at
