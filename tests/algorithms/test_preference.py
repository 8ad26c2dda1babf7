"""Preference losses: values against plain formulas in float64, limits, and extreme margins."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.algorithms.preference import dpo, kto, orpo, simpo

N = 6
DESIRABLE = torch.tensor([True, False, True, True, False, False])
LOSSES = {
    "sigmoid": lambda c, r, rc, rr: dpo(c, r, rc, rr),
    "conservative": lambda c, r, rc, rr: dpo(c, r, rc, rr, label_smoothing=0.1),
    "robust": lambda c, r, rc, rr: dpo(c, r, rc, rr, kind="robust", label_smoothing=0.1),
    "hinge": lambda c, r, rc, rr: dpo(c, r, rc, rr, kind="hinge"),
    "ipo": lambda c, r, rc, rr: dpo(c, r, rc, rr, kind="ipo"),
    "kto": lambda c, r, rc, rr: kto(c, rc, DESIRABLE, 1.0) + kto(r, rr, ~DESIRABLE, torch.tensor(0.0)),
    "orpo": lambda c, r, rc, rr: orpo(c, r),
    "simpo": lambda c, r, rc, rr: simpo(c, r),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def logps(seed: int = 0, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Chosen and rejected log-probs of the policy, then of the reference."""
    generator = torch.Generator().manual_seed(seed)
    return list((-3 * torch.rand(4, N, generator=generator, dtype=torch.float64) - 0.01).to(dtype))


def log_sigmoid(x: float) -> float:
    return math.log(1 / (1 + math.exp(-x)))


def plain_dpo(kind: str, m: float, beta: float, e: float) -> float:
    return {
        "sigmoid": -(1 - e) * log_sigmoid(beta * m) - e * log_sigmoid(-beta * m),
        "robust": (-(1 - e) * log_sigmoid(beta * m) + e * log_sigmoid(-beta * m)) / (1 - 2 * e),
        "hinge": max(0.0, 1 - beta * m),
        "ipo": (m - 0.5 / beta) ** 2,
    }[kind]


@pytest.mark.parametrize("kind", ["sigmoid", "robust", "hinge", "ipo"])
@given(seed=st.integers(0, 999), beta=st.floats(0.01, 5), smoothing=st.floats(0, 0.45))
@settings(max_examples=25, deadline=None)
def test_dpo_agrees_with_the_plain_formula_of_each_kind(kind, seed, beta, smoothing):
    smoothing = smoothing if kind in ("sigmoid", "robust") else 0.0
    inputs = logps(seed)
    got = dpo(*inputs, beta=beta, kind=kind, label_smoothing=smoothing)
    margins = [(c - r) - (rc - rr) for c, r, rc, rr in torch.stack(inputs).T.tolist()]
    assert got.tolist() == pytest.approx([plain_dpo(kind, m, beta, smoothing) for m in margins])


def test_dpo_values_worked_out_by_hand():
    one = [torch.tensor([x]) for x in (-1.0, -2.0, -1.5, -1.5)]  # a margin of 1
    assert dpo(*one, beta=0.5, kind="ipo").item() == 0.0
    assert dpo(*one, beta=0.25, kind="ipo").item() == 1.0
    assert dpo(*one, beta=0.25, kind="hinge").item() == 0.75
    assert dpo(*one, beta=2.0, kind="hinge").item() == 0.0
    assert dpo(*one, beta=1.0).item() == pytest.approx(math.log(1 + math.exp(-1)))
    # log(1 + e) = 1.3132617, log(1 + 1/e) = 0.3132617
    assert dpo(*one, beta=1.0, label_smoothing=0.25).item() == pytest.approx(0.75 * 0.3132617 + 0.25 * 1.3132617)
    robust = dpo(*one, beta=1.0, kind="robust", label_smoothing=0.25)
    assert robust.item() == pytest.approx((0.75 * 0.3132617 - 0.25 * 1.3132617) / 0.5)


@given(seed=st.integers(0, 999), flips=st.floats(0.01, 0.45))
@settings(max_examples=25, deadline=None)
def test_robust_dpo_under_flipped_labels_averages_to_dpo_of_the_true_labels(seed, flips):
    chosen, rejected, ref_chosen, ref_rejected = logps(seed)
    right = dpo(chosen, rejected, ref_chosen, ref_rejected, kind="robust", label_smoothing=flips)
    flipped = dpo(rejected, chosen, ref_rejected, ref_chosen, kind="robust", label_smoothing=flips)
    torch.testing.assert_close(
        (1 - flips) * right + flips * flipped, dpo(chosen, rejected, ref_chosen, ref_rejected), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("kind", ["sigmoid", "robust", "hinge", "ipo"])
def test_dpo_does_not_see_what_both_answers_or_both_models_share(kind):
    chosen, rejected, ref_chosen, ref_rejected = logps()
    plain = dpo(chosen, rejected, ref_chosen, ref_rejected, kind=kind)
    torch.testing.assert_close(dpo(chosen + 3, rejected + 3, ref_chosen, ref_rejected, kind=kind), plain)
    torch.testing.assert_close(dpo(chosen + 3, rejected, ref_chosen + 3, ref_rejected, kind=kind), plain)


def test_a_policy_that_is_the_reference_has_the_loss_of_a_coin():
    policy = logps()[:2]
    torch.testing.assert_close(dpo(*policy, *policy), torch.full((N,), math.log(2), dtype=torch.float64))


@given(
    seed=st.integers(0, 999),
    beta=st.floats(0.01, 5),
    baseline=st.floats(0, 5),
    desirable_weight=st.floats(0, 3),
    undesirable_weight=st.floats(0, 3),
)
@settings(max_examples=25, deadline=None)
def test_kto_agrees_with_the_plain_formula(seed, beta, baseline, desirable_weight, undesirable_weight):
    policy, reference, *_ = logps(seed)
    options = {"beta": beta, "desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
    got = kto(policy, reference, DESIRABLE, baseline, **options)
    for loss, p, r, good in zip(got.tolist(), policy.tolist(), reference.tolist(), DESIRABLE.tolist(), strict=True):
        x = beta * (p - r - baseline)
        weight, sign = (desirable_weight, 1) if good else (undesirable_weight, -1)
        assert loss == pytest.approx(weight * (1 - 1 / (1 + math.exp(-sign * x))))
    as_tensor = kto(policy, reference, DESIRABLE, torch.tensor([baseline], dtype=torch.float64), **options)
    assert torch.equal(as_tensor, got)


def test_kto_raises_the_desirable_and_lowers_the_others_each_by_its_weight():
    policy, reference, *_ = logps()
    policy.requires_grad_()
    baseline = torch.tensor(0.3, requires_grad=True)
    kto(policy, reference, DESIRABLE, baseline, desirable_weight=2.0, undesirable_weight=0.0).sum().backward()
    assert (policy.grad[DESIRABLE] < 0).all()
    assert (policy.grad[~DESIRABLE] == 0).all()
    kto(policy, reference, DESIRABLE, baseline, desirable_weight=0.0).sum().backward()
    assert (policy.grad[~DESIRABLE] > 0).all()
    assert baseline.grad is None


@given(seed=st.integers(0, 999), beta=st.floats(0.01, 5))
@settings(max_examples=25, deadline=None)
def test_orpo_compares_the_odds(seed, beta):
    chosen, rejected, *_ = logps(seed)
    got = orpo(chosen, rejected, beta=beta)
    for loss, c, r in zip(got.tolist(), chosen.tolist(), rejected.tolist(), strict=True):
        odds_ratio = (math.exp(c) / (1 - math.exp(c))) / (math.exp(r) / (1 - math.exp(r)))
        assert loss == pytest.approx(-beta * math.log(odds_ratio / (1 + odds_ratio)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orpo_is_precise_from_near_certain_to_hopeless_answers(dtype):
    chosen = -torch.logspace(-6, 4, 60, dtype=torch.float64).to(dtype)
    exact = []
    for c in chosen.tolist():
        log1mexp = math.log(-math.expm1(c)) if c > -math.log(2) else math.log1p(-math.exp(c))
        difference = c - log1mexp  # the odds of probability 1/2 are 1
        exact.append(0.1 * (math.log1p(math.exp(-difference)) if difference > -30 else -difference))
    got = orpo(chosen, torch.full_like(chosen, math.log(0.5)))
    assert got.tolist() == pytest.approx(exact, rel=1e-5 if dtype == torch.float32 else 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_orpo_holds_an_answer_that_is_certain_at_the_resolution_of_the_dtype(dtype):
    eps = torch.finfo(dtype).eps
    chosen = torch.tensor([-eps, -eps / 9, 0.0, -0.0, 1e-9, 1e4], dtype=dtype, requires_grad=True)
    rejected = chosen.detach().clone().requires_grad_()
    other = torch.full((6,), -1.0, dtype=dtype)
    loss = orpo(chosen, other) + orpo(other, rejected)
    loss.sum().backward()
    for x in (loss.detach(), chosen.grad, rejected.grad):
        assert x.isfinite().all()
        torch.testing.assert_close(x, x[:1].expand(6), rtol=1e-2, atol=0)
    assert (chosen.grad < 0).all()
    assert (rejected.grad > 0.01 / eps).all()  # still pushed down


@given(seed=st.integers(0, 999), beta=st.floats(0.1, 5), gamma=st.floats(0, 3))
@settings(max_examples=25, deadline=None)
def test_simpo_asks_for_a_margin_in_units_of_the_reward(seed, beta, gamma):
    chosen, rejected, *_ = logps(seed)
    got = simpo(chosen, rejected, beta=beta, gamma=gamma)
    expected = [-log_sigmoid(beta * (c - r) - gamma) for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True)]
    assert got.tolist() == pytest.approx(expected)


@every_loss
def test_gradients_agree_with_finite_differences(loss):
    chosen, rejected, *reference = logps(3)
    assert torch.autograd.gradcheck(
        lambda c, r: loss(c, r, *reference), (chosen.requires_grad_(), rejected.requires_grad_())
    )


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("extreme", [-1e4, -500.0, -90.0, -1e-9, 0.0])
@pytest.mark.parametrize("other", [-1e4, -1e-9, 0.0])
def test_loss_and_gradient_stay_finite_for_extreme_margins(loss, dtype, extreme, other):
    chosen = torch.full((N,), extreme, dtype=dtype, requires_grad=True)
    rejected = torch.full((N,), other, dtype=dtype, requires_grad=True)
    reference = torch.full((N,), -1.0, dtype=dtype)
    value = loss(chosen, rejected, reference, reference)
    assert value.isfinite().all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(value.sum(), (chosen, rejected)))


@pytest.mark.parametrize("loss", [LOSSES["sigmoid"], LOSSES["simpo"]], ids=["sigmoid", "simpo"])
def test_a_pair_that_is_badly_wrong_keeps_its_full_gradient(loss):
    chosen = torch.full((N,), -1e4, requires_grad=True)
    (grad,) = torch.autograd.grad(loss(chosen, *torch.zeros(3, N)).sum(), chosen)
    assert grad.tolist() == pytest.approx([-0.1 if loss is LOSSES["sigmoid"] else -2.0] * N)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_is_kept_inputs_are_left_alone_and_the_reference_gets_no_gradient(loss, dtype):
    inputs = logps(dtype=dtype)
    before = [t.clone() for t in inputs]
    for tensor in inputs:
        tensor.requires_grad_()
    value = loss(*inputs)
    value.sum().backward()
    assert value.dtype == dtype
    assert value.shape == (N,)
    assert all(torch.equal(a.detach(), b) for a, b in zip(inputs, before, strict=True))
    assert [t.grad is None for t in inputs] == [False, False, True, True]


def test_unknown_kinds_and_options_out_of_range_are_refused():
    inputs = logps()
    for options, message in [
        ({"kind": "exo"}, "kind must be one of"),
        ({"beta": 0.0}, "beta"),
        ({"beta": math.nan}, "beta"),
        ({"label_smoothing": 0.5}, r"in \[0, 0.5\)"),
        ({"label_smoothing": -0.1}, r"in \[0, 0.5\)"),
        ({"kind": "ipo", "label_smoothing": 0.1}, "no meaning for kind 'ipo'"),
        ({"kind": "hinge", "label_smoothing": 0.1}, "no meaning for kind 'hinge'"),
    ]:
        with pytest.raises(ValueError, match=message):
            dpo(*inputs, **options)
    for loss in (orpo, simpo):
        with pytest.raises(ValueError, match="beta"):
            loss(*inputs[:2], beta=-1.0)


@pytest.mark.parametrize("place", range(4))
def test_sizes_that_do_not_fit_are_refused_not_broadcast(place):
    inputs = logps()
    inputs[place] = inputs[place][:1]
    with pytest.raises(ValueError, match="one number per answer"):
        dpo(*inputs)
    if place < 2:
        for loss in (orpo, simpo):
            with pytest.raises(ValueError, match="one number per answer"):
                loss(*inputs[:2])


def test_kto_refuses_what_would_be_a_silent_mistake():
    policy, reference, *_ = logps()
    good = (policy, reference, DESIRABLE, 0.0)
    for place, value, message in [
        (1, reference[:1], "one number per answer"),
        (2, DESIRABLE[:1], "one number per answer"),
        (2, DESIRABLE.long() * 2 - 1, "must be bool"),
        (3, -0.1, "at least 0"),
        (3, math.nan, "at least 0"),
        (3, torch.zeros(N), "one number for all"),
    ]:
        with pytest.raises(ValueError, match=message):
            kto(*good[:place], value, *good[place + 1 :])
    for options in ({"beta": 0.0}, {"desirable_weight": -1.0}, {"undesirable_weight": -1.0}):
        with pytest.raises(ValueError, match=r"beta|weights"):
            kto(*good, **options)
