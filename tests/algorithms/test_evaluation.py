"""pass@k, standard errors and calibration against enumeration and plain formulas."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.algorithms.evaluation import calibration_error, length_correlation, mean_and_standard_error, pass_at_k


@given(n=st.integers(1, 7), data=st.data())
@settings(max_examples=40, deadline=None)
def test_pass_at_k_is_the_share_of_draws_with_a_passing_sample(n, data):
    passed, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    draws = list(itertools.combinations([True] * passed + [False] * (n - passed), k))
    assert pass_at_k([n], [passed], k)[0] == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_one_is_the_mean_pass_rate_with_its_error_across_prompts():
    mean, error = pass_at_k(np.array([4, 4, 8]), np.array([1, 4, 4]), 1)
    rates = [0.25, 1.0, 0.5]
    assert mean == pytest.approx(statistics.fmean(rates))
    assert error == pytest.approx(statistics.stdev(rates) / math.sqrt(3))


def test_pass_at_all_samples_asks_whether_any_passed():
    assert pass_at_k([3, 3], [0, 1], 3)[0] == 0.5


def test_many_samples_neither_overflow_nor_lose_precision():
    assert pass_at_k([100_000], [1], 10)[0] == pytest.approx(1e-4, rel=1e-12)


@given(order=st.permutations(range(4)))
@settings(max_examples=10, deadline=None)
def test_the_order_of_prompts_does_not_matter(order):
    samples, passed = np.array([5, 6, 7, 8]), np.array([0, 3, 7, 1])
    assert pass_at_k(samples[order], passed[order], 2) == pytest.approx(pass_at_k(samples, passed, 2))


@pytest.mark.parametrize(
    ("samples", "passed", "k", "message"),
    [
        ([], [], 1, "nothing to average"),
        ([4, 2], [1, 1], 3, "one has 2"),
        ([4], [1], 0, "pass@0"),
        ([4], [5], 1, "5 of 4"),
        ([4], [-1], 1, "-1 of 4"),
        ([4, 4], [1], 1, "2 prompts"),
    ],
)
def test_impossible_counts_are_refused(samples, passed, k, message):
    with pytest.raises(ValueError, match=message):
        pass_at_k(samples, passed, k)


@given(values=st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20))
@settings(max_examples=30, deadline=None)
def test_mean_and_standard_error_agree_with_their_definition(values):
    mean, error = mean_and_standard_error(values)
    assert mean == pytest.approx(statistics.fmean(values), rel=1e-9, abs=1e-9)
    assert error == pytest.approx(statistics.stdev(values) / math.sqrt(len(values)), rel=1e-6, abs=1e-6)


@given(value=st.floats(-1e6, 1e6), prompts=st.integers(2, 20))
@settings(max_examples=30, deadline=None)
def test_equal_scores_have_a_standard_error_of_exactly_zero(value, prompts):
    assert mean_and_standard_error([value] * prompts)[1] == 0.0


def test_the_error_of_one_value_is_unknown_and_of_none_refused():
    mean, error = mean_and_standard_error([2.5])
    assert mean == 2.5
    assert math.isnan(error)
    with pytest.raises(ValueError, match="nothing to average"):
        mean_and_standard_error(np.zeros(0))


@given(rows=st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=30), bins=st.integers(1, 7))
@settings(max_examples=40, deadline=None)
def test_calibration_error_agrees_with_a_loop_over_bins(rows, bins):
    edges = np.linspace(0, 1, bins + 1)
    expected = 0.0
    for index in range(bins):
        inside = [row for row in rows if edges[index] < row[0] <= edges[index + 1] or (index == 0 and row[0] == 0)]
        if inside:
            confidence, share = (statistics.fmean(column) for column in zip(*inside, strict=True))
            expected += len(inside) / len(rows) * abs(share - confidence)
    got = calibration_error([p for p, _ in rows], [came_true for _, came_true in rows], bins=bins)
    assert got == pytest.approx(expected, abs=1e-12)


@given(
    rows=st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=2, max_size=20),
    bins=st.integers(1, 12),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=40, deadline=None)
def test_the_order_of_predictions_does_not_matter_and_errors_stay_in_the_unit_interval(rows, bins, order):
    def measure(rows):
        chances, outcomes = zip(*rows, strict=True)
        return calibration_error(chances, outcomes, bins=bins), *mean_and_standard_error(chances)

    assert measure(order.sample(rows, len(rows))) == pytest.approx(measure(rows), abs=1e-12)
    assert 0 <= measure(rows)[0] <= 1


def test_calibration_error_of_the_certain_the_calibrated_and_the_wrong():
    assert calibration_error([1.0, 0.0, 1.0], [True, False, True]) == 0.0
    assert calibration_error([0.75] * 4, [1, 1, 0, 1]) == 0.0
    assert calibration_error([1.0, 0.0], [False, True]) == 1.0
    assert calibration_error([0.95, 0.95, 0.65, 0.65], [True, True, True, False]) == pytest.approx(0.1)


def test_bins_keep_errors_apart_that_would_cancel_in_one():
    chances, outcomes = [0.2, 0.8], [True, False]
    assert calibration_error(chances, outcomes, bins=1) == pytest.approx(0.0)
    assert calibration_error(chances, outcomes, bins=2) == pytest.approx(0.8)


def test_a_prediction_on_an_edge_belongs_to_the_bin_below():
    for edge in (0.1, 0.3, 0.6, 0.7):
        assert calibration_error([edge, edge - 0.05], [1, 0]) == pytest.approx(abs(1 - 2 * edge + 0.05) / 2)


@pytest.mark.parametrize(
    ("chances", "outcomes", "bins", "message"),
    [
        ([], [], 10, "one outcome per prediction"),
        ([0.5], [True, False], 10, "one outcome per prediction"),
        ([1.1], [True], 10, "must be in"),
        ([math.nan], [True], 10, "must be in"),
        ([0.5], [-1], 10, "must be in"),
        ([0.5], [True], 0, "bins"),
    ],
)
def test_impossible_predictions_are_refused(chances, outcomes, bins, message):
    with pytest.raises(ValueError, match=message):
        calibration_error(chances, outcomes, bins=bins)


def test_the_correlation_with_length_is_pearsons_over_those_that_have_a_value():
    values, lengths = np.array([1.0, 2.0, np.nan, 5.0]), np.array([10, 20, 5, 30])
    expected = np.corrcoef([1, 2, 5], [10, 20, 30])[0, 1]
    assert length_correlation(values, lengths) == pytest.approx(expected)
    assert length_correlation(np.array([0.1, 0.1, 0.1]), np.array([1, 2, 3])) == 0
    assert length_correlation(np.array([1.0, 2.0]), np.array([3, 3])) == 0
    assert length_correlation(np.array([np.nan, 2.0]), np.array([3, 4])) == 0
