"""Guess a number from 0 to 6: each guess is answered with "higher" or "lower" until it is right."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

from engine import Sample, Turn, reward

NUMBERS = 7


def guess_in(text: str) -> int | None:
    """The number that is guessed; None where it is not exactly one."""
    numbers = re.findall(r"\d+", text)
    return int(numbers[0]) if len(numbers) == 1 else None


class Game:
    """One episode. A right guess earns 1, a wrong one costs 0.1, so that fewer guesses are better."""

    async def reset(self, row) -> list[dict]:
        """The row's prompt says all there is to say."""
        self.secret = row.secret
        return []

    async def step(self, message: dict) -> Turn:
        """What is said to a guess; what is no number is a wasted turn."""
        guess = guess_in(message["content"])
        if guess == self.secret:
            return Turn(reward=1.0, done=True)
        hint = " again" if guess is None else " higher" if guess < self.secret else " lower"
        return Turn([{"role": "user", "content": hint}], reward=-0.1)


@reward(weight=0)
def found(sample: Sample) -> float:
    """1 if the last guess was right: measured, not rewarded."""
    return float(guess_in(sample.completion) == sample.row.secret)


def games(split: str, size: int = 400) -> Iterator[dict]:
    """Secrets to find; nothing but the hints tells them."""
    draw = random.Random(split)
    for _ in range(size):
        yield {"prompt": "game :", "secret": draw.randrange(NUMBERS)}


def transcripts(size: int = 20_000) -> Iterator[dict]:
    """What the model has read: players of whom half listen to the hints, and half say any number."""
    draw = random.Random(1)
    for _ in range(size):
        secret, low, high, listens = draw.randrange(NUMBERS), 0, NUMBERS - 1, draw.random() < 0.5
        text, guess = "game :", -1
        for _ in range(6):
            guess = draw.randint(low, high) if listens else draw.randrange(NUMBERS)
            text += f" {guess} ."
            if guess == secret:
                break
            text += " higher" if guess < secret else " lower"
            low, high = (max(low, guess + 1), high) if guess < secret else (low, min(high, guess - 1))
        yield {"text": text}
