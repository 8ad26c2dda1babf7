"""Losses of reward models: values against plain formulas in float64, invariances, and extreme scores."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.algorithms.reward_model import bradley_terry, plackett_luce, process_bce

scores = st.floats(-20, 20)
ranked_list = st.lists(st.tuples(scores, st.integers(-2, 2)), min_size=1, max_size=6)


def double(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def of_lists(lists: list[list[tuple[float, int]]]) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    items = [item for items in lists for item in items]
    return double([s for s, _ in items]), torch.tensor([r for _, r in items]), [len(items) for items in lists]


def plain_plackett_luce(items: list[tuple[float, int]]) -> float:
    return sum(math.log(sum(math.exp(s) for s, r in items if r >= rank)) - score for score, rank in items)


@given(pairs=st.lists(st.tuples(scores, scores), max_size=5), margin=st.floats(-3, 3))
@settings(max_examples=40, deadline=None)
def test_bradley_terry_is_the_negative_log_chance_of_the_label(pairs, margin):
    chosen_N, rejected_N = double([c for c, _ in pairs]), double([r for _, r in pairs])
    plain = [math.log1p(math.exp(-(c - r))) for c, r in pairs]
    assert bradley_terry(chosen_N, rejected_N).tolist() == pytest.approx(plain)
    with_margin = [math.log1p(math.exp(-(c - r - margin))) for c, r in pairs]
    assert bradley_terry(chosen_N, rejected_N, margin=margin).tolist() == pytest.approx(with_margin)
    each = torch.full((len(pairs),), margin, dtype=torch.float64)
    assert bradley_terry(chosen_N, rejected_N, margin=each).tolist() == pytest.approx(with_margin)


def test_each_pair_has_its_own_margin_without_a_gradient_and_in_the_dtype_of_the_scores():
    margin_N = double([0.0, 2.0]).requires_grad_()
    chosen_N = torch.tensor([1.0, 1.0], requires_grad=True)
    loss_N = bradley_terry(chosen_N, torch.zeros(2), margin=margin_N)
    assert loss_N.dtype == torch.float32
    assert loss_N.tolist() == pytest.approx([0.3132617, 1.3132617])
    loss_N.sum().backward()
    assert margin_N.grad is None
    assert chosen_N.grad.tolist() == pytest.approx([-0.2689414, -0.7310586])


@given(lists=st.lists(ranked_list, max_size=5))
@settings(max_examples=40, deadline=None)
def test_plackett_luce_agrees_with_the_plain_formula_with_ties_in_the_whole_risk_set(lists):
    got = plackett_luce(*of_lists(lists))
    assert got.tolist() == pytest.approx([plain_plackett_luce(items) for items in lists], abs=1e-9)


@given(lists=st.lists(ranked_list, min_size=1, max_size=5))
@settings(max_examples=25, deadline=None)
def test_lists_in_one_call_are_lists_one_by_one(lists):
    together = plackett_luce(*of_lists(lists))
    torch.testing.assert_close(together, torch.cat([plackett_luce(*of_lists([items])) for items in lists]))


@given(items=ranked_list, shift=st.floats(-50, 50), order=st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_a_shift_of_all_scores_new_rank_numbers_and_the_order_of_items_change_nothing(items, shift, order):
    plain = plackett_luce(*of_lists([items]))
    shifted = plackett_luce(*of_lists([[(s + shift, r**3 - 30) for s, r in items]]))
    shuffled = plackett_luce(*of_lists([order.sample(items, len(items))]))
    torch.testing.assert_close(shifted, plain, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(shuffled, plain, rtol=1e-9, atol=1e-9)


@given(pairs=st.lists(st.tuples(scores, scores), min_size=1, max_size=5), shift=st.floats(-50, 50))
@settings(max_examples=25, deadline=None)
def test_two_items_are_a_pair_and_pairs_only_see_the_difference(pairs, shift):
    chosen_N, rejected_N = double([c for c, _ in pairs]), double([r for _, r in pairs])
    pairwise = bradley_terry(chosen_N, rejected_N)
    scores_K = torch.stack([rejected_N, chosen_N], 1).flatten()
    torch.testing.assert_close(plackett_luce(scores_K, torch.tensor([2, 1] * len(pairs)), [2] * len(pairs)), pairwise)
    torch.testing.assert_close(bradley_terry(chosen_N + shift, rejected_N + shift), pairwise, rtol=1e-9, atol=1e-9)


@given(values=st.lists(st.floats(-5, 5), min_size=1, max_size=4))
@settings(max_examples=20, deadline=None)
def test_the_chances_of_all_rankings_add_up_to_one(values):
    n = len(values)
    orders = list(itertools.permutations(range(1, n + 1)))
    loss_L = plackett_luce(double(values * len(orders)), torch.tensor(orders).flatten(), [n] * len(orders))
    assert loss_L.neg().exp().sum().item() == pytest.approx(1.0)


def test_a_tie_is_resolved_as_breslow_does():
    # ranks 1, 2, 2: log(e^0 + e^1 + e^2) - 0, then twice log(e^1 + e^2), less 1 and 2
    got = plackett_luce(double([1.0, 0.0, 2.0]), double([2.0, 1.0, 2.0]), torch.tensor([3]))
    assert got.item() == pytest.approx(math.log(1 + math.e + math.e**2) + 2 * math.log(math.e + math.e**2) - 3)


def test_a_list_of_one_or_none_gives_zero_and_no_gradient():
    scores_K = torch.tensor([7.3, -1e4], requires_grad=True)
    loss_L = plackett_luce(scores_K, torch.tensor([5, 1]), [1, 0, 1])
    assert loss_L.tolist() == [0.0, 0.0, 0.0]
    loss_L.sum().backward()
    assert scores_K.grad.tolist() == [0.0, 0.0]
    assert plackett_luce(torch.zeros(0), torch.zeros(0, dtype=torch.int64), []).shape == (0,)


@given(steps=st.lists(st.tuples(scores, st.floats(0, 1)), max_size=6))
@settings(max_examples=40, deadline=None)
def test_process_bce_is_the_cross_entropy_of_each_step(steps):
    got = process_bce(double([x for x, _ in steps]), double([y for _, y in steps]))
    plain = [y * math.log1p(math.exp(-x)) + (1 - y) * math.log1p(math.exp(x)) for x, y in steps]
    assert got.tolist() == pytest.approx(plain, abs=1e-12)


def test_step_labels_may_be_bool_and_get_no_gradient():
    labels_S = double([1.0, 0.0]).requires_grad_()
    logits_S = torch.tensor([0.5, 0.5], requires_grad=True)
    soft = process_bce(logits_S, labels_S)
    hard = process_bce(logits_S, torch.tensor([True, False]))
    assert soft.dtype == torch.float32
    assert torch.equal(soft, hard)
    soft.sum().backward()
    assert labels_S.grad is None
    assert logits_S.grad.tolist() == pytest.approx([-0.3775407, 0.6224593])


LOSSES = {
    "bradley_terry": lambda a_N, b_N: bradley_terry(a_N, b_N, margin=1.0),
    "plackett_luce": lambda a_N, b_N: plackett_luce(torch.cat([a_N, b_N]), torch.arange(2 * len(a_N)) % 3, [2, 4]),
    "process_bce": lambda a_N, b_N: process_bce(torch.cat([a_N, b_N]), torch.arange(2 * len(a_N)) % 2 == 0),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


@every_loss
def test_gradients_agree_with_finite_differences(loss):
    a_N, b_N = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(loss, (a_N, b_N))


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("gap", [-1e30, -1e4, -100.0, 100.0, 1e4, 1e30])
def test_loss_and_gradient_stay_finite_for_extreme_scores_and_inputs_are_left_alone(loss, dtype, gap):
    a_N = torch.tensor([gap, 0.0, gap], dtype=dtype, requires_grad=True)
    b_N = torch.tensor([0.0, gap, -gap], dtype=dtype, requires_grad=True)
    before = (a_N.detach().clone(), b_N.detach().clone())
    loss_N = loss(a_N, b_N)
    assert loss_N.dtype == dtype
    assert loss_N.isfinite().all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss_N.sum(), (a_N, b_N)))
    assert all(map(torch.equal, (a_N.detach(), b_N.detach()), before))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_pairwise_loss_does_not_overflow_at_a_gap_of_100(dtype):
    losing_N = torch.tensor([-100.0, 100.0], dtype=dtype, requires_grad=True)
    winning_N = torch.zeros(2, dtype=dtype)
    for loss_N in (
        bradley_terry(losing_N, winning_N),
        plackett_luce(torch.stack([losing_N, winning_N], 1).flatten(), torch.tensor([1, 2] * 2), [2, 2]),
    ):
        assert loss_N.tolist() == pytest.approx([100.0, 0.0], abs=1e-40)
        (grad_N,) = torch.autograd.grad(loss_N.sum(), losing_N)
        assert grad_N.tolist() == pytest.approx([-1.0, 0.0], abs=1e-40)


def test_sizes_and_labels_that_do_not_fit_are_refused():
    two, three = torch.zeros(2), torch.zeros(3)
    for call, message in [
        (lambda: bradley_terry(two, three), "one number per chosen"),
        (lambda: bradley_terry(two, two, margin=torch.zeros(1)), "one number per pair"),
        (lambda: bradley_terry(two[None], two[None]), "flat"),
        (lambda: plackett_luce(two, three, [2]), "one number per item"),
        (lambda: plackett_luce(three, three, [2]), "add up"),
        (lambda: plackett_luce(three, three, [4, -1]), "at least 0"),
        (lambda: plackett_luce(two, torch.tensor([1.0, math.nan]), [2]), "NaN"),
        (lambda: process_bce(two, three), "one number per step"),
        (lambda: process_bce(two, torch.tensor([1, -1])), "in \\[0, 1\\]"),
        (lambda: process_bce(two, torch.tensor([0.5, 1.1])), "in \\[0, 1\\]"),
        (lambda: process_bce(two, torch.tensor([0.5, math.nan])), "in \\[0, 1\\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
