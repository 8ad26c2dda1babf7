"""The clipped value loss and the explained variance, by hand and against plain loops."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.algorithms.values import clipped_value_loss, explained_variance

number = st.floats(-5, 5)


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "gradient"),
    [
        (1.1, 1.0, 2.0, 0.405, -0.9),  # inside the range: the plain squared error
        (1.5, 1.0, 2.0, 0.32, 0.0),  # went too far towards the return: held at 1.2
        (0.5, 1.0, 2.0, 1.125, -1.5),  # went the wrong way: the plain error is the larger one, and pulls back
        (3.0, 1.0, 2.0, 0.5, 1.0),  # beyond the return by more than the clipped value falls short of it
        (0.5, 1.0, 0.0, 0.32, 0.0),  # the same downwards
        (2.0, 2.0, 2.0, 0.0, 0.0),
    ],
)
def test_values_worked_out_by_hand(value, old, target, loss, gradient):
    values_T = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    got = clipped_value_loss(values_T, torch.tensor([old]).double(), torch.tensor([target]).double(), clip=0.2)
    got.sum().backward()
    assert got.item() == pytest.approx(loss)
    assert values_T.grad.item() == pytest.approx(gradient)


@given(rows=st.lists(st.tuples(number, number, number), max_size=6), clip=st.floats(0, 3))
@settings(max_examples=40, deadline=None)
def test_it_agrees_with_a_plain_loop(rows, clip):
    values_T, old_T, returns_T = torch.tensor(rows, dtype=torch.float64).reshape(-1, 3).T
    got = clipped_value_loss(values_T, old_T, returns_T, clip=clip)
    for loss, (value, old, target) in zip(got.tolist(), rows, strict=True):
        held = min(max(value, old - clip), old + clip)
        assert loss == pytest.approx(0.5 * max((value - target) ** 2, (held - target) ** 2))


def test_infinity_turns_clipping_off():
    values_T, old_T, returns_T = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    got = clipped_value_loss(values_T, old_T, returns_T, clip=math.inf)
    assert torch.equal(got, 0.5 * (values_T - returns_T).square())


@pytest.mark.parametrize("old", [0.0, 1000.1])
def test_the_gradient_inside_the_range_is_that_of_the_squared_error(old):
    values_T = torch.tensor([old + 0.05], requires_grad=True)
    (grad,) = torch.autograd.grad(clipped_value_loss(values_T, torch.tensor([old]), torch.tensor([old + 9])), values_T)
    assert grad.item() == (values_T - (old + 9)).item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("extreme", [1.0, 1e4, -1e4, 1e18])
def test_it_stays_finite_keeps_the_dtype_and_only_the_values_get_a_gradient(dtype, extreme):
    inputs = [torch.tensor([a, -a, 0.0], dtype=dtype).requires_grad_() for a in (extreme, 0.5, -extreme)]
    before = [t.detach().clone() for t in inputs]
    loss_T = clipped_value_loss(*inputs)
    loss_T.sum().backward()
    assert loss_T.dtype == dtype
    assert loss_T.isfinite().all()
    assert inputs[0].grad.isfinite().all()
    assert [t.grad for t in inputs[1:]] == [None, None]
    assert all(torch.equal(a.detach(), b) for a, b in zip(inputs, before, strict=True))


def test_other_sizes_and_negative_clips_are_refused():
    for sizes in [(2, 1, 2), (2, 2, 1), (1, 2, 2)]:
        with pytest.raises(ValueError, match="one number per token"):
            clipped_value_loss(*map(torch.zeros, sizes))
    for clip in (-0.1, math.nan):
        with pytest.raises(ValueError, match="clip"):
            clipped_value_loss(*torch.zeros(3, 2), clip=clip)


@given(rows=st.lists(st.tuples(number, number), max_size=12), order=st.randoms(use_true_random=False), shift=number)
@settings(max_examples=60, deadline=None)
def test_explained_variance_agrees_with_its_definition_in_any_order_and_does_not_see_a_shift(rows, order, shift):
    returns = [r for _, r in rows]
    variance = statistics.pvariance(returns) if rows else 0.0
    if 0 < variance < 1e-12:
        return
    expected = 1 - statistics.pvariance([r - v for v, r in rows]) / variance if variance else 0.0
    shuffled = order.sample(rows, len(rows))
    values_T, returns_T = torch.tensor(shuffled, dtype=torch.float64).reshape(-1, 2).T
    got = explained_variance(values_T + shift, returns_T)
    assert got == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert got <= 1


def test_explained_variance_of_perfect_constant_and_opposite_values():
    returns_T = torch.tensor([0.0, 1.0, 3.0], requires_grad=True)
    assert explained_variance(returns_T, returns_T) == 1.0
    assert explained_variance(torch.full((3,), 9.0), returns_T) == pytest.approx(0.0)
    assert explained_variance(-returns_T, returns_T) == pytest.approx(-3.0)
    far_T = torch.tensor([1e7, 1e7 + 1, 1e7 + 2])  # the squares are beyond float32
    assert explained_variance(torch.tensor([0.0, 1.0, 0.0]), far_T) == pytest.approx(-1 / 3)


@given(value=st.floats(-1e6, 1e6), values=st.lists(number, max_size=9))
@settings(max_examples=25, deadline=None)
def test_of_returns_that_do_not_vary_exactly_nothing_is_explained(value, values):
    values_T = torch.tensor(values, dtype=torch.float64)
    assert explained_variance(values_T, torch.full_like(values_T, value)) == 0.0


def test_returns_whose_variance_is_beyond_the_dtype_explain_nothing_rather_than_nan():
    assert explained_variance(torch.zeros(2).double(), torch.tensor([0.0, 5e-324], dtype=torch.float64)) == 0.0


def test_explained_variance_refuses_other_sizes():
    with pytest.raises(ValueError, match="one number per token"):
        explained_variance(torch.zeros(2), torch.zeros(1))
