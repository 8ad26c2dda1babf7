"""What the examples ask of the policy: answers of the game, verdicts on steps, rows that the splits do not share."""

from __future__ import annotations

import asyncio
import runpy
from pathlib import Path
from typing import Any

import pytest

from engine.rewards.contract import Row, Sample

EXAMPLES = Path(__file__).parents[1] / "examples"


def names_of(file: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / file))


def played(secret: int, *guesses: str) -> list[tuple[str, float, bool]]:
    """What the game says to each guess, its reward, and whether it is over."""
    game = names_of("guess_the_number/game.py")["Game"]()

    async def play() -> list[Any]:
        assert await game.reset(Row({"secret": secret})) == []
        return [await game.step({"role": "assistant", "content": guess}) for guess in guesses]

    turns = asyncio.run(play())
    return [("".join(m["content"] for m in turn.messages), turn.reward, turn.done) for turn in turns]


def test_the_game_answers_every_guess_and_ends_with_the_right_one() -> None:
    assert played(4, " 6 .", " 3 .", " .", " 4 4 .", " 4 .") == [
        (" lower", -0.1, False),
        (" higher", -0.1, False),
        (" again", -0.1, False),
        (" again", -0.1, False),
        ("", 1.0, True),
    ]


def test_documents_of_the_game_end_with_the_secret_and_their_hints_are_true() -> None:
    for row in names_of("guess_the_number/game.py")["transcripts"](200):
        *wrong, last = row["text"].removeprefix("game :").replace(" higher", ">").replace(" lower", "<").split(".")[:-1]
        guesses = [int(guess.strip("<> ")) for guess in [*wrong, last]]
        hints = [text[0] for text in [*wrong, last][1:]]
        for guess, hint in zip(guesses, hints, strict=False):
            assert (guess < guesses[-1]) == (hint == ">") or len(guesses) == 6


@pytest.mark.parametrize(
    ("steps", "verdicts", "whole"),
    [
        ((" 4 ;", " 2 ;", " 5 ;", " 0 ;"), [1] * 4, 1),
        ((" 4 ;", " 7 ;", " 5 ;", " 0"), [1, 0, 1, 1], 0),
        ((" 4 ;", " 2 ;"), [1, 1], 0),
        ((" 4 ;", " 2 ;", " 5 ;", " 0 ;", " 0 ;"), [1] * 4 + [0], 0),
        ((), [], 0),
    ],
)
def test_each_step_has_a_verdict_and_a_solution_is_right_when_all_are(
    steps: tuple[str, ...], verdicts: list[float], whole: float
) -> None:
    task = names_of("process_rewards/task.py")
    sample = Sample(0, "", "".join(steps), Row({"digits": [3, 1, 4, 9]}), step_texts=steps)
    assert task["steps_right"](sample) == (verdicts or None)
    assert task["share_right"](sample) == pytest.approx(sum(verdicts) / 4)
    assert task["all_right"](sample) == whole


def test_the_problems_of_the_two_splits_differ_and_documents_make_the_mistakes_they_should() -> None:
    task = names_of("process_rewards/task.py")
    train, held_out = ({row["prompt"] for row in task["problems"](split)} for split in ("train", "held_out"))
    assert len(train) == len(held_out) == 400
    assert not train & held_out
    wrong, steps = 0, 0
    for row in task["transcripts"](500):
        digits, said = ([int(x) for x in part.split() if x != ";"] for part in row["text"].split("="))
        wrong += sum(after != (digit + 1) % 10 for digit, after in zip(digits, said, strict=True))
        steps += len(said)
    assert wrong / steps == pytest.approx(0.9 * task["MISTAKES"], abs=0.03), "a random digit is right one time in ten"
