"""From components to one number: clip, gate, normalise, weight, sum; and the part that belongs to steps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.rewards.composition import Component, Composition
from engine.rewards.contract import Scores

NAN = math.nan


def scores(dropped: dict[int, str] | None = None, **components: list[Any]) -> Scores:
    """A group's components; a list as a value is one value per step."""
    size = len(next(iter(components.values())))
    steps = {n: [np.array(v, float) if isinstance(v, list) else None for v in vs] for n, vs in components.items()}
    values = {n: [sum(v) if isinstance(v, list) else v for v in vs] for n, vs in components.items()}
    return Scores(
        {name: np.array(held, np.float32) for name, held in values.items()},
        np.full(size, NAN, np.float32),
        dropped or {},
        steps=steps,
    )


def totals(components: list[Component], *groups: Scores, learn: bool = True) -> list[list[float]]:
    return [group.totals.tolist() for group in Composition(components).compose(groups, learn=learn)]


def test_the_total_is_the_weighted_sum_of_those_that_have_an_opinion():
    a, b = Component("a", 2.0), Component("b", -1.0)
    assert totals([a, b], scores(a=[1, NAN, 3], b=[1, 2, NAN])) == [[1, -2, 6]]


def test_a_sample_without_an_opinion_or_with_too_large_a_sum_is_dropped_by_name_and_never_0():
    [composed] = Composition([Component("a", 10.0)]).compose([scores(a=[1, NAN, 3e38])], learn=True)
    assert composed.dropped == {1: "no_reward", 2: "reward_overflow"}
    np.testing.assert_array_equal(composed.totals, [10, NAN, NAN])


def test_what_was_dropped_before_stays_dropped_and_is_in_no_statistic():
    held = scores({0: "reward_timeout"}, a=[100, 1, 3])
    composition = Composition([Component("a", normalize="running")])
    [composed] = composition.compose([held], learn=True)
    assert composed.dropped == {0: "reward_timeout"}
    assert math.isnan(composed.totals[0])
    assert composition.state_dict() == {"a": [2.0, 2.0, 2.0]}


def test_where_a_gate_is_shut_the_others_count_0_before_they_are_normalised():
    form, right = Component("form", 0.5, gate=True), Component("right")
    assert totals([form, right], scores(form=[1, 0, -1, NAN], right=[1, 1, 1, 1])) == [[1.5, 0, -0.5, 1]]
    normalised = Component("right", normalize="group")
    [[shut, *others]] = totals([form, normalised], scores(form=[0, 1, 1], right=[9, 9, 9]))
    assert shut < 0 < others[0] - 0.5, "who failed the gate is worst of the group, not its mean"


def test_values_are_clipped_before_anything_is_made_of_them():
    assert totals([Component("a", 2.0, clip=(-1, 1))], scores(a=[-5, 0.5, 7, NAN])) == [
        [-2, 1, 2, pytest.approx(NAN, nan_ok=True)]
    ]


def test_normalised_in_groups_each_component_has_mean_0_and_deviation_1_and_equal_values_exactly_0():
    first, second = scores(a=[0, 1, 2], b=[0.1, 0.1, 0.1]), scores(a=[10, 10, 40], b=[5, 6, 7])
    parts = [Component("a", normalize="group"), Component("b", 0.0, normalize="group")]
    got = totals(parts, first, second)
    for total, raw in zip(got, ([0, 1, 2], [10, 10, 40]), strict=True):
        np.testing.assert_allclose(total, (np.array(raw) - np.mean(raw)) / np.std(raw, ddof=1), rtol=1e-5, atol=1e-6)
    assert totals([Component("b", normalize="group")], first) == [[0, 0, 0]]


def test_normalising_first_tells_apart_what_summing_first_makes_equal():
    """GDPO, arXiv:2601.05242: (0, 1) and (0, 2) rewards give one advantage when they are summed first."""
    easy, both = scores(a=[0, 1], b=[0, 0]), scores(a=[0, 1], b=[0, 1])
    parts = [Component("a", normalize="group"), Component("b", normalize="group")]
    [first, second] = totals(parts, easy, both)
    assert second[1] == pytest.approx(2 * first[1])


@given(st.lists(st.lists(st.floats(-100, 100), min_size=1, max_size=5), min_size=2, max_size=8))
def test_running_statistics_are_those_of_all_values_seen_in_any_number_of_steps(chunks):
    composition = Composition([Component("a", normalize="running")])
    for chunk in chunks:
        composed = composition.compose([scores(a=chunk)], learn=True)
    seen = np.array([value for chunk in chunks for value in np.float32(chunk)], float)
    deviation = seen.std(ddof=1) or 1.0
    if deviation > 1e-3:
        expected = (np.float32(chunks[-1]) - seen.mean()) / deviation
        np.testing.assert_allclose(composed[0].totals, expected, rtol=1e-4, atol=1e-4)


def test_an_evaluation_is_not_normalised_and_moves_no_statistic():
    parts = [Component("a", 2.0, normalize="running"), Component("b", normalize="group")]
    composition = Composition(parts)
    composition.compose([scores(a=[1, 3], b=[0, 1])], learn=True)
    before = composition.state_dict()
    [composed] = composition.compose([scores(a=[1, 3], b=[0, 1])], learn=False)
    assert composed.totals.tolist() == [2, 7]
    assert composition.state_dict() == before


@pytest.mark.parametrize("normalize", ["none", "group", "running"])
def test_raw_totals_are_those_without_normalisation_but_with_clips_gates_and_weights(normalize):
    gate = Component("g", 0.5, gate=True)
    parts = [gate, Component("a", 2.0, clip=(-1, 1), normalize=normalize), Component("b", normalize=normalize)]
    given = scores({3: "reward_error"}, g=[1, 0, 1, 1], a=[5, 5, -5, 0], b=[NAN, 4, 3, 0])
    [composed] = Composition(parts).compose([given], learn=True)
    np.testing.assert_array_equal(composed.raw_totals, [2.5, 0, 1.5, NAN])
    assert (normalize == "none") == np.array_equal(composed.raw_totals, composed.totals, equal_nan=True)


def test_a_resumed_composition_goes_on_with_its_statistics():
    parts = [Component("a", normalize="running")]
    whole, first, second = (Composition(parts) for _ in range(3))
    whole.compose([scores(a=[1, 5])], learn=True)
    first.compose([scores(a=[1, 5])], learn=True)
    second.load_state_dict(first.state_dict())
    [expected] = whole.compose([scores(a=[7, 9])], learn=True)
    [again] = second.compose([scores(a=[7, 9])], learn=True)
    assert again.totals.tolist() == expected.totals.tolist()


@pytest.mark.parametrize("normalize", ["none", "group", "running"])
def test_steps_earn_their_share_and_differences_between_samples_are_those_of_the_totals(normalize):
    parts = [Component("p", 2.0, clip=(-1, 1), normalize=normalize), Component("o")]
    [composed] = Composition(parts).compose([scores(p=[[1, 0.5], [3, -1, 0.25], 4], o=[1, 1, 1])], learn=True)
    first, second, none = composed.step_rewards
    assert none is None
    np.testing.assert_allclose(first / first[0], [1, 0.5])
    np.testing.assert_allclose(second / first[0], [1, -1, 0.25])
    if normalize == "none":
        assert composed.totals.tolist() == [4, 1.5, 3]
        assert first.tolist() == [2, 1]


def test_steps_behind_a_shut_gate_earn_nothing():
    parts = [Component("g", 0.0, gate=True), Component("p")]
    [composed] = Composition(parts).compose([scores(g=[0, 1], p=[[1, 2], [1, 2]])], learn=True)
    assert [steps.tolist() for steps in composed.step_rewards] == [[0, 0], [1, 2]]
    assert composed.totals.tolist() == [0, 3]
