"""Advantage estimators against plain float64 loops, and the corner cases that peers got wrong."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.algorithms.advantages import (
    best_and_worst,
    best_of_n,
    discounted_returns,
    gae,
    group_relative,
    leave_one_out,
    step_relative,
    whiten,
)

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


@given(
    masks=st.lists(st.lists(st.booleans(), max_size=9), min_size=1, max_size=5),
    gamma=UNIT,
    lam=UNIT,
    ends=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_gae_does_not_decay_across_tool_tokens(masks, gamma, lam, ends):
    """The reference runs over padded rows, tool tokens included, and passes over what is not the policy's."""
    width = max(map(len, masks))
    mask_BL = torch.tensor([mask + [False] * (width - len(mask)) for mask in masks], dtype=torch.bool)
    rewards_BL, values_BL = random(mask_BL.numel(), 1).view_as(mask_BL), random(mask_BL.numel(), 2).view_as(mask_BL)
    bootstrap = torch.zeros(len(masks)).double() if ends else random(len(masks), 3)
    carried_B, next_B, expected_BL = torch.zeros_like(bootstrap), bootstrap, torch.zeros_like(rewards_BL)
    for t in reversed(range(width)):
        ours_B = mask_BL[:, t]
        delta_B = rewards_BL[:, t] + gamma * next_B - values_BL[:, t]
        carried_B = torch.where(ours_B, delta_B + gamma * lam * carried_B, carried_B)
        next_B = torch.where(ours_B, values_BL[:, t], next_B)
        expected_BL[:, t] = carried_B
    got, _ = gae(rewards_BL[mask_BL], values_BL[mask_BL], mask_BL.sum(1), gamma=gamma, lam=lam, bootstrap=bootstrap)
    torch.testing.assert_close(got, expected_BL[mask_BL])


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
        elif scale == "best":
            out.append((score == max(members)) / members.count(max(members)))
        elif scale == "loo":
            out.append(score - (sum(members) - score) / (len(members) - 1))
        else:
            out.append(deviation / (statistics.stdev(members if scale == "std" else scores) + eps))
    return torch.tensor(out, dtype=torch.float64)


def estimate(scores_B, ids, scale):
    others = {"loo": leave_one_out, "best": best_of_n}
    return others[scale](scores_B, ids) if scale in others else group_relative(scores_B, ids, scale=scale)


SCALES = ["std", "none", "batch", "loo", "best"]
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
    assert got[7] <= 0 < got[8]


@pytest.mark.parametrize("scale", SCALES)
@given(
    groups=st.lists(st.tuples(st.floats(-1e6, 1e6), st.integers(1, 9)), min_size=1, max_size=4),
    order=st.randoms(use_true_random=False),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
@settings(max_examples=40, deadline=None)
def test_groups_without_a_difference_get_exactly_zero_whatever_else_is_in_the_batch(scale, groups, order, dtype):
    rows = [(value, index) for index, (value, size) in enumerate(groups) for _ in range(size)]
    order.shuffle(rows)
    got = estimate(torch.tensor([value for value, _ in rows], dtype=dtype), [index for _, index in rows], scale)
    assert got.tolist() == [0.0] * len(rows)


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


@given(rows=GROUPED)
@settings(max_examples=60, deadline=None)
def test_best_and_worst_are_the_first_of_each_group_with_a_difference_in_the_order_of_the_groups(rows):
    expected = []
    for group in dict.fromkeys(g for _, g in rows):
        members = [i for i, (_, g) in enumerate(rows) if g == group]
        best, worst = (pick(members, key=lambda i: rows[i][0]) for pick in (max, min))  # both take the first
        expected += [[best, worst]] if rows[best][0] > rows[worst][0] else []
    scores, ids = [s for s, _ in rows], [g for _, g in rows]
    for given_ids in (ids, torch.tensor(ids, dtype=torch.int64), np.array(ids, dtype=np.int64)):
        got = best_and_worst(torch.tensor(scores, dtype=torch.float64), given_ids)
        assert (got.dtype, got.shape) == (torch.int64, (len(expected), 2))
        assert got.tolist() == expected


@given(
    scores=st.lists(st.integers(-99, 99), min_size=1, max_size=12, unique=True), order=st.randoms(use_true_random=False)
)
@settings(max_examples=40, deadline=None)
def test_the_same_answers_make_the_pairs_in_any_order_of_samples(scores, order):
    def pairs(rows):
        found = best_and_worst(torch.tensor([float(s) for s, _ in rows]), [g for _, g in rows])
        return {(rows[best], rows[worst]) for best, worst in found.tolist()}

    rows = [(score, abs(score) % 3) for score in scores]
    assert pairs(order.sample(rows, len(rows))) == pairs(rows)


def test_many_ties_for_the_best_share_its_weight_in_any_dtype():
    got = best_of_n(torch.tensor([1.0] * 300 + [0.0], dtype=torch.bfloat16), [0] * 301)  # bfloat16 counts to 256 only
    assert got.tolist() == [torch.tensor(1 / 300, dtype=torch.bfloat16).item()] * 300 + [0.0]


def test_unknown_scales_and_missing_ids_are_refused():
    for pick in (best_of_n, best_and_worst):
        with pytest.raises(ValueError, match="group_ids"):
            pick(torch.zeros(2), [0])
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
        best_of_n(x_T, [0, 0, 1, 1]),
        *(group_relative(x_T, [0, 0, 1, 1], scale=scale) for scale in ("std", "none", "batch")),
    ]
    assert [r.dtype for r in results] == [dtype] * len(results)
    assert not any(r.requires_grad for r in results)
    assert torch.equal(x_T.detach(), before)
    assert other_T.tolist() == [1] * 4
    assert tail_B.tolist() == [1] * 2


def test_step_rewards_are_normalised_among_all_steps_of_a_group_and_summed_from_the_end():
    """Two solutions of one prompt, with steps of 2 + 1 and 3 tokens: DeepSeekMath, section 4.1.3, by hand."""
    rewards_T = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 2.0], dtype=torch.float64)
    ends_T = torch.tensor([False, True, True, False, False, True])
    steps = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    first, second, third = ((steps - steps.mean()) / (steps.std() + 1e-6)).tolist()
    expected = [first + second, first + second, second, third, third, third]
    got = step_relative(rewards_T, ends_T, [3, 3], [5, 5])
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


@given(st.integers(0, 1000))
def test_without_marked_steps_it_is_the_group_relative_advantage_at_every_token(seed):
    random = torch.Generator().manual_seed(seed)
    lens = torch.randint(1, 5, (6,), generator=random)
    rewards_T = torch.randn(int(lens.sum()), generator=random, dtype=torch.float64)
    ids = torch.tensor([3, 3, 3, 8, 8, 9])
    got = step_relative(rewards_T, torch.zeros(len(rewards_T)), lens, ids)
    scores_B = torch.stack([part.sum() for part in rewards_T.split(lens.tolist())])
    expected = torch.repeat_interleave(group_relative(scores_B, ids), lens)
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)
