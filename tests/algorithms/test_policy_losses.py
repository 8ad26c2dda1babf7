"""Policy losses: values against plain formulas, gradients at ratio 1, clipping, and extreme log-ratios."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.algorithms.policy_losses import cispo, gspo, ppo_clip, reinforce

LENS = [2, 0, 3, 1]
LOSSES = {
    "ppo_clip": lambda logp, old, adv: ppo_clip(logp, old, adv),
    "ppo_clip with dual_clip": lambda logp, old, adv: ppo_clip(logp, old, adv, dual_clip=3.0),
    "gspo": lambda logp, old, adv: gspo(logp, old, adv, LENS),
    "cispo": lambda logp, old, adv: cispo(logp, old, adv),
    "reinforce": lambda logp, old, adv: reinforce(logp, adv),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def tensors(seed: int = 0, spread: float = 0.5, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    old_T, change_T, advantages_T = torch.randn(3, sum(LENS), generator=generator, dtype=torch.float64).to(dtype)
    return [(old_T + spread * change_T).requires_grad_(), old_T, advantages_T]


def gradient(loss_T: torch.Tensor, logp_T: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss_T.sum(), logp_T)[0]


@given(seed=st.integers(0, 999), low=st.floats(0, 0.9), high=st.floats(0, 2))
@settings(max_examples=25, deadline=None)
def test_ppo_is_the_worse_of_the_clipped_and_the_unclipped_surrogate(seed, low, high):
    logp_T, old_T, advantages_T = tensors(seed)
    got = ppo_clip(logp_T, old_T, advantages_T, clip_low=low, clip_high=high)
    rows = torch.stack([got, logp_T, old_T, advantages_T]).T.tolist()
    for loss, logp, old, advantage in rows:
        ratio = math.exp(logp - old)
        assert loss == pytest.approx(-min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage))


@pytest.mark.parametrize(
    ("ratio", "advantage", "clipped"),
    [(1.5, 1.0, True), (1.5, -1.0, False), (0.5, -1.0, True), (0.5, 1.0, False), (1.1, 1.0, False), (0.9, -1, False)],
)
def test_ppo_stops_the_gradient_only_beyond_the_bound_and_in_the_direction_of_the_advantage(ratio, advantage, clipped):
    logp_T = torch.tensor([math.log(ratio)], requires_grad=True)
    grad = gradient(ppo_clip(logp_T, torch.zeros(1), torch.tensor([float(advantage)])), logp_T)
    assert grad.item() == pytest.approx(0.0 if clipped else -ratio * advantage)


def test_ppo_bounds_are_asymmetric_when_asked():
    logp_T = torch.tensor([1.25, 0.75]).log().requires_grad_()
    grad = gradient(ppo_clip(logp_T, torch.zeros(2), torch.tensor([1.0, -1.0]), clip_high=0.28, clip_low=0.1), logp_T)
    assert grad.tolist() == pytest.approx([-1.25, 0.0])


def test_dual_clip_bounds_the_loss_of_negative_advantages_only():
    logp_T, old_T = torch.tensor([10.0, 10.0, 0.5]).log(), torch.zeros(3)
    advantages_T = torch.tensor([-2.0, 2.0, -2.0])
    assert ppo_clip(logp_T, old_T, advantages_T).tolist() == pytest.approx([20.0, -2.4, 1.6])
    assert ppo_clip(logp_T, old_T, advantages_T, dual_clip=3.0).tolist() == pytest.approx([6.0, -2.4, 1.6])
    with pytest.raises(ValueError, match="dual_clip"):
        ppo_clip(logp_T, old_T, advantages_T, dual_clip=1.0)


@given(seed=st.integers(0, 999), clip=st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_gspo_uses_the_geometric_mean_ratio_of_the_sample(seed, clip):
    logp_T, old_T, advantages_T = tensors(seed)
    got = gspo(logp_T, old_T, advantages_T, LENS, clip_low=clip, clip_high=clip)
    expected, start = [], 0
    for n in LENS:
        span = slice(start, start + n)
        s = math.exp((logp_T[span] - old_T[span]).sum().item() / max(n, 1))
        for advantage in advantages_T[span].tolist():
            expected.append(-min(s * advantage, min(max(s, 1 - clip), 1 + clip) * advantage))
        start += n
    assert got.tolist() == pytest.approx(expected)


def test_gspo_gives_each_token_its_own_gradient_scaled_by_the_sample_ratio():
    logp_T = torch.tensor([0.1, 0.3], dtype=torch.float64, requires_grad=True)
    advantages_T = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    grad = gradient(gspo(logp_T, torch.zeros(2, dtype=torch.float64), advantages_T, torch.tensor([2])), logp_T)
    assert grad.tolist() == pytest.approx([math.exp(0.2), 2 * math.exp(0.2)])


@given(seed=st.integers(0, 99), spread=st.floats(0, 30))
@settings(max_examples=25, deadline=None)
def test_gspo_of_one_token_samples_is_ppo(seed, spread):
    logp_T, old_T, advantages_T = tensors(seed, spread)
    ppo = ppo_clip(logp_T, old_T, advantages_T)
    sequence = gspo(logp_T, old_T, advantages_T, [1] * len(logp_T), clip_low=0.2, clip_high=0.2)
    torch.testing.assert_close(sequence, ppo)
    torch.testing.assert_close(gradient(sequence, logp_T), gradient(ppo, logp_T))


BOUNDS = {"seed": st.integers(0, 999), "spread": st.floats(0, 200), "low": st.floats(0, 0.9), "high": st.floats(0, 3)}


@pytest.mark.parametrize("surrogate", ["ppo_clip", "gspo"])
@given(**BOUNDS)
@settings(max_examples=40, deadline=None)
def test_a_clipped_surrogate_promises_no_more_than_its_bounds_and_stops_the_gradient_beyond(
    surrogate, seed, spread, low, high
):
    logp_T, old_T, advantages_T = tensors(seed, spread)
    clips = {"clip_low": low, "clip_high": high}
    log_ratio_T = logp_T.detach() - old_T
    if surrogate == "ppo_clip":
        loss_T = ppo_clip(logp_T, old_T, advantages_T, **clips)
    else:
        loss_T = gspo(logp_T, old_T, advantages_T, LENS, **clips)
        log_ratio_T = torch.cat([x.mean().expand(len(x)) for x in log_ratio_T.split(LENS)])
    ratio_T = log_ratio_T.clamp(-20, 20).exp()
    promised_T = advantages_T * torch.where(advantages_T > 0, 1 + high, 1 - low).double()
    assert (-loss_T <= promised_T + 1e-5).all()
    stopped_T = torch.where(advantages_T > 0, ratio_T > 1 + high, ratio_T < 1 - low)
    assert (gradient(loss_T, logp_T)[stopped_T] == 0).all()


@given(**BOUNDS, dual=st.floats(1.1, 5))
@settings(max_examples=40, deadline=None)
def test_dual_clip_and_cispo_bound_what_one_token_can_weigh(seed, spread, low, high, dual):
    logp_T, old_T, advantages_T = tensors(seed, spread)
    loss_T = ppo_clip(logp_T, old_T, advantages_T, clip_low=low, clip_high=high, dual_clip=dual)
    assert (loss_T <= dual * advantages_T.abs() + 1e-9).all()
    assert (gradient(loss_T, logp_T).abs() <= max(dual, 1 + high) * advantages_T.abs() + 1e-9).all()
    weight_T = gradient(cispo(logp_T, old_T, advantages_T, clip_low=low, clip_high=high), logp_T) / -advantages_T
    assert ((weight_T >= 1 - low - 1e-9) & (weight_T <= 1 + high + 1e-9)).all()


@given(seed=st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_cispo_weighs_every_token_by_the_clamped_ratio_and_clips_no_gradient(seed):
    logp_T, old_T, advantages_T = tensors(seed, spread=2.0)
    loss_T = cispo(logp_T, old_T, advantages_T, clip_low=0.5, clip_high=0.28)
    weight_T = (logp_T - old_T).exp().clamp(0.5, 1.28).detach()
    torch.testing.assert_close(loss_T, -weight_T * advantages_T * logp_T)
    torch.testing.assert_close(gradient(loss_T, logp_T), -weight_T * advantages_T)


@every_loss
def test_at_ratio_one_the_gradient_is_that_of_reinforce(loss):
    logp_T, _, advantages_T = tensors()
    grad = gradient(loss(logp_T, logp_T, advantages_T), logp_T)
    torch.testing.assert_close(grad, -advantages_T, rtol=1e-14, atol=0)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("log_ratio", [-1e30, -200.0, -100.0, -20.5, 20.5, 88.0, 100.0, 200.0, 1e30])
@pytest.mark.parametrize("advantage", [-5.0, 0.0, 5.0])
def test_loss_and_gradient_stay_finite_for_extreme_log_ratios(loss, dtype, log_ratio, advantage):
    logp_T = torch.full((sum(LENS),), log_ratio, dtype=dtype, requires_grad=True)
    loss_T = loss(logp_T, torch.zeros(sum(LENS), dtype=dtype), torch.full((sum(LENS),), advantage, dtype=dtype))
    assert loss_T.isfinite().all()
    assert gradient(loss_T, logp_T).isfinite().all()


@every_loss
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_is_kept_inputs_are_left_alone_and_only_logp_gets_a_gradient(loss, dtype):
    inputs = tensors(dtype=dtype)
    before = [t.detach().clone() for t in inputs]
    for tensor in inputs:
        tensor.requires_grad_()
    loss_T = loss(*inputs)
    loss_T.sum().backward()
    assert loss_T.dtype == dtype
    assert all(torch.equal(a.detach(), b) for a, b in zip(inputs, before, strict=True))
    assert inputs[0].grad is not None
    assert [t.grad for t in inputs[1:]] == [None, None]


@every_loss
def test_one_advantage_for_all_tokens_is_refused_not_broadcast(loss):
    logp_T, old_T, _ = tensors()
    with pytest.raises(ValueError, match="one number per token"):
        loss(logp_T, old_T, torch.ones(1))
