"""Examples: how rows are collected, and how examples become a batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.config import UserError
from engine.data.examples import (
    Example,
    PreparedExamples,
    TokenSequence,
    collect_examples,
    read_number,
    to_batch,
)
from engine.data.prompts import Prompt, RowError
from engine.data.sources import Rows
from tests.data.tokenizer_families import data_of


def sequence(*tokens: int, masked: tuple[int, ...]) -> TokenSequence:
    return TokenSequence(np.array(tokens, np.int32), np.isin(np.arange(len(tokens)), masked))


FIRST, SECOND, THIRD = (
    sequence(1, 2, 3, masked=(1, 2)),
    sequence(4, 5, masked=(1,)),
    sequence(6, 7, 8, 9, masked=(2,)),
)


def test_a_batch_holds_the_sequences_in_order() -> None:
    batch = to_batch([Example((FIRST, SECOND), {"rank": (1, 2)}, {}), Example((THIRD,), {"rank": (0.5,)}, {})])
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert batch.seq_lens.tolist() == [3, 2, 4]
    assert batch.loss_mask.tolist() == [False, True, True, False, True, False, False, True, False]
    assert batch.group_ids.tolist() == [0, 0, 1]
    assert batch.sample_ids.tolist() == [0, 1, 2]
    assert batch.labels["rank"].tolist() == [1, 2, 0.5]
    assert batch.labels["rank"].dtype == np.float32
    assert (batch.tokens.dtype, batch.seq_lens.dtype, batch.loss_mask.dtype) == (np.int32, np.int32, bool)
    assert not batch.annotations


def test_token_labels_become_an_annotation() -> None:
    labels = [np.array([0, 0.5, 1]), np.array([0, 1])]
    examples = [Example((s,), {}, {}, token_labels=(v,)) for s, v in zip((FIRST, SECOND), labels, strict=True)]
    batch = to_batch(examples)
    assert batch.annotations["labels"].tolist() == [0, 0.5, 1, 0, 1]
    assert batch.annotations["labels"].dtype == np.float32


def test_examples_with_other_labels_do_not_share_a_batch() -> None:
    with pytest.raises(AssertionError, match="the same labels"):
        to_batch([Example((FIRST,), {"rank": (1,)}, {}), Example((SECOND,), {}, {})])


def collect(rows: list[Any], limit: int = 10, skipped: tuple[str, ...] = (), **settings: Any) -> PreparedExamples:
    """Rows are their own sequence, all but the first token masked; a text is the reason of an error."""

    def build(row: dict[str, Any]) -> list[Example]:
        if isinstance(row["tokens"], str):
            raise RowError(row["tokens"])
        n = len(row["tokens"])
        only = sequence(*row["tokens"], masked=tuple(range(row.get("from", 1), n)))
        return [Example((only,), {}, row, Prompt(tuple(row["tokens"][: row.get("from", 1)]), "x", row))]

    score_last = settings.pop("score_last", False)
    places = [f"f:{i}" for i in range(1, len(rows) + 1)]
    return collect_examples(
        Rows(rows, places, list(skipped)),
        build,
        what="things",
        data=data_of(**settings),
        max_length=limit,
        score_last=score_last,
    )


def test_all_bad_rows_are_told_at_once() -> None:
    with pytest.raises(UserError) as caught:
        collect([{"tokens": "odd"}, {"tokens": [1, 2]}, {"tokens": "even"}])
    assert "things: 2 bad of 3 rows" in str(caught.value)
    assert "\n  f:1: odd\n  f:3: even" in str(caught.value)


def test_all_long_rows_are_told_at_once() -> None:
    with pytest.raises(UserError) as caught:
        collect([{"tokens": [1] * 5}] * 12 + [{"tokens": [1, 2]}], limit=4)
    assert str(caught.value).startswith(
        "12 of 13 things are too long; shorten them, raise training.max_length, or set "
    )
    assert "\n  f:1: 5 tokens, the limit is 4\n" in str(caught.value)
    assert str(caught.value).endswith("\n  ... and 2 more")


def test_reasons_of_skipped_rows_are_kept_in_order() -> None:
    rows = [{"tokens": [1] * 5}, {"tokens": "odd"}, {"tokens": [1, 2]}]
    prepared = collect(rows, limit=4, skipped=("f:0: unreadable",), on_bad_row="skip", on_long_row="skip")
    assert prepared.skipped == ["f:0: unreadable", "f:1: 5 tokens, the limit is 4", "f:2: odd"]
    assert [e.row for e in prepared.examples] == [{"tokens": [1, 2]}]


def test_skipping_bad_rows_does_not_skip_long_ones() -> None:
    with pytest.raises(UserError, match="1 of 2 things are too long"):
        collect([{"tokens": [1] * 5}, {"tokens": [1, 2]}], limit=4, on_bad_row="skip")
    with pytest.raises(UserError, match="things: 1 bad of 2 rows"):
        collect([{"tokens": "odd"}, {"tokens": [1, 2]}], limit=4, on_long_row="skip")


def test_the_cut_is_at_the_end() -> None:
    (example,) = collect([{"tokens": [1, 2, 3, 4, 5]}], limit=3, on_long_row="truncate").examples
    assert example.sequences[0].tokens.tolist() == [1, 2, 3]
    assert example.sequences[0].mask.tolist() == [False, True, True]
    assert example.prompt.token_ids == (1,)


def test_a_row_without_masked_tokens_is_bad() -> None:
    with pytest.raises(UserError, match="f:1: an answer gives no tokens"):
        collect([{"tokens": [1, 2], "from": 2}])
    with pytest.raises(UserError, match="f:1: cut to 2 tokens, nothing is left of an answer"):
        collect([{"tokens": [1, 2, 3], "from": 2}], limit=2, on_long_row="truncate")


def test_scoring_the_last_token_comes_after_the_cut() -> None:
    (example,) = collect([{"tokens": [1, 2, 3, 4]}], limit=3, on_long_row="truncate", score_last=True).examples
    assert example.sequences[0].tokens.tolist() == [1, 2, 3]
    assert example.sequences[0].mask.tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("value", "number"), [(1, 1.0), (0.5, 0.5), (True, 1.0), ("2.5", 2.5), ("FALSE", 0.0), (np.bool_(True), 1.0)]
)
def test_numbers_are_read_from_what_files_hold(value: Any, number: float) -> None:
    assert read_number(value, "it") == number


@pytest.mark.parametrize("value", [None, "much", [], float("inf"), "nan", {}])
def test_what_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(RowError, match="it must be a number, is "):
        read_number(value, "it")
