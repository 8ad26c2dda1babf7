"""Reasoning steps as token sequences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.config import UserError
from engine.data.examples import Example, PreparedExamples, to_batch
from engine.data.prompts import build_prompts
from engine.data.steps import StepCutter, build_steps, step_ends
from tests.data.tokenizer_families import CORES, LOSSLESS, data_of, decode, make, rows_of

ROW = {"prompt": "how many?", "steps": ["think about it", "1 and 2", "12"], "labels": [True, 0.25, 0]}


def build(
    tokenizer: Any, *rows: dict[str, Any], separator: str = "\n", limit: int = 100, **data: Any
) -> PreparedExamples:
    return build_steps(rows_of(*rows), tokenizer, data=data_of(**data), separator=separator, max_length=limit)


def one(tokenizer: Any, row: dict[str, Any], **settings: Any) -> Example:
    (example,) = build(tokenizer, row, **settings).examples
    return example


@pytest.mark.parametrize("separator", ["\n", " yes", ""])
@pytest.mark.parametrize("template", [None, "chatml"])
@pytest.mark.parametrize("family", CORES)
def test_each_step_is_scored_at_its_end(family: str, template: str | None, separator: str) -> None:
    tokenizer = make(family, template, bos=True)
    example = one(tokenizer, ROW, separator=separator)
    (sequence,) = example.sequences
    given = build_prompts(rows_of(ROW), tokenizer, data=data_of(), max_prompt_tokens=100).prompts[0]
    assert example.prompt == given
    assert tuple(sequence.tokens[: len(given.token_ids)]) == given.token_ids
    assert sequence.mask.sum() == 3
    assert sequence.mask[-1]
    if family in LOSSLESS:
        ends = [int(i) + 1 for i in np.flatnonzero(sequence.mask)]
        start = decode(tokenizer, given.token_ids)
        steps = [step + separator for step in ROW["steps"]]
        assert [decode(tokenizer, sequence.tokens[:end]) for end in ends] == [
            start + "".join(steps[:i]) for i in (1, 2, 3)
        ]


def test_labels_stand_where_the_mask_does() -> None:
    example = one(make("byte-level"), ROW)
    (labels_T,) = example.token_labels
    (sequence,) = example.sequences
    assert labels_T.dtype == np.float32
    assert labels_T[sequence.mask].tolist() == [1, 0.25, 0]
    assert not labels_T[~sequence.mask].any()
    batch = to_batch([example, example])
    assert batch.annotations["labels"].tolist() == [*labels_T, *labels_T]


def test_the_column_may_be_named_completions() -> None:
    named = {"prompt": ROW["prompt"], "completions": ROW["steps"], "labels": ROW["labels"]}
    tokenizer = make("byte-level")
    assert list(one(tokenizer, named).sequences[0].tokens) == list(one(tokenizer, ROW).sequences[0].tokens)


def test_a_cut_leaves_the_steps_before_it() -> None:
    tokenizer = make("byte-level")
    whole = one(tokenizer, ROW)
    second = int(np.flatnonzero(whole.sequences[0].mask)[1])
    cut = one(tokenizer, ROW, limit=second, on_long_row="truncate")
    assert len(cut.token_labels[0]) == len(cut.sequences[0].tokens) == second
    assert cut.sequences[0].mask.sum() == 1
    assert cut.token_labels[0].sum() == 1
    with pytest.raises(UserError, match="jsonl:1: cut to 3 tokens, nothing is left of an answer"):
        build(tokenizer, ROW, limit=3, on_long_row="truncate")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"steps": None}, "a column is empty: 'steps'"),
        ({"steps": "think"}, "column 'steps' must be a list"),
        ({"steps": []}, "column 'steps' is empty"),
        ({"steps": ["a", "", "b"]}, "column 'steps': step 1 is empty"),
        ({"labels": [1, 0]}, "column 'labels' has 2 labels for 3 steps"),
        ({"labels": [1, 0, -1]}, "column 'labels': label 2 must be true or false, or from 0 to 1, is -1"),
        ({"labels": [1, 0, "x"]}, "column 'labels': label 2 must be a number, is 'x'"),
        ({"prompt": 3}, "column 'prompt' must be a list"),
    ],
)
def test_a_bad_row_is_told_or_skipped(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match="process rows: 1 bad of 2 rows") as caught:
        build(make("byte-level"), ROW, ROW | change)
    assert f"file.jsonl:2: {reason}" in str(caught.value)
    assert build(make("byte-level"), ROW, ROW | change, on_bad_row="skip").examples[0].row == ROW


@pytest.mark.parametrize(
    ("pieces", "separator", "ends"),
    [
        (["one", "\n", "two", "\n"], "\n", [1, 3]),
        (["one", "\n", "two"], "\n", [1, 2]),
        (["one", ".\n", "\n", " two", "<end>"], "\n", [1, 2, 3]),
        (["one", " then", " two", "<end>"], "\n", [2]),
        (["a", "b"], "", [1]),
        (["one", "\n", " ", "<end>"], "\n", [1]),
        (["<end>"], "\n", [0]),
        (["x#", "#y", "##"], "##", [1, 2]),
    ],
)
def test_a_step_of_a_response_ends_with_the_token_that_completes_the_separator(pieces, separator, ends):
    class Pieces:
        """Token i is the text of piece i."""

        all_special_ids = (pieces.index("<end>"),) if "<end>" in pieces else ()

        def decode(self, ids: list[int]) -> str:
            return pieces[ids[0]]

    assert step_ends(range(len(pieces)), Pieces(), separator) == ends


class TestStepCutter:
    def test_a_text_ends_a_step_and_the_texts_together_are_the_response(self):
        tokenizer = make("byte-level")
        ids = tokenizer("one\ntwo\nthree")["input_ids"]
        cutter = StepCutter(tokenizer, "\n")
        ends = cutter.ends(ids)
        assert cutter.texts(ids, ends) == ("one\n", "two\n", "three")
        assert ends[-1] == len(ids) - 1

    def test_a_function_of_the_users_cuts_where_it_likes(self, tmp_path):
        file = tmp_path / "cut.py"
        file.write_text(
            "import re\ndef sentences(text): return re.findall(r'[^.]+[.]?', text)\ndef wrong(text): return [text[1:]]"
        )
        tokenizer = make("byte-level")
        ids = tokenizer("A is one. B is two. So")["input_ids"]
        cutter = StepCutter(tokenizer, f"{file}:sentences")
        assert [text.strip() for text in cutter.texts(ids, cutter.ends(ids))] == ["A is one.", "B is two.", "So"]
        with pytest.raises(UserError, match=r"rewards\.steps: .*wrong must cut"):
            StepCutter(tokenizer, f"{file}:wrong").ends(ids)
