from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from engine.rewards.contract import Row, Sample

TASK = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "quickstart" / "task.py"))


def test_train_and_held_out_problems_are_disjoint_and_complete():
    train, held_out = ({row["prompt"] for row in TASK["rows"](split)} for split in ("train", "held_out"))
    assert not train & held_out
    assert len(train | held_out) == 200
    assert len(held_out) == 60


@pytest.mark.parametrize("row", TASK["rows"]("held_out")[:20], ids=lambda row: row["prompt"].splitlines()[1])
def test_answers_are_right_and_only_they_are_rewarded(row):
    expression = row["prompt"].splitlines()[1].removesuffix(" =")
    assert str(eval(expression)) == row["answer"]
    for completion, expected in [(f" {row['answer']}\n", 1.0), (f" {row['answer']}0", 0.0), ("", 0.0)]:
        assert TASK["correct"](Sample(0, row["prompt"], completion, Row(row))) == expected
