"""The order of prompts."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import UserError
from engine.data.sampler import RowSampler

sizes = st.integers(1, 40)
counts = st.lists(st.integers(0, 60), max_size=12)
seeds = st.integers(0, 2**31 - 1)


@settings(max_examples=60, deadline=None)
@given(n=sizes, steps=counts, seed=seeds)
def test_every_epoch_has_every_prompt_once_however_it_is_cut(n: int, steps: list[int], seed: int) -> None:
    sampler = RowSampler(n, seed=seed)
    drawn = [index for count in steps for index in sampler.next(count)]
    assert len(drawn) == sum(steps)
    for start in range(0, len(drawn) - n + 1, n):
        assert sorted(drawn[start : start + n]) == list(range(n))
    tail = drawn[len(drawn) // n * n :]
    assert len(set(tail)) == len(tail)


@settings(max_examples=60, deadline=None)
@given(n=sizes, steps=counts, seed=seeds, count=st.integers(1, 60))
def test_the_order_does_not_depend_on_the_step_size(n: int, steps: list[int], seed: int, count: int) -> None:
    cut = RowSampler(n, seed=seed)
    drawn = [index for size in [*steps, count] for index in cut.next(size)]
    assert drawn == RowSampler(n, seed=seed).next(len(drawn))


@settings(max_examples=60, deadline=None)
@given(n=sizes, before=st.integers(0, 100), after=st.integers(1, 100), seed=seeds)
def test_a_saved_state_continues_exactly(n: int, before: int, after: int, seed: int) -> None:
    sampler = RowSampler(n, seed=seed)
    sampler.next(before)
    state = json.loads(json.dumps(sampler.state_dict()))
    resumed = RowSampler(n, seed=seed)
    resumed.load_state_dict(state)
    assert resumed.next(after) == sampler.next(after)
    assert resumed.epoch == sampler.epoch


def test_seeds_and_epochs_give_different_orders() -> None:
    sampler = RowSampler(50, seed=1)
    first, second = sampler.next(50), sampler.next(50)
    assert first != second
    assert first != RowSampler(50, seed=2).next(50)
    assert second != RowSampler(50, seed=2).next(50), "epoch 1 of seed 1 is not epoch 0 of seed 2"
    assert first != list(range(50))


def test_the_epoch_counts_up() -> None:
    sampler = RowSampler(3, seed=0)
    assert [sampler.epoch for _ in range(4) if sampler.next(2)] == [0, 1, 1, 2]


@pytest.mark.parametrize(("n", "seed", "key"), [(4, 0, "num_rows"), (5, 1, "seed")])
def test_a_state_of_other_data_or_another_seed_is_refused(n: int, seed: int, key: str) -> None:
    with pytest.raises(UserError, match=f"the checkpoint has {key}"):
        RowSampler(n, seed=seed).load_state_dict(RowSampler(5, seed=0).state_dict())


def test_no_prompts_is_an_error() -> None:
    with pytest.raises(UserError, match="no rows to sample"):
        RowSampler(0, seed=0)
