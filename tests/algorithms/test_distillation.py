"""Generalized JSD against plain sums in float64, its limits and bounds, and the chunked form against the whole one."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from engine.algorithms.distillation import chunked_generalized_jsd, generalized_jsd

V, H, TEACHER_H = 11, 4, 3
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
every_beta = pytest.mark.parametrize("beta", BETAS)


def logits(seed: int = 0, tokens: int = 5, spread: float = 2.0, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (spread * torch.randn(2, tokens, V, generator=generator, dtype=torch.float64)).to(dtype)
    return student, teacher


def plain_kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def plain_jsd(student: list[float], teacher: list[float], beta: float, temperature: float) -> float:
    def softmax(row: list[float]) -> list[float]:
        total = sum(math.exp(x / temperature) for x in row)
        return [math.exp(x / temperature) / total for x in row]

    s, t = softmax(student), softmax(teacher)
    if beta in (0, 1):
        return plain_kl(s, t) if beta else plain_kl(t, s)
    m = [beta * b + (1 - beta) * a for a, b in zip(s, t, strict=True)]
    return beta * plain_kl(t, m) + (1 - beta) * plain_kl(s, m)


@given(
    seed=st.integers(0, 999), beta=st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.01, 0.99)), t=st.floats(0.3, 3)
)
@settings(max_examples=40, deadline=None)
def test_it_agrees_with_plain_sums(seed, beta, t):
    student, teacher = logits(seed)
    got = generalized_jsd(student, teacher, beta=beta, temperature=t)
    rows = zip(student.tolist(), teacher.tolist(), strict=True)
    assert got.tolist() == pytest.approx([plain_jsd(*row, beta, t) for row in rows], abs=1e-12)


def test_the_ends_are_the_two_divergences_and_the_limits_of_the_rescaled_middle():
    student, teacher = logits()
    s, t = student.softmax(-1), teacher.softmax(-1)
    forward, reverse = (t * (t / s).log()).sum(-1), (s * (s / t).log()).sum(-1)
    torch.testing.assert_close(generalized_jsd(student, teacher, beta=0.0), forward)
    torch.testing.assert_close(generalized_jsd(student, teacher, beta=1.0), reverse)
    small = 1e-6
    torch.testing.assert_close(generalized_jsd(student, teacher, beta=small) / small, forward, rtol=1e-2, atol=0)
    torch.testing.assert_close(generalized_jsd(student, teacher, beta=1 - small) / small, reverse, rtol=1e-2, atol=0)


@given(seed=st.integers(0, 999), beta=st.floats(0.01, 0.99), spread=st.floats(0, 1e4))
@settings(max_examples=40, deadline=None)
def test_between_the_ends_it_is_bounded_by_the_entropy_of_the_mixture_weights(seed, beta, spread):
    jsd_T = generalized_jsd(*logits(seed, spread=spread), beta=beta)
    assert (jsd_T >= -1e-12).all()
    assert (jsd_T <= -beta * math.log(beta) - (1 - beta) * math.log(1 - beta) + 1e-12).all()


def test_the_bound_is_reached_where_nothing_is_shared():
    student, teacher = torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]])
    assert generalized_jsd(student, teacher).item() == pytest.approx(math.log(2))


@every_beta
def test_equal_distributions_have_no_divergence_and_no_gradient(beta):
    student, _ = logits()
    teacher = student + 5.0  # logits are defined up to a constant
    student.requires_grad_()
    jsd_T = generalized_jsd(student, teacher, beta=beta)
    (grad,) = torch.autograd.grad(jsd_T.sum(), student)
    torch.testing.assert_close(jsd_T, torch.zeros_like(jsd_T), rtol=0, atol=1e-12)
    torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-12)


@every_beta
def test_swapping_the_two_mirrors_beta(beta):
    student, teacher = logits()
    mirrored = generalized_jsd(teacher, student, beta=1 - beta)
    torch.testing.assert_close(generalized_jsd(student, teacher, beta=beta), mirrored)


@every_beta
def test_gradients_agree_with_finite_differences(beta):
    student, teacher = logits(tokens=2)
    assert torch.autograd.gradcheck(
        lambda x: generalized_jsd(x, teacher, beta=beta, temperature=0.7), student.requires_grad_()
    )


@every_beta
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 100.0, 1e4, 1e30])
def test_extreme_logits_stay_finite_keep_the_dtype_and_give_the_teacher_no_gradient(beta, dtype, size):
    inputs = logits(spread=size, dtype=dtype)
    before = [t.clone() for t in inputs]
    student, teacher = (t.requires_grad_() for t in inputs)
    jsd_T = generalized_jsd(student, teacher, beta=beta)
    jsd_T.sum().backward()
    assert jsd_T.dtype == dtype
    assert jsd_T.isfinite().all()
    assert student.grad.isfinite().all()
    assert teacher.grad is None
    assert all(torch.equal(a.detach(), b) for a, b in zip(inputs, before, strict=True))


def test_options_and_sizes_that_do_not_fit_are_refused():
    student, teacher = logits()
    for options in ({"beta": -0.1}, {"beta": 1.1}, {"beta": math.nan}, {"temperature": 0.0}, {"temperature": math.inf}):
        with pytest.raises(ValueError, match=next(iter(options))):
            generalized_jsd(student, teacher, **options)
    for bad in ((student, teacher[:1]), (student, teacher[:, :5]), (student[0], teacher[0])):
        with pytest.raises(ValueError, match="vocabulary"):
            generalized_jsd(*bad)


def states(tokens: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[torch.Tensor]:
    """Student's hidden states and output embedding, then the teacher's, with a hidden size of its own."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, H), (V, H), (tokens, TEACHER_H), (V, TEACHER_H)]
    return [torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def whole(hidden_T, weight, teacher_hidden_T, teacher_weight, **options):
    return generalized_jsd(hidden_T @ weight.T, teacher_hidden_T @ teacher_weight.T, **options)


@given(tokens=st.integers(0, 9), chunk=st.integers(1, 12), beta=st.sampled_from(BETAS), temperature=st.floats(0.3, 3))
@settings(max_examples=40, deadline=None)
def test_the_chunked_form_has_the_values_and_gradients_of_the_whole(tokens, chunk, beta, temperature):
    inputs = states(tokens)
    got = chunked_generalized_jsd(*inputs, beta=beta, temperature=temperature, chunk_tokens=chunk)
    expected = whole(*inputs, beta=beta, temperature=temperature)
    torch.testing.assert_close(got, expected)
    upstream_T = torch.linspace(-1, 2, tokens, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(got, inputs[:2], upstream_T), torch.autograd.grad(expected, inputs[:2], upstream_T)
    )


def test_each_student_tensor_gets_one_gradient_however_many_chunks_there_are_and_the_teacher_none():
    inputs = states(9)
    arrivals = []
    for name, tensor in zip(("hidden", "weight", "teacher hidden", "teacher weight"), inputs, strict=True):
        tensor.register_hook(lambda grad, name=name: arrivals.append(name) if grad is not None else None)
    chunked_generalized_jsd(*inputs, beta=0.5, chunk_tokens=2).sum().backward()
    assert sorted(arrivals) == ["hidden", "weight"]
    assert [t.grad is None for t in inputs] == [False, False, True, True]


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_logits_never_exist_for_more_than_one_chunk():
    tokens, vocabulary, chunk = 64, 50, 4
    inputs = [torch.randn(n, 3, requires_grad=True) for n in (tokens, vocabulary, tokens, vocabulary)]
    with LargestTensor() as largest:
        chunked_generalized_jsd(*inputs, beta=0.5, chunk_tokens=chunk).sum().backward()
    assert largest.elements == chunk * vocabulary
    assert inputs[1].grad is not None


@pytest.mark.parametrize("wanted", ["hidden", "weight", "none"])
def test_only_the_inputs_that_want_a_gradient_get_one(wanted):
    inputs = states(6)
    expected = torch.autograd.grad(whole(*inputs, beta=0.3).sum(), inputs[:2])
    inputs = [t.detach() for t in inputs]
    inputs[0].requires_grad_(wanted == "hidden")
    inputs[1].requires_grad_(wanted == "weight")
    jsd_T = chunked_generalized_jsd(*inputs, beta=0.3, chunk_tokens=4)
    assert jsd_T.requires_grad == (wanted != "none")
    if wanted != "none":
        jsd_T.sum().backward()
        for name, tensor, grad in zip(("hidden", "weight"), inputs, expected, strict=False):
            if name == wanted:
                torch.testing.assert_close(tensor.grad, grad)
            else:
                assert tensor.grad is None


def test_no_token_at_all_still_gives_the_weight_a_zero_gradient():
    inputs = states(0)
    chunked_generalized_jsd(*inputs, beta=0.5).sum().backward()
    assert torch.equal(inputs[1].grad, torch.zeros(V, H, dtype=torch.float64))


@every_beta
def test_bfloat16_inputs_are_computed_in_float32_also_under_autocast_and_get_bfloat16_gradients(beta):
    inputs = states(7, torch.bfloat16)
    exact = [t.detach().float().requires_grad_() for t in inputs]
    expected = whole(*exact, beta=beta)
    expected.sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        got = chunked_generalized_jsd(*inputs, beta=beta, chunk_tokens=3)
        got.sum().backward()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected)
    for tensor, reference in zip(inputs[:2], exact[:2], strict=True):
        assert tensor.grad.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.grad, reference.grad.bfloat16(), rtol=8e-3, atol=1e-5)


def test_the_weights_may_be_released_between_forward_and_backward():
    inputs = states(5)
    expected = torch.autograd.grad(whole(*inputs, beta=0.5).sum(), inputs[1])[0]
    jsd_T = chunked_generalized_jsd(*inputs, beta=0.5)
    for weight in (inputs[1], inputs[3]):
        gathered = weight.data
        weight.data = torch.empty(0, dtype=torch.float64)  # what ZeRO-3 does after the module's forward ...
        weight.data = gathered.clone()  # ... and before its backward
        gathered.fill_(float("nan"))
    torch.testing.assert_close(torch.autograd.grad(jsd_T.sum(), inputs[1])[0], expected)


def test_the_chunked_form_refuses_what_does_not_fit():
    hidden_T, weight, teacher_hidden_T, teacher_weight = states(3)
    for inputs, options, message in [
        ((hidden_T, weight.T, teacher_hidden_T, teacher_weight), {}, "weight"),
        ((hidden_T, weight, teacher_hidden_T, weight), {}, "weight"),
        ((hidden_T, weight, teacher_hidden_T[:1], teacher_weight), {}, "same tokens and vocabulary"),
        ((hidden_T, weight, teacher_hidden_T, teacher_weight[:5]), {}, "same tokens and vocabulary"),
        ((hidden_T, weight, teacher_hidden_T, teacher_weight), {"chunk_tokens": 0}, "chunk_tokens"),
        ((hidden_T, weight, teacher_hidden_T, teacher_weight), {"temperature": 0.0}, "temperature"),
        ((hidden_T, weight, teacher_hidden_T, teacher_weight), {"beta": 2.0}, "beta"),
    ]:
        with pytest.raises(ValueError, match=message):
            chunked_generalized_jsd(*inputs, **{"beta": 0.5, **options})
