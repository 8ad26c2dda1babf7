"""Chunked log-probs and greedy hits against the whole matrix: values, gradients, memory, one gradient per parameter."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from engine.algorithms import logprobs
from engine.algorithms.logprobs import greedy_hits, token_logprobs
from engine.algorithms.products import factor_dtype

V, H = 11, 4


def inputs(tokens: int, dtype: torch.dtype = torch.float64, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    hidden_T = torch.randn(tokens, H, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=generator).to(dtype).requires_grad_()
    return hidden_T, weight, torch.randint(V, (tokens,), generator=generator)


def whole(hidden_T, weight, targets_T, temperature):
    distribution = torch.log_softmax(hidden_T @ weight.T / temperature, -1)
    entropy_T = -(distribution.exp() * distribution).sum(-1)
    return distribution[torch.arange(len(targets_T)), targets_T], entropy_T


@given(tokens=st.integers(0, 9), chunk=st.integers(1, 12), temperature=st.floats(0.2, 3))
@settings(max_examples=30, deadline=None)
def test_values_and_gradients_are_those_of_the_whole_matrix(tokens, chunk, temperature):
    hidden_T, weight, targets_T = inputs(tokens)
    got = token_logprobs(hidden_T, weight, targets_T, temperature=temperature, chunk_tokens=chunk)
    expected = whole(hidden_T, weight, targets_T, temperature)
    torch.testing.assert_close(got, expected)
    upstream_T = torch.linspace(-1, 2, tokens, dtype=torch.float64)
    for used, upstream in [((0,), (upstream_T,)), ((1,), (upstream_T,)), ((0, 1), (upstream_T, upstream_T.flip(0)))]:
        ours, theirs = (
            torch.autograd.grad([out[i] for i in used], (hidden_T, weight), upstream, retain_graph=True)
            for out in (got, expected)
        )
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("used", [[0], [1], [0, 1]], ids=["log-prob", "entropy", "both"])
def test_gradients_agree_with_finite_differences(temperature, used):
    hidden_T, weight, targets_T = inputs(5)

    def outputs(h, w):
        both = token_logprobs(h, w, targets_T, temperature=temperature, chunk_tokens=2)
        return sum((1 + i) * both[i] for i in used)

    assert torch.autograd.gradcheck(outputs, (hidden_T, weight))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_entropy_is_that_of_the_sampling_temperature(temperature):
    hidden_T, weight = torch.ones(1, 1), torch.tensor([[0.0], [1.0]])  # two tokens, logits 0 and 1
    p = 1 / (1 + math.exp(-1 / temperature))
    entropy_T = token_logprobs(hidden_T, weight, torch.tensor([0]), temperature=temperature)[1]
    assert entropy_T.item() == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p))


def test_an_entropy_bonus_flattens_the_distribution():
    hidden_T, weight, targets_T = inputs(5)
    entropy_T = token_logprobs(hidden_T, weight, targets_T)[1]
    (grad,) = torch.autograd.grad(entropy_T.sum(), weight)
    assert (token_logprobs(hidden_T, weight + 1e-3 * grad, targets_T)[1].sum() > entropy_T.sum()).item()
    (grad,) = torch.autograd.grad(
        token_logprobs(hidden_T, torch.zeros_like(weight).requires_grad_(), targets_T)[1].sum(), hidden_T
    )
    assert torch.equal(grad, torch.zeros_like(grad)), "a uniform distribution is as flat as can be"


def test_a_loss_without_the_entropy_computes_nothing_for_it():
    hidden_T, weight, targets_T = inputs(8)
    operations = []
    for used in (0, 1):
        out = token_logprobs(hidden_T, weight, targets_T, chunk_tokens=4)[used].sum()
        with CountedOperations() as counted:
            out.backward()
        operations.append(counted.elements)
    assert operations[0] < operations[1]


class CountedOperations(TorchDispatchMode):
    """Adds up the elements that all operations returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.elements += result.numel() if isinstance(result, torch.Tensor) else 0
        return result


def test_each_input_gets_one_gradient_however_many_chunks_there_are():
    hidden_T, weight, targets_T = inputs(9)
    arrivals = []
    weight.register_hook(lambda grad: arrivals.append("weight"))
    hidden_T.register_hook(lambda grad: arrivals.append("hidden"))
    logp_T, entropy_T = token_logprobs(hidden_T, weight, targets_T, chunk_tokens=2)
    (logp_T + 0.1 * entropy_T).sum().backward()
    assert sorted(arrivals) == ["hidden", "weight"]


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
    hidden_T = torch.randn(tokens, 3, requires_grad=True)
    weight = torch.randn(vocabulary, 3, requires_grad=True)
    targets_T = torch.zeros(tokens, dtype=torch.int64)
    with LargestTensor() as largest:
        logp_T, entropy_T = token_logprobs(hidden_T, weight, targets_T, chunk_tokens=chunk)
        (logp_T + entropy_T).sum().backward()
    assert largest.elements == chunk * vocabulary
    assert weight.grad is not None


@pytest.mark.parametrize("wanted", ["hidden", "weight", "none"])
def test_only_the_inputs_that_want_a_gradient_get_one(wanted):
    hidden_T, weight, targets_T = inputs(6)
    expected = torch.autograd.grad(whole(hidden_T, weight, targets_T, 1.0)[0].sum(), (hidden_T, weight))
    hidden_T.requires_grad_(wanted == "hidden")
    weight.requires_grad_(wanted == "weight")
    logp_T, entropy_T = token_logprobs(hidden_T, weight, targets_T, chunk_tokens=4)
    assert logp_T.requires_grad == entropy_T.requires_grad == (wanted != "none")
    if wanted != "none":
        logp_T.sum().backward()
        for name, tensor, grad in zip(("hidden", "weight"), (hidden_T, weight), expected, strict=True):
            if name == wanted:
                torch.testing.assert_close(tensor.grad, grad)
            else:
                assert tensor.grad is None


def test_no_token_at_all_still_gives_the_weight_a_zero_gradient():
    hidden_T, weight, targets_T = inputs(0)
    logp_T, entropy_T = token_logprobs(hidden_T, weight, targets_T)
    (logp_T + entropy_T).sum().backward()
    assert logp_T.shape == entropy_T.shape == (0,)
    assert torch.equal(weight.grad, torch.zeros(V, H, dtype=torch.float64))


def test_bfloat16_inputs_are_computed_in_float32_and_get_bfloat16_gradients():
    hidden_T, weight, targets_T = inputs(7, torch.bfloat16)
    got = token_logprobs(hidden_T, weight, targets_T, temperature=0.7, chunk_tokens=3)
    exact_hidden_T = hidden_T.detach().float().requires_grad_()
    exact_weight = weight.detach().float().requires_grad_()
    expected = whole(exact_hidden_T, exact_weight, targets_T, 0.7)
    assert {t.dtype for t in got} == {torch.float32}
    torch.testing.assert_close(got, expected)
    (got[0] + got[1]).sum().backward()
    (expected[0] + expected[1]).sum().backward()
    assert hidden_T.grad.dtype == weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(hidden_T.grad, exact_hidden_T.grad.bfloat16(), rtol=8e-3, atol=1e-6)
    torch.testing.assert_close(weight.grad, exact_weight.grad.bfloat16(), rtol=8e-3, atol=1e-3)


def test_autocast_does_not_lower_the_precision():
    hidden_T, weight, targets_T = inputs(7, torch.float32)
    expected = token_logprobs(hidden_T, weight, targets_T)
    expected_grads = torch.autograd.grad((expected[0] + expected[1]).sum(), (hidden_T, weight))
    with torch.autocast("cpu", torch.bfloat16):
        got = token_logprobs(hidden_T, weight, targets_T)
        grads = torch.autograd.grad((got[0] + got[1]).sum(), (hidden_T, weight))
    assert all(map(torch.equal, (*got, *grads), (*expected, *expected_grads)))


def test_the_weight_may_be_released_between_forward_and_backward():
    hidden_T, weight, targets_T = inputs(5)
    expected = torch.autograd.grad(sum(whole(hidden_T, weight, targets_T, 1.0)).sum(), weight)[0]
    logp_T, entropy_T = token_logprobs(hidden_T, weight, targets_T)
    gathered = weight.data
    weight.data = torch.empty(0, dtype=torch.float64)  # what ZeRO-3 does after the module's forward ...
    weight.data = gathered.clone()  # ... and before its backward
    gathered.fill_(float("nan"))
    torch.testing.assert_close(torch.autograd.grad((logp_T + entropy_T).sum(), weight)[0], expected)


def test_extreme_logits_stay_finite_and_inputs_are_left_alone():
    hidden_T, weight, targets_T = inputs(5, torch.float32)
    hidden_T = (hidden_T.detach() * 1e4).requires_grad_()
    before = [t.detach().clone() for t in (hidden_T, weight, targets_T)]
    logp_T, entropy_T = token_logprobs(hidden_T, weight, targets_T, temperature=0.5)
    (logp_T + entropy_T).sum().backward()
    assert logp_T.isfinite().all()
    assert entropy_T.isfinite().all()
    assert (entropy_T >= 0).all()
    assert hidden_T.grad.isfinite().all()
    assert all(torch.equal(a.detach(), b) for a, b in zip((hidden_T, weight, targets_T), before, strict=True))


@pytest.mark.parametrize("in_cache", [1, 2 * V])
def test_pieces_of_a_chunk_give_what_the_whole_chunk_gives(monkeypatch, in_cache):
    hidden_T, weight, targets_T = inputs(9, torch.float32)

    def everything():
        out = token_logprobs(hidden_T, weight, targets_T, temperature=0.7, chunk_tokens=5)
        return [
            *out,
            *torch.autograd.grad(out[0].sum(), (hidden_T, weight), retain_graph=True),
            *torch.autograd.grad((out[0] + 2 * out[1]).sum(), (hidden_T, weight)),
        ]

    expected = everything()
    monkeypatch.setattr(logprobs, "NUMBERS_IN_CACHE", in_cache)
    torch.testing.assert_close(everything(), expected)


def test_nothing_but_the_logits_is_as_large_as_a_chunk(monkeypatch):
    chunk, vocabulary = 6, 50
    hidden_T = torch.randn(chunk, 3, requires_grad=True)
    weight = torch.randn(vocabulary, 3, requires_grad=True)
    monkeypatch.setattr(logprobs, "NUMBERS_IN_CACHE", 1)
    with StorageSizes() as made:
        logp_T, entropy_T = token_logprobs(hidden_T, weight, torch.zeros(chunk, dtype=torch.int64))
        (logp_T + entropy_T).sum().backward()
    assert sum(numbers >= chunk * vocabulary for numbers in made.numbers.values()) == 2  # forward and backward


class StorageSizes(TorchDispatchMode):
    """Numbers in each storage that an operation returned; all storages are kept, so that addresses differ."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: dict[int, int] = {}
        self.kept: list[torch.UntypedStorage] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            storage = result.untyped_storage()
            self.kept.append(storage)
            self.numbers[storage.data_ptr()] = storage.nbytes() // result.element_size()
        return result


def test_what_cannot_be_computed_is_refused():
    hidden_T, weight, targets_T = inputs(3)
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature"):
            token_logprobs(hidden_T, weight, targets_T, temperature=temperature)
    with pytest.raises(ValueError, match="chunk_tokens"):
        token_logprobs(hidden_T, weight, targets_T, chunk_tokens=0)
    with pytest.raises(ValueError, match="one target per token"):
        token_logprobs(hidden_T, weight, targets_T[:2])
    with pytest.raises(ValueError, match="weight"):
        token_logprobs(hidden_T, weight.T, targets_T)


@given(tokens=st.integers(0, 9), chunk=st.integers(1, 12), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_greedy_hits_are_the_targets_of_the_largest_logit(tokens, chunk, seed):
    hidden_T, weight, targets_T = inputs(tokens, seed=seed)
    best_T = (hidden_T @ weight.T).argmax(1)
    targets_T[::2] = best_T[::2]
    hits_T = greedy_hits(hidden_T, weight, targets_T, chunk_tokens=chunk)
    assert hits_T.dtype == torch.bool
    assert not hits_T.requires_grad
    assert torch.equal(hits_T, targets_T == best_T)


def test_greedy_hits_see_no_more_than_one_chunk_and_the_first_of_equal_logits():
    tokens, vocabulary, chunk = 64, 50, 4
    with LargestTensor() as largest:
        hits_T = greedy_hits(torch.ones(tokens, 3), torch.ones(vocabulary, 3), torch.arange(tokens), chunk_tokens=chunk)
    assert largest.elements == chunk * vocabulary
    assert hits_T.tolist() == [True] + [False] * (tokens - 1)


def test_greedy_hits_of_bfloat16_inputs_are_decided_in_float32_also_under_autocast():
    weight = torch.tensor([[1.0, 0.0], [1.0, 0.001]], dtype=torch.bfloat16)
    hidden_T = torch.tensor([[1.0, 1.0]], dtype=torch.bfloat16)  # logits 1 and 1.001: equal in bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert greedy_hits(hidden_T, weight, torch.tensor([1])).tolist() == [True]


def test_greedy_hits_refuse_what_does_not_fit():
    hidden_T, weight, targets_T = inputs(3)
    with pytest.raises(ValueError, match="chunk_tokens"):
        greedy_hits(hidden_T, weight, targets_T, chunk_tokens=0)
    with pytest.raises(ValueError, match="one target per token"):
        greedy_hits(hidden_T, weight, targets_T[:2])
    with pytest.raises(ValueError, match="weight"):
        greedy_hits(hidden_T, weight.T, targets_T)


@pytest.mark.parametrize(
    ("dtypes", "device", "expected"),
    [
        ((torch.bfloat16, torch.bfloat16), "cuda", torch.bfloat16),
        ((torch.bfloat16, torch.float32), "cuda", torch.float32),
        ((torch.bfloat16, torch.float16), "cuda", torch.float32),
        ((torch.float64, torch.float64), "cuda", torch.float64),
        ((torch.bfloat16, torch.bfloat16), "cpu", torch.float32),
    ],
)
def test_small_numbers_are_multiplied_as_they_are_where_a_gpu_sums_them_exactly(dtypes, device, expected):
    factors = [SimpleNamespace(dtype=dtype, device=torch.device(device)) for dtype in dtypes]
    assert factor_dtype(*factors) == expected  # type: ignore[arg-type]
