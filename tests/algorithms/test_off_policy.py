"""Importance weights: levels, bounds, and that a sample's weight is bounded like a token's."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.algorithms.off_policy import importance_weights

LEVELS, MODES = ["token", "sequence", "geometric"], ["truncate", "mask"]
LENS = [2, 0, 3, 1]


def naive(log_ratios, lens, level, mode, cap, floor):
    out, start = [], 0
    for n in lens:
        sample = log_ratios[start : start + n]
        for log_ratio in sample:
            power = {"token": log_ratio, "sequence": sum(sample), "geometric": sum(sample) / n}[level]
            weight = math.exp(power)
            out.append(min(max(weight, floor), cap) if mode == "truncate" else weight * (floor <= weight <= cap))
        start += n
    return out


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("mode", MODES)
@given(lens=st.lists(st.integers(0, 5), max_size=5), seed=st.integers(0, 99), floor=st.floats(0, 1))
@settings(max_examples=20, deadline=None)
def test_weights_agree_with_a_plain_loop(level, mode, lens, seed, floor):
    generator = torch.Generator().manual_seed(seed)
    logp_T, rollout_T = torch.randn(2, sum(lens), generator=generator, dtype=torch.float64)
    got = importance_weights(logp_T, rollout_T, lens, level=level, mode=mode, cap=1.5, floor=floor)
    assert got.tolist() == pytest.approx(naive((logp_T - rollout_T).tolist(), lens, level, mode, 1.5, floor))


def test_a_masked_sample_weight_is_never_above_the_cap_though_one_of_its_tokens_is():
    logp_T, rollout_T = torch.tensor([math.log(50.0), -math.log(40.0)]), torch.zeros(2)
    for level, expected in [("sequence", 1.25), ("geometric", 1.25**0.5)]:
        got = importance_weights(logp_T, rollout_T, [2], level=level, mode="mask")
        assert got.tolist() == pytest.approx([expected] * 2, rel=1e-5)


@pytest.mark.parametrize("level", LEVELS)
def test_one_wild_sample_does_not_touch_the_others(level):
    logp_T = torch.tensor([0.1, 0.1, 300.0, -0.2])
    for mode, wild in [("truncate", 2.0), ("mask", 0.0)]:
        got = importance_weights(logp_T, torch.zeros(4), [2, 0, 1, 1], level=level, mode=mode)
        assert got[2] == wild
        assert got[3] == pytest.approx(math.exp(-0.2))


def test_masking_keeps_both_ends_and_drops_what_is_beyond():
    logp_T = torch.tensor([0.5, 0.49, 2.0, 2.01, 1.0], dtype=torch.float64).log()
    weights_T = logp_T.exp()
    got = importance_weights(
        logp_T, torch.zeros(5).double(), [5], mode="mask", floor=weights_T[0].item(), cap=weights_T[2].item()
    )
    assert got.tolist() == [weights_T[0], 0.0, weights_T[2], 0.0, 1.0]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("log_ratio", [-1e30, -200.0, 200.0, 1e30])
def test_weights_stay_within_their_bounds_for_extreme_log_ratios(level, mode, log_ratio):
    got = importance_weights(torch.full((6,), log_ratio), torch.zeros(6), LENS, level=level, mode=mode)
    assert got.tolist() == [2.0 if log_ratio > 0 and mode == "truncate" else 0.0] * 6


@pytest.mark.parametrize("level", LEVELS)
@given(seed=st.integers(0, 99), spread=st.floats(0, 200), floor=st.floats(0, 1), cap=st.floats(1, 10))
@settings(max_examples=40, deadline=None)
def test_weights_are_within_their_bounds_or_masked_and_one_of_the_two_says_how(level, seed, spread, floor, cap):
    log_ratio_T = spread * torch.randn(sum(LENS), generator=torch.Generator().manual_seed(seed))
    zeros_T = torch.zeros_like(log_ratio_T)
    options = {"level": level, "cap": cap, "floor": floor}
    truncated_T = importance_weights(log_ratio_T, zeros_T, LENS, mode="truncate", **options)
    masked_T = importance_weights(log_ratio_T, zeros_T, LENS, mode="mask", **options)
    edges = torch.tensor([floor, cap])
    assert ((truncated_T >= edges[0]) & (truncated_T <= edges[1])).all()
    assert ((masked_T == truncated_T) | ((masked_T == 0) & torch.isin(truncated_T, edges))).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_log_probs_weigh_one_detached_and_in_the_same_dtype(level, mode, dtype):
    logp_T = torch.linspace(-3, 0, 6).to(dtype).requires_grad_()
    before = logp_T.detach().clone()
    got = importance_weights(logp_T, logp_T.detach(), torch.tensor(LENS), level=level, mode=mode)
    assert got.tolist() == [1.0] * 6
    assert got.dtype == dtype
    assert not got.requires_grad
    assert torch.equal(logp_T.detach(), before)


def test_unknown_options_crossed_bounds_and_other_sizes_are_refused():
    x_T = torch.zeros(2)
    for options, message in [
        ({"level": "word"}, "level must be one of"),
        ({"mode": "clip"}, "mode must be one of"),
        ({"floor": 3.0}, "floor must not be above cap"),
    ]:
        with pytest.raises(ValueError, match=message):
            importance_weights(x_T, x_T, [2], **options)
    with pytest.raises(ValueError, match="seq_lens"):
        importance_weights(x_T, x_T, [1])
    with pytest.raises(ValueError, match="one number per token"):
        importance_weights(x_T, torch.zeros(1), [2])
