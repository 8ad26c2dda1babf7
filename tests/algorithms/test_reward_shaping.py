"""The penalty for length against the paper's three cases, and rewards per token against a plain loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.algorithms.advantages import discounted_returns
from engine.algorithms.aggregate import sum_per_sample
from engine.algorithms.reward_shaping import overlong_penalty, token_rewards

number = st.floats(-5, 5)
SAMPLES = st.lists(st.tuples(number, st.lists(number, max_size=5)), max_size=6)


@given(lens=st.lists(st.integers(0, 60), max_size=8), max_len=st.integers(1, 50), fraction=st.floats(0.01, 1))
@settings(max_examples=60, deadline=None)
def test_the_penalty_has_the_three_cases_of_the_paper(lens, max_len, fraction):
    cache = max_len * fraction
    expected = []
    for n in lens:
        if n <= max_len - cache:
            expected.append(0.0)
        elif n <= max_len:
            expected.append(-((max_len - cache) - n) / cache)
        else:
            expected.append(1.0)
    got = overlong_penalty(lens, max_len=max_len, fraction=fraction)
    assert got.dtype == torch.float64
    assert got.tolist() == pytest.approx(expected, abs=1e-8)
    assert ((got >= 0) & (got <= 1)).all()


@given(max_len=st.integers(1, 10_000), fraction=st.floats(1e-6, 1))
@settings(max_examples=60, deadline=None)
def test_the_penalty_never_falls_with_length_and_is_exactly_one_from_the_limit_on(max_len, fraction):
    lens = sorted({0, max_len // 2, max_len - 1, max_len, max_len + 1, 2 * max_len})
    penalties = overlong_penalty(lens, max_len=max_len, fraction=fraction).tolist()
    assert penalties == sorted(penalties)
    assert penalties[0] == 0.0
    assert [p for n, p in zip(lens, penalties, strict=True) if n >= max_len] == [1.0] * sum(n >= max_len for n in lens)


@pytest.mark.parametrize(
    ("max_len", "fraction", "free"), [(100, 0.07, 93), (10, 0.2, 8), (2048, 0.1, 1843), (49, 1, 0)]
)
def test_up_to_where_it_begins_the_penalty_is_exactly_zero_so_that_equal_scores_stay_equal(max_len, fraction, free):
    penalties = overlong_penalty(range(free + 2), max_len=max_len, fraction=fraction).tolist()
    assert penalties[:-1] == [0.0] * (free + 1)
    assert penalties[-1] > 0


def test_lengths_may_be_a_tensor_an_array_or_a_list():
    read_only = np.array([8, 9, 10], dtype=np.int32)
    read_only.flags.writeable = False
    for lens in ([8, 9, 10], torch.tensor([8, 9, 10], dtype=torch.int32), read_only):
        assert overlong_penalty(lens, max_len=10, fraction=0.2).tolist() == pytest.approx([0.0, 0.5, 1.0])
        assert token_rewards(torch.ones(3), lens).shape == (27,)


@pytest.mark.parametrize(
    ("lens", "max_len", "fraction", "message"),
    [
        ([1], 0, 0.2, "max_len"),
        ([1], 10, 0.0, "fraction"),
        ([1], 10, 1.1, "fraction"),
        ([1], 10, math.nan, "fraction"),
        ([-1], 10, 0.2, "seq_lens"),
    ],
)
def test_a_penalty_that_cannot_be_is_refused(lens, max_len, fraction, message):
    with pytest.raises(ValueError, match=message):
        overlong_penalty(lens, max_len=max_len, fraction=fraction)


@given(samples=SAMPLES, kl_coef=number, with_kl=st.booleans())
@settings(max_examples=60, deadline=None)
def test_token_rewards_agree_with_a_plain_loop(samples, kl_coef, with_kl):
    expected = []
    for score, kls in samples:
        rewards = [-kl_coef * kl * with_kl for kl in kls]
        if rewards:
            rewards[-1] += score
        expected += rewards
    scores_B = torch.tensor([score for score, _ in samples], dtype=torch.float64)
    kl_T = torch.tensor([kl for _, kls in samples for kl in kls], dtype=torch.float64)
    lens = [len(kls) for _, kls in samples]
    got = token_rewards(scores_B, lens, kl_T, kl_coef=kl_coef) if with_kl else token_rewards(scores_B, lens)
    assert got.tolist() == pytest.approx(expected, abs=1e-12)
    assert got.dtype == torch.float64


@given(samples=SAMPLES, kl_coef=number)
@settings(max_examples=40, deadline=None)
def test_a_samples_rewards_add_up_to_its_score_less_its_kl(samples, kl_coef):
    kl_T = torch.tensor([kl for _, kls in samples for kl in kls], dtype=torch.float64)
    scores_B = torch.tensor([score for score, _ in samples], dtype=torch.float64)
    lens_B = torch.tensor([len(kls) for _, kls in samples], dtype=torch.int64)
    rewards_T = token_rewards(scores_B, lens_B, kl_T, kl_coef=kl_coef)
    expected_B = torch.where(lens_B > 0, scores_B - kl_coef * sum_per_sample(kl_T, lens_B), 0)
    torch.testing.assert_close(sum_per_sample(rewards_T, lens_B), expected_B)
    first_B = lens_B.cumsum(0)[lens_B > 0] - lens_B[lens_B > 0]
    torch.testing.assert_close(discounted_returns(rewards_T, lens_B)[first_B], expected_B[lens_B > 0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rewards_have_the_dtype_of_the_scores_carry_no_gradient_and_leave_the_inputs_alone(dtype):
    scores_B = torch.tensor([1.0, 2.0], dtype=dtype, requires_grad=True)
    kl_T = torch.tensor([0.5, -0.5, 1.0], requires_grad=True)
    got = token_rewards(scores_B, [2, 1], kl_T, kl_coef=0.5)
    assert got.dtype == dtype
    assert got.tolist() == [-0.25, 1.25, 1.5]
    assert not got.requires_grad
    assert token_rewards(scores_B, [2, 1], kl_T).tolist() == [0.0, 1.0, 2.0]
    assert scores_B.tolist() == [1.0, 2.0]
    assert kl_T.tolist() == [0.5, -0.5, 1.0]


def test_sizes_that_do_not_fit_and_a_weight_of_nothing_are_refused():
    scores_B, kl_T = torch.zeros(2), torch.zeros(3)
    for call, message in [
        (lambda: token_rewards(scores_B, [3], kl_T), "one score per sample"),
        (lambda: token_rewards(scores_B, [3]), "one score per sample"),
        (lambda: token_rewards(scores_B, [1, 1], kl_T), "add up"),
        (lambda: token_rewards(scores_B, [4, -1], kl_T), "at least 0"),
        (lambda: token_rewards(scores_B, [1, 2], kl_coef=0.1), "no kl_T"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
