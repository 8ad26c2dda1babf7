"""Rankings as token sequences."""

from __future__ import annotations

from typing import Any

import pytest

from engine.config import UserError
from engine.data.examples import PreparedExamples, to_batch
from engine.data.prompts import build_prompts
from engine.data.rankings import build_rankings
from tests.data.tokenizer_families import data_of, make, rows_of, trained_texts

ROW = {"prompt": "what is it?", "responses": ["good", "better", "bad", "worst"], "ranks": [2, 1, 2, 3.5]}


def build(tokenizer: Any, *rows: dict[str, Any], score_last: bool = False, **data: Any) -> PreparedExamples:
    return build_rankings(rows_of(*rows), tokenizer, data=data_of(**data), max_length=100, score_last=score_last)


@pytest.mark.parametrize("template", [None, "chatml"])
def test_every_response_is_a_sequence_with_its_rank(template: str | None) -> None:
    end = "<|im_end|>" if template else "</s>"
    tokenizer = make("llama2", template, eos=end)
    prepared = build(tokenizer, ROW)
    (example,) = prepared.examples
    assert [trained_texts(tokenizer, s) for s in example.sequences] == [[text + end] for text in ROW["responses"]]
    assert example.labels == {"rank": (2.0, 1.0, 2.0, 3.5)}
    prompts = build_prompts(rows_of(ROW), tokenizer, data=data_of(), max_prompt_tokens=100).prompts
    assert example.prompt == prompts[0]


def test_a_ranking_stays_one_group() -> None:
    batch = to_batch(build(make("byte-level"), ROW, ROW | {"responses": ["yes", "no"], "ranks": [1, 2]}).examples)
    assert batch.group_ids.tolist() == [0, 0, 0, 0, 1, 1]
    assert batch.labels["rank"].tolist() == [2, 1, 2, 3.5, 1, 2]


def test_a_reward_model_scores_the_last_token() -> None:
    tokenizer = make("byte-level", "chatml", eos="<|im_end|>")
    for sequence in build(tokenizer, ROW, score_last=True).examples[0].sequences:
        assert sequence.mask.sum() == 1
        assert sequence.mask[-1]
        assert sequence.tokens[-1] == tokenizer.eos_token_id


def test_an_annotator_labels_every_response() -> None:
    prepared = build(make("byte-level"), ROW | {"annotator": "b"}, ROW | {"annotator": "a"})
    assert prepared.annotators == ("a", "b")
    assert prepared.examples[0].labels["annotator"] == (1.0,) * 4


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": None}, "a column is empty: 'prompt'"),
        ({"responses": "good"}, "column 'responses' must be a list, is of type str"),
        ({"responses": ["good"], "ranks": [1]}, "column 'responses' must hold at least two"),
        ({"responses": ["good", " ", "a", "b"]}, "column 'responses': response 1 is empty"),
        ({"responses": ["good", 3, "a", "b"]}, "column 'responses': response 1 must be text"),
        ({"ranks": [1, 2]}, "column 'ranks' has 2 numbers for 4 responses"),
        ({"ranks": [1, 1, 1, 1]}, "column 'ranks': all responses have the same rank"),
        ({"ranks": [1, 2, None, 3]}, "column 'ranks': rank 2 must be a number, is None"),
        ({"responses": ["same"] * 4}, "its answers are all the same"),
    ],
)
def test_a_bad_ranking_is_told_or_skipped(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match="rankings: 1 bad of 2 rows") as caught:
        build(make("byte-level"), ROW, ROW | change)
    assert f"file.jsonl:2: {reason}" in str(caught.value)
    assert build(make("byte-level"), ROW, ROW | change, on_bad_row="skip").examples[0].row == ROW
