"""Ragged batches."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.batch import SAMPLE_FIELDS, TOKEN_FIELDS, Batch


def make(shapes: list[tuple[int, int]]) -> Batch:
    """Samples of (prompt tokens, response tokens); every token has its own value."""
    lens = np.array([p + r for p, r in shapes], np.int32)
    total = int(lens.sum())
    mask = [flag for p, r in shapes for flag in [False] * p + [True] * r]
    ids = np.arange(len(shapes), dtype=np.int64)
    return Batch(
        tokens=np.arange(total, dtype=np.int32),
        seq_lens=lens,
        loss_mask=np.array(mask, bool),
        rollout_logp=-np.arange(total, dtype=np.float32),
        version=np.where(mask, 3, -1).astype(np.int32),
        group_ids=ids // 2,
        sample_ids=ids,
        totals=ids.astype(np.float32) * 2,
        rewards={"correct": ids.astype(np.float32)},
        annotations={"advantages": np.arange(total, dtype=np.float32) * mask},
    )


def samples(batch: Batch) -> list[dict[str, list[float]]]:
    """Sample by sample, the slow and obvious way."""
    out, start = [], 0
    for i, n in enumerate(batch.seq_lens.tolist()):
        span = slice(start, start + n)
        sample = {name: getattr(batch, name)[span].tolist() for name in TOKEN_FIELDS}
        sample |= {name: values[span].tolist() for name, values in batch.annotations.items()}
        sample |= {name: [getattr(batch, name)[i]] for name in SAMPLE_FIELDS}
        sample |= {name: [values[i]] for name, values in batch.rewards.items()}
        out.append(sample)
        start += n
    return out


shapes = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 4)), min_size=1, max_size=6)


@settings(max_examples=80, deadline=None)
@given(shapes=shapes, data=st.data())
def test_select_takes_whole_samples_in_the_order_asked(shapes: list[tuple[int, int]], data: st.DataObject) -> None:
    batch = make(shapes)
    chosen = data.draw(st.lists(st.integers(0, len(shapes) - 1), max_size=8))
    selected = batch.select(chosen)
    assert samples(selected) == [samples(batch)[i] for i in chosen]
    for name in (*TOKEN_FIELDS, *SAMPLE_FIELDS):
        assert getattr(selected, name).dtype == getattr(batch, name).dtype, name


@settings(max_examples=80, deadline=None)
@given(shapes=shapes)
def test_response_lens_count_the_trained_tokens(shapes: list[tuple[int, int]]) -> None:
    assert make(shapes).response_lens.tolist() == [r for _, r in shapes]


def test_selecting_nothing_gives_an_empty_batch() -> None:
    empty = make([(2, 1)]).select([])
    assert (len(empty), len(empty.tokens), empty.response_lens.tolist()) == (0, 0, [])
    assert empty.tokens.dtype == np.int32


def test_observation_tokens_in_the_middle_are_not_counted() -> None:
    batch = dataclasses.replace(make([(1, 4), (2, 2)]), loss_mask=np.array([0, 1, 0, 0, 1, 0, 0, 1, 1], bool))
    assert batch.response_lens.tolist() == [2, 2]


@pytest.mark.parametrize("name", TOKEN_FIELDS)
def test_a_token_array_of_the_wrong_length_is_refused(name: str) -> None:
    batch = make([(2, 1), (1, 1)])
    with pytest.raises(AssertionError, match=f"{name} has 4 tokens, not 5"):
        dataclasses.replace(batch, **{name: getattr(batch, name)[:-1]})


def test_a_sample_array_of_the_wrong_length_is_refused() -> None:
    batch = make([(2, 1), (1, 1)])
    with pytest.raises(AssertionError, match="group_ids has 1 samples, not 2"):
        dataclasses.replace(batch, group_ids=batch.group_ids[:1])
    with pytest.raises(AssertionError, match="correct has 3 samples, not 2"):
        dataclasses.replace(batch, rewards={"correct": np.zeros(3, np.float32)})
    with pytest.raises(AssertionError, match="ref_logp has 3 tokens, not 5"):
        batch.annotate(ref_logp=np.zeros(3, np.float32))


def test_annotating_adds_to_the_batch_and_leaves_the_original() -> None:
    batch = make([(2, 1), (1, 1)])
    annotated = batch.annotate(ref_logp=np.ones(5, np.float32))
    assert sorted(annotated.annotations) == ["advantages", "ref_logp"]
    assert sorted(batch.annotations) == ["advantages"]
