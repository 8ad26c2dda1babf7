"""How long responses are: a distribution that is given, or the lengths that a run recorded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from engine.config import UserError
from engine.tracking.jsonl import read_rows
from engine.tracking.run_folder import EVENTS

FORMS = "lognormal:MEAN:SIGMA, fixed:TOKENS or the folder of a run"


class Lengths(Protocol):
    """A distribution of response lengths in tokens, before they are cut at `max_new_tokens`."""

    def draw(self, random: np.random.Generator, count: int) -> np.ndarray:
        """[count] lengths."""
        ...


@dataclass(frozen=True)
class Fixed:
    """All the same."""

    tokens: int

    def draw(self, random: np.random.Generator, count: int) -> np.ndarray:
        """[count] lengths."""
        return np.full(count, self.tokens)


@dataclass(frozen=True)
class LogNormal:
    """Skewed, as responses that reason are: `mean` tokens on average, `sigma` the deviation of their logarithm."""

    mean: float
    sigma: float

    def draw(self, random: np.random.Generator, count: int) -> np.ndarray:
        """[count] lengths."""
        return np.rint(random.lognormal(math.log(self.mean) - self.sigma**2 / 2, self.sigma, count))


@dataclass(frozen=True)
class Recorded:
    """Drawn from the lengths of a run, one by one: that those of a group are alike is lost."""

    tokens: tuple[int, ...]

    def draw(self, random: np.random.Generator, count: int) -> np.ndarray:
        """[count] lengths."""
        return random.choice(np.array(self.tokens), count)


def parse_lengths(text: str) -> tuple[Lengths, int | None]:
    """What `--lengths` says, and the mean length of the prompts where that is known.

    Raises:
        UserError: it says none of `FORMS`.
    """
    kind, *values = text.split(":")
    folder = Path(text)
    if folder.is_dir():
        steps = recorded_steps(folder)
        prompts_B = np.concatenate([prompts for _, prompts in steps.values()])
        return Recorded(tuple(int(n) for lengths, _ in steps.values() for n in lengths)), round(prompts_B.mean())
    try:
        match kind, [float(value) for value in values]:
            case "fixed", [tokens] if tokens >= 1 and tokens == int(tokens):
                return Fixed(int(tokens)), None
            case "lognormal", [mean, sigma] if 1 <= mean < math.inf and 0 <= sigma < math.inf:
                return LogNormal(mean, sigma), None
    except ValueError:
        pass
    raise UserError(f"--lengths: {text!r} is neither a folder that is there nor of the form {FORMS.split(' or ')[0]}")


def recorded_steps(folder: Path) -> dict[int, tuple[list[int], list[int]]]:
    """Step -> lengths of the responses and of the prompts of its samples, group after group.

    Raises:
        UserError: the run recorded none.
    """
    events = [row for row in read_rows(folder / EVENTS) if row.get("kind") == "consumed"]
    if not events:
        raise UserError(
            f"{folder}: its {EVENTS} has no event `consumed`, which holds the lengths of a step's responses; take an "
            f"`rl` run that recorded them, or give --lengths {FORMS.split(' or ')[0]}"
        )
    return {row["step"]: (row["lengths"], row["prompt_lengths"]) for row in events}
