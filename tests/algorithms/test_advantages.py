"""Advantage estimators against plain float64 loops, and the corner cases that peers got wrong."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.algorithms.advantages import discounted_returns, gae, group_relative, leave_one_out, whiten

LENS = st.lists(st.integers(0, 9), min_size=1, max_size=6)
UNIT = st.floats(0, 1)


def random(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def naive_gae(rewards, values, lens, gamma, lam, bootstrap):
    advantages, start = [0.0] * sum(lens), 0
    for n, after_last in zip(lens, bootstrap, strict=True):
        carried, next_value = 0.0, after_last
        for t in reversed(range(start, start + n)):
            carried = rewards[t] + gamma * next_value - values[t] + gamma * lam * carried
            advantages[t], next_value = carried, values[t]
        start += n
    return advantages


@given(lens=LENS, gamma=UNIT, lam=UNIT, ends=st.booleans())
@settings(max_examples=40, deadline=None)
def test_gae_agrees_with_a_plain_loop(lens, gamma, lam, ends):
    rewards_T, values_T = random(sum(lens), 1), random(sum(lens), 2)
    bootstrap = None if ends else random(len(lens), 3)
    advantages_T, returns_T = gae(rewards_T, values_T, lens, gamma=gamma, lam=lam, bootstrap=bootstrap)
    tails = [0.0] * len(lens) if ends else bootstrap.tolist()
    expected = torch.tensor(
        naive_gae(rewards_T.tolist(), values_T.tolist(), lens, gamma, lam, tails), dtype=torch.float64
    )
    torch.testing.assert_close(advantages_T, expected)
    torch.testing.assert_close(returns_T, expected + values_T)


@given(lens=LENS, gamma=UNIT)
@settings(max_examples=25, deadline=None)
def test_discounted_returns_are_gae_with_zero_values_and_lambda_one(lens, gamma):
    rewards_T = random(sum(lens))
    expected = naive_gae(rewards_T.tolist(), [0.0] * sum(lens), lens, gamma, 1.0, [0.0] * len(lens))
    got = discounted_returns(rewards_T, lens, gamma=gamma)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


def test_the_bootstrap_value_enters_the_last_delta_and_the_returns():
    advantages_T, returns_T = gae(
        torch.zeros(2), torch.zeros(2), [2], gamma=0.5, lam=1.0, bootstrap=torch.tensor([8.0])
    )
    assert advantages_T.tolist() == [2.0, 4.0]
    assert returns_T.tolist() == [2.0, 4.0]


def test_samples_do_not_leak_into_each_other():
    rewards_T = torch.tensor([1.0, float("nan"), 1.0])
    assert discounted_returns(rewards_T, [1, 1, 1])[[0, 2]].tolist() == [1.0, 1.0]


def test_a_long_sample_keeps_its_precision():
    n = 5000
    got = discounted_returns(torch.full((n,), 0.1), [n], gamma=1.0)
    torch.testing.assert_close(got.double(), 0.1 * torch.arange(n, 0, -1, dtype=torch.float64), rtol=1e-5, atol=0)


def test_gae_refuses_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="one reward per value"):
        gae(torch.zeros(1), torch.zeros(2), [2])
    with pytest.raises(ValueError, match="bootstrap"):
        gae(torch.zeros(2), torch.zeros(2), [2], bootstrap=torch.zeros(2))
    with pytest.raises(ValueError, match="seq_lens"):
        gae(torch.zeros(2), torch.zeros(2), [3])


def naive_group(scores, ids, scale, eps=1e-6):
    out = []
    for score, group in zip(scores, ids, strict=True):
        members = [s for s, g in zip(scores, ids, strict=True) if g == group]
        deviation = score - statistics.fmean(members)
        if max(members) == min(members):
            out.append(0.0)
        elif scale == "none":
            out.append(deviation)
        elif scale == "loo":
            out.append(score - (sum(members) - score) / (len(members) - 1))
        else:
            out.append(deviation / (statistics.stdev(members if scale == "std" else scores) + eps))
    return torch.tensor(out, dtype=torch.float64)


def estimate(scores_B, ids, scale):
    return leave_one_out(scores_B, ids) if scale == "loo" else group_relative(scores_B, ids, scale=scale)


SCALES = ["std", "none", "batch", "loo"]
GROUPED = st.lists(st.tuples(st.sampled_from([0.0, 0.1, 1 / 3, 1.0, -2.5]), st.sampled_from([-7, 0, 3, 10**12])))


@pytest.mark.parametrize("scale", SCALES)
@given(rows=GROUPED, rotate=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_group_estimators_agree_with_a_plain_loop_in_any_order_of_samples(scale, rows, rotate):
    rows = rows[rotate:] + rows[:rotate]
    scores, ids = [s for s, _ in rows], [g for _, g in rows]
    got = estimate(torch.tensor(scores, dtype=torch.float64), ids, scale)
    torch.testing.assert_close(got, naive_group(scores, ids, scale), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale", SCALES)
def test_relabelled_groups_give_the_same_advantages(scale):
    scores_B = random(6)
    ids_B = torch.tensor([1, 2, 1, 2, 5, 5])
    assert torch.equal(estimate(scores_B, ids_B, scale), estimate(scores_B, -100 * ids_B, scale))
    assert torch.equal(estimate(scores_B, ids_B, scale), estimate(scores_B, ids_B.tolist(), scale))
    assert torch.equal(estimate(scores_B, ids_B, scale), estimate(scores_B, ids_B.numpy(), scale))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, 0.3, 1 / 3, 0.7, 1e6 + 0.1])
def test_equal_scores_that_are_no_binary_fraction_give_exactly_zero(scale, dtype, value):
    scores_B = torch.tensor([value] * 7 + [0.0, 1.0], dtype=dtype)
    got = estimate(scores_B, [4] * 7 + [2, 2], scale)
    assert got[:7].tolist() == [0.0] * 7
    assert got[7] < 0 < got[8]


def test_equal_scores_give_zero_even_without_eps():
    assert group_relative(torch.tensor([0.1, 0.1, 0.1]), [0, 0, 0], eps=0.0).tolist() == [0.0] * 3


@pytest.mark.parametrize("scale", SCALES)
def test_a_group_of_one_sample_gets_zero(scale):
    assert estimate(torch.tensor([5.0]), [3], scale).tolist() == [0.0]
    assert estimate(torch.tensor([5.0, 1.0, 2.0]), [3, 4, 4], scale)[0] == 0.0
    assert estimate(torch.zeros(0), [], scale).tolist() == []


def test_group_advantages_are_standardised_with_the_unbiased_deviation():
    got = group_relative(torch.tensor([0.0, 1.0], dtype=torch.float64), [0, 0])
    assert got.tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5], abs=1e-5)


def test_unknown_scales_and_missing_ids_are_refused():
    with pytest.raises(ValueError, match="scale must be one of"):
        group_relative(torch.zeros(2), [0, 0], scale="mean")
    with pytest.raises(ValueError, match="group_ids"):
        leave_one_out(torch.zeros(2), [0])


@given(values=st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=20), seed=st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_whitening_agrees_with_its_definition_in_any_order(values, seed):
    x_T = torch.tensor(values, dtype=torch.float64)
    mean, variance = statistics.fmean(values), statistics.variance(values)
    expected = torch.tensor([(v - mean) / (variance + 1e-8) ** 0.5 for v in values], dtype=torch.float64)
    torch.testing.assert_close(whiten(x_T), expected, rtol=1e-6, atol=1e-8)
    order = np.random.default_rng(seed).permutation(len(values))
    torch.testing.assert_close(whiten(x_T[order]), expected[order], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("values", [[], [3.0], [12345.678] * 1001, [0.1] * 1000])
def test_whitening_one_element_or_equal_elements_gives_zero(values):
    assert whiten(torch.tensor(values)).tolist() == [0.0] * len(values)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_results_keep_the_dtype_carry_no_gradient_and_leave_the_inputs_alone(dtype):
    x_T = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=dtype, requires_grad=True)
    other_T, tail_B = torch.ones(4, dtype=dtype), torch.ones(2, dtype=dtype)
    before = x_T.detach().clone()
    results = [
        *gae(x_T, other_T, [1, 3], gamma=0.9, lam=0.9, bootstrap=tail_B),
        discounted_returns(x_T, [1, 3]),
        whiten(x_T),
        leave_one_out(x_T, [0, 0, 1, 1]),
        *(group_relative(x_T, [0, 0, 1, 1], scale=scale) for scale in ("std", "none", "batch")),
    ]
    assert [r.dtype for r in results] == [dtype] * len(results)
    assert not any(r.requires_grad for r in results)
    assert torch.equal(x_T.detach(), before)
    assert other_T.tolist() == [1] * 4
    assert tail_B.tolist() == [1] * 2
