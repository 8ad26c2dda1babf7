"""The scalar loss: what counts, what does not, and that it does not depend on how the batch was split."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.algorithms.aggregate import MODES, aggregate, mean_per_sample, sum_per_sample

LENS = st.lists(st.integers(0, 5), min_size=1, max_size=8)


def naive(per_token: list[float], lens: list[int], mode: str, max_len: int) -> float:
    samples, start = [], 0
    for n in lens:
        samples.append(per_token[start : start + n])
        start += n
    samples = [s for s in samples if s]
    if not samples:
        return 0.0
    if mode == "token-mean":
        return sum(map(sum, samples)) / sum(map(len, samples))
    if mode == "seq-mean-token-mean":
        return sum(sum(s) / len(s) for s in samples) / len(samples)
    mean = sum(map(sum, samples)) / len(samples)
    return mean if mode == "seq-mean-token-sum" else mean / max_len


def random_tokens(lens: list[int], seed: int = 0) -> torch.Tensor:
    return torch.randn(sum(lens), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mode", MODES)
@given(lens=LENS, seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_every_mode_agrees_with_a_plain_loop(mode, lens, seed):
    x_T = random_tokens(lens, seed)
    before = x_T.clone()
    got = aggregate(x_T, torch.tensor(lens), mode, max_len=7)
    assert got.shape == ()
    assert got.item() == pytest.approx(naive(x_T.tolist(), lens, mode, 7), abs=1e-12)
    assert torch.equal(x_T, before)


@pytest.mark.parametrize("mode", MODES)
@given(lens=LENS, cut=st.integers(0, 8))
@settings(max_examples=25, deadline=None)
def test_microbatches_with_global_denominators_add_up_to_the_whole(mode, lens, cut):
    x_T = random_tokens(lens).requires_grad_()
    totals = {"max_len": 7, "total_tokens": sum(lens), "total_sequences": sum(n > 0 for n in lens)}
    whole = aggregate(x_T, lens, mode, max_len=7)
    whole_grad = torch.autograd.grad(whole, x_T)[0]
    at = sum(lens[:cut])
    parts = aggregate(x_T[:at], lens[:cut], mode, **totals) + aggregate(x_T[at:], lens[cut:], mode, **totals)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts, x_T)[0], whole_grad)


@pytest.mark.parametrize("mode", MODES)
def test_a_sample_without_a_token_changes_nothing(mode):
    x_T = random_tokens([3, 2])
    assert aggregate(x_T, [0, 3, 0, 2, 0], mode, max_len=3) == aggregate(x_T, [3, 2], mode, max_len=3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lens", [[], [0], [0, 0]])
@pytest.mark.parametrize("totals", [{}, {"total_tokens": 5, "total_sequences": 2}])
def test_an_empty_call_gives_zero_with_a_gradient_that_is_not_nan(mode, lens, totals):
    scale = torch.ones((), requires_grad=True)
    loss = aggregate(scale * torch.zeros(0), lens, mode, max_len=4, **totals)
    loss.backward()
    assert loss.item() == 0.0
    assert scale.grad.item() == 0.0


def test_zero_global_totals_are_accepted_where_there_is_nothing_at_all():
    assert aggregate(torch.zeros(0), [0], "token-mean", total_tokens=0).item() == 0.0
    with pytest.raises(ValueError, match="total_tokens"):
        aggregate(torch.ones(2), [2], "token-mean", total_tokens=0)
    with pytest.raises(ValueError, match="total_sequences"):
        aggregate(torch.ones(2), [2], "seq-mean-token-sum", total_sequences=-1)


def test_a_denominator_below_one_is_used_as_it_is():
    assert aggregate(torch.ones(1), [1], "token-mean", total_tokens=0.5).item() == 2.0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_result_has_the_dtype_of_the_losses(mode, dtype):
    assert aggregate(torch.ones(5, dtype=dtype), [2, 3], mode, max_len=3).dtype == dtype


def test_an_unknown_mode_and_a_missing_max_len_are_refused():
    with pytest.raises(ValueError, match="mode must be one of"):
        aggregate(torch.ones(2), [2], "mean")
    for max_len in (None, 0):
        with pytest.raises(ValueError, match="max_len"):
            aggregate(torch.ones(2), [2], "seq-mean-token-sum-norm", max_len=max_len)


@pytest.mark.parametrize("lens", [[1], [4], [4, -1]])
def test_lengths_that_do_not_fit_the_tokens_are_refused(lens):
    with pytest.raises(ValueError, match="seq_lens"):
        aggregate(torch.ones(3), lens, "token-mean")


def test_lengths_may_be_a_tensor_an_array_or_a_list():
    read_only = np.array([1, 2], dtype=np.int32)
    read_only.flags.writeable = False
    results = [
        aggregate(torch.arange(3.0), s, "seq-mean-token-mean") for s in ([1, 2], torch.tensor([1, 2]), read_only)
    ]
    assert len(set(map(float, results))) == 1


def test_sums_and_means_per_sample_are_zero_for_an_empty_sample():
    x_T, lens_B = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0, 2, 0, 1])
    assert sum_per_sample(x_T, lens_B).tolist() == [0, 3, 0, 6]
    assert mean_per_sample(x_T, lens_B).tolist() == [0, 1.5, 0, 6]
