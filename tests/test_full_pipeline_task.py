from __future__ import annotations

import re
import runpy
from itertools import islice
from pathlib import Path

import pytest

from engine.rewards.contract import Row, Sample

TASK = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "full_pipeline" / "task.py"))
USES = ("instructions", "preferences", "prompts")


@pytest.fixture(scope="module")
def rows():
    return {(use, split): list(TASK[use](split)) for use in USES for split in ("train", "held_out")}


def solve(prompt: str) -> str:
    digits = next(word for word in prompt.rstrip(".?").split() if word.isdigit())
    if prompt.startswith("Sort"):
        return "".join(sorted(digits))
    return digits[::-1] if prompt.startswith("Write") else max(digits)


def score(name: str, prompt: str, completion: str) -> float:
    row = Row({"prompt": prompt, "answer": solve(prompt)})
    return TASK[name](Sample(0, prompt, completion, row))


def test_documents_are_much_text_of_which_about_a_twentieth_is_held_out():
    train, held_out = ([row["text"] for row in TASK["documents"](split)] for split in ("train", "held_out"))
    assert sum(map(len, train)) > 1_000_000
    assert 0.02 < sum(map(len, held_out)) / sum(map(len, train)) < 0.15


def test_no_document_is_both_trained_on_and_held_out():
    train, held_out = ([row["text"] for row in TASK["documents"](split)] for split in ("train", "held_out"))
    everything = "\0".join(train)
    assert len(set(train + held_out)) == len(train) + len(held_out)
    for text in held_out:
        assert text not in everything


def test_documents_hold_nothing_of_the_tasks():
    text = "\n".join(row["text"] for split in ("train", "held_out") for row in TASK["documents"](split))
    assert not re.search(r"Write \d+ backwards|Sort the digits of|largest digit of|The result is \d", text)


def test_no_prompt_is_used_by_two_functions_or_twice_and_none_is_held_out_and_trained_on(rows):
    trained = [row["prompt"] for use in USES for row in rows[use, "train"]]
    held_out = {row["prompt"] for use in USES for row in rows[use, "held_out"]}
    assert len(trained) == len(set(trained))
    assert not held_out & set(trained)
    assert all(len(rows[use, "held_out"]) >= 300 for use in USES)


@pytest.mark.parametrize("use", USES)
def test_rows_depend_on_the_seed_alone(use, rows):
    assert list(TASK[use]("train")) == rows[use, "train"]
    assert list(islice(TASK[use]("train", seed=1), 50)) != rows[use, "train"][:50]


def test_unknown_splits_are_refused():
    with pytest.raises(ValueError, match="validation"):
        next(TASK["prompts"]("validation"))


def test_completions_are_right_and_half_of_them_polite(rows):
    train = rows["instructions", "train"]
    assert all(score("exact_match", row["prompt"], row["completion"]) == 1 for row in train)
    assert 0.47 < sum(" " in row["completion"] for row in train) / len(train) < 0.53


def test_answers_are_right(rows):
    assert all(row["answer"] == solve(row["prompt"]) for row in rows["prompts", "train"] + rows["prompts", "held_out"])


def test_held_out_pairs_follow_the_rule_and_training_pairs_do_but_for_the_noise(rows):
    def agrees(row):
        chosen, rejected = (score("gold", row["prompt"], row[column]) for column in ("chosen", "rejected"))
        assert chosen != rejected
        return chosen > rejected

    train, held_out = ([agrees(row) for row in rows["preferences", split]] for split in ("train", "held_out"))
    assert all(held_out)
    assert abs(1 - sum(train) / len(train) - TASK["NOISE"]) < 0.015


def test_neither_brevity_nor_the_longer_answer_decides_the_pairs(rows):
    terse_is_chosen = [
        " " not in row["chosen"]
        for row in rows["preferences", "held_out"]
        if (" " in row["chosen"]) != (" " in row["rejected"])
    ]
    assert 0.5 < sum(terse_is_chosen) / len(terse_is_chosen) < 0.9


@pytest.mark.parametrize(
    ("completion", "exact_match", "gold"),
    [
        ("1247", 1, 1),
        (" 1247\n", 1, 1),
        ("Sure! The result is 1247. Thank you.", 1, 1 / 7),
        ("Of course. The result is 1247. Please check it.", 1, 1 / 9),
        ("Sure! The result is 1274. Thank you.", 0, 0),
        ("Sure! The result is 1247.", 0, 0),
        ("The result is 1247. Thank you.", 0, 0),
        ("1247 1247", 0, 0),
        ("12477", 0, 0),
        ("124", 0, 0),
        ("", 0, 0),
    ],
)
def test_rewards(completion, exact_match, gold):
    assert score("exact_match", "Sort the digits of 7421.", completion) == exact_match
    assert score("gold", "Sort the digits of 7421.", completion) == pytest.approx(gold)
