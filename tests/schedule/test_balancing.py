from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.schedule.balancing import cost_of, plan_microbatches


@settings(max_examples=200, deadline=None)
@given(
    lens=st.lists(st.integers(1, 64), max_size=60),
    ranks=st.integers(1, 5),
    budget=st.integers(64, 256),
)
def test_every_sample_is_run_once_within_the_budget_and_in_equally_many_passes(lens, ranks, budget):
    plan = plan_microbatches(lens, ranks=ranks, token_budget=budget)
    assert sorted(i for share in plan for micro in share for i in micro) == list(range(len(lens)))
    assert all(sum(lens[i] for i in micro) <= budget for share in plan for micro in share)
    assert len(plan) == ranks
    assert len({len(share) for share in plan}) == 1


def test_ranks_share_cost_rather_than_count():
    lens = [1000] + [10] * 100
    costs = [cost_of(length, hidden_size=64) for length in lens]
    [long, short] = plan_microbatches(lens, ranks=2, token_budget=1000, costs=costs)
    assert [i for micro in long for i in micro] == [0]
    assert len([i for micro in short for i in micro]) == 100


def test_a_rank_without_samples_gets_empty_passes():
    plan = plan_microbatches([5], ranks=3, token_budget=8)
    assert plan == [[[0]], [[]], [[]]]


def test_a_sample_over_the_budget_is_refused():
    with pytest.raises(ValueError, match="a sample of 9 tokens exceeds the budget of 8"):
        plan_microbatches([3, 9], ranks=1, token_budget=8)
