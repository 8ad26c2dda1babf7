"""KL estimators and the controllers of their weight."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.algorithms.kl import AdaptiveKL, FixedKL, kl_estimate

KINDS = ["k1", "k2", "k3"]


@pytest.mark.parametrize(
    ("kind", "formula"),
    [("k1", lambda r: -r), ("k2", lambda r: r * r / 2), ("k3", lambda r: math.exp(r) - 1 - r)],
)
def test_estimators_agree_with_schulmans_formulas_without_a_clamp(kind, formula):
    ref_T = torch.linspace(-60, 60, 25, dtype=torch.float64)
    got = kl_estimate(torch.zeros_like(ref_T), ref_T, kind)
    torch.testing.assert_close(got, torch.tensor([formula(r) for r in ref_T.tolist()], dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_agree_with_finite_differences(kind):
    logp_T = torch.tensor([-3.0, -0.5, -0.01, -2.0], dtype=torch.float64, requires_grad=True)
    ref_T = torch.tensor([-1.0, -0.5, -4.0, -2.1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: kl_estimate(a, b, kind), (logp_T, ref_T))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("upstream", [1.0, 0.0, 100.0])
def test_values_and_gradients_stay_finite_up_to_a_log_ratio_of_200(kind, dtype, upstream):
    logp_T = torch.linspace(-200, 200, 81, dtype=dtype, requires_grad=True)
    value_T = kl_estimate(logp_T, torch.zeros(81, dtype=dtype), kind)
    assert value_T.dtype == dtype
    assert value_T.isfinite().all()
    (grad_T,) = torch.autograd.grad((upstream * value_T[logp_T.detach() != 0]).sum(), logp_T)
    assert grad_T.isfinite().all()


def test_k3_pushes_a_token_back_up_even_where_its_exponential_overflows():
    logp_T = torch.tensor([-200.0, -100.0, -80.0, 100.0], requires_grad=True)
    kl_estimate(logp_T, torch.zeros(4), "k3").sum().backward()
    assert (logp_T.grad[:3] < -1e30).all()
    assert logp_T.grad[3] == 1.0


def test_k3_is_exact_close_to_zero_and_never_negative():
    r_T = torch.cat([torch.logspace(-12, 1.9, 2000), -torch.logspace(-12, 2.3, 2000)])
    k3_T = kl_estimate(torch.zeros_like(r_T), r_T, "k3")
    assert (k3_T >= 0).all()
    moderate = r_T.abs() > 1e-3
    exact = torch.expm1(r_T.double()) - r_T.double()
    torch.testing.assert_close(k3_T.double()[moderate], exact[moderate], rtol=1e-3, atol=0)


def test_k1_and_k3_average_to_the_divergence():
    policy, reference = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.2, 0.6]).double()
    divergence = (policy * (policy / reference).log()).sum()
    for kind in ("k1", "k3"):
        torch.testing.assert_close((policy * kl_estimate(policy.log(), reference.log(), kind)).sum(), divergence)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_policies_have_zero_divergence_and_inputs_are_left_alone(kind):
    logp_T = torch.tensor([-0.1, -5.0, -30.0])
    before = logp_T.clone()
    assert kl_estimate(logp_T, logp_T, kind).tolist() == [0.0, 0.0, 0.0]
    assert torch.equal(logp_T, before)


def test_unknown_kinds_and_other_sizes_are_refused():
    with pytest.raises(ValueError, match="kind must be one of"):
        kl_estimate(torch.zeros(2), torch.zeros(2), "k4")
    with pytest.raises(ValueError, match="one number per token"):
        kl_estimate(torch.zeros(2), torch.zeros(1), "k1")


def test_a_fixed_coefficient_stays():
    controller = FixedKL(0.1)
    controller.update(kl=100.0, num_steps=64)
    assert controller.value == 0.1


@pytest.mark.parametrize(
    ("kl", "factor"), [(6.0, 1.0), (6.6, 1.01), (60.0, 1.02), (math.inf, 1.02), (5.4, 0.99), (0.0, 0.98), (-3.0, 0.98)]
)
def test_an_adaptive_coefficient_moves_towards_the_target_by_a_bounded_factor(kl, factor):
    controller = AdaptiveKL(0.2, target=6.0, horizon=1000)
    controller.update(kl, num_steps=100)
    assert controller.value == pytest.approx(0.2 * factor)


@given(kls=st.lists(st.floats(-1e3, 1e3), max_size=30), target=st.floats(0.01, 100), steps=st.integers(1, 499))
@settings(max_examples=40, deadline=None)
def test_an_adaptive_coefficient_stays_positive_and_moves_towards_the_target_whatever_it_is_told(kls, target, steps):
    controller = AdaptiveKL(0.2, target, horizon=100)
    for kl in kls:
        before = controller.value
        controller.update(kl, steps)
        assert controller.value > 0
        assert (controller.value >= before) if kl >= target else (controller.value <= before)
        assert abs(controller.value / before - 1) <= 0.2 * steps / 100 + 1e-9


def test_so_many_steps_at_once_that_the_coefficient_would_turn_negative_are_refused():
    controller = AdaptiveKL(0.2, target=6.0, horizon=100)
    with pytest.raises(ValueError, match="below 5 \\* horizon"):
        controller.update(0.0, num_steps=500)
    assert controller.value == 0.2


def test_an_adaptive_coefficient_refuses_nan_and_keeps_its_value():
    controller = AdaptiveKL(0.2, 6.0, 1000)
    with pytest.raises(ValueError, match="NaN"):
        controller.update(math.nan, 100)
    assert controller.value == 0.2
    for target, horizon in [(0, 1), (1, 0), (-1, 5)]:
        with pytest.raises(ValueError, match="must be positive"):
            AdaptiveKL(0.2, target, horizon)
