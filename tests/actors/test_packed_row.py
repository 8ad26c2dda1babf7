"""Samples that share what they begin with: the same numbers and gradients as when each is computed alone."""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from actors.packed_model import PackedLogProbs, PackedModel, PackedScores
from actors.packed_row import PackedRow
from actors.ragged_attention import RAGGED_SDPA, RAGGED_VARLEN
from actors.split import Split
from engine.data.batch import Batch

CPU = torch.device("cpu")
WIDE = 4096
"""As if the model were so wide that sharing always pays."""
SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def model_of(attention: str = RAGGED_SDPA, window: int | None = None) -> Any:
    torch.manual_seed(0)
    shape = SHAPE | HEADS | {"attn_implementation": attention}
    if window is None:
        return LlamaForCausalLM(LlamaConfig(**shape)).double()
    return MistralForCausalLM(MistralConfig(**shape, sliding_window=window)).double()


def batch_of(groups: list[tuple[int, list[int]]], seed: int = 0) -> Batch:
    """Groups of (prompt length, response lengths)."""
    random = np.random.default_rng(seed)
    tokens, masks, ids, lens = [], [], [], []
    for number, (prompt_len, responses) in enumerate(groups):
        prompt = random.integers(1, 64, prompt_len)
        for length in responses:
            tokens.append(np.concatenate([prompt, random.integers(1, 64, length)]))
            masks.append(np.repeat([False, True], [prompt_len, length]))
            ids.append(number)
            lens.append(prompt_len + length)
    tokens_T = np.concatenate(tokens).astype(np.int32)
    return Batch.offline(tokens_T, np.array(lens, np.int32), np.concatenate(masks), np.array(ids, np.int64))


def result(module: Any, row: PackedRow) -> tuple[torch.Tensor, list[torch.Tensor]]:
    module.zero_grad()
    values = module(row)
    values = values[0] + 0.1 * values[1] if isinstance(values, tuple) else values
    (values * torch.arange(1, values.numel() + 1).view_as(values)).sum().backward()
    return values.detach(), [p.grad.clone() for p in module.parameters() if p.grad is not None]


def assert_the_same(module: Any, batch: Batch, *, saves: int) -> None:
    shared, alone = PackedRow.of(batch, CPU, hidden_size=WIDE), PackedRow.of(batch, CPU)
    assert alone.tokens.numel() - shared.tokens.numel() == saves
    (values, gradients), (expected, theirs) = result(module, shared), result(module, alone)
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)  # norms are computed in float32
    for ours, other in zip(gradients, theirs, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=2e-5)


@given(
    groups=st.lists(
        st.tuples(st.integers(1, 12), st.lists(st.integers(1, 20), min_size=1, max_size=4)), min_size=1, max_size=3
    )
)
@settings(max_examples=25, deadline=None)
def test_log_probs_and_gradients_do_not_depend_on_what_is_shared(groups: list[tuple[int, list[int]]]) -> None:
    saves = sum(prompt * (len(responses) - 1) for prompt, responses in groups)
    assert_the_same(PackedLogProbs(PackedModel(model_of()), temperature=0.7), batch_of(groups), saves=saves)


@pytest.mark.parametrize("before", [True, False])
def test_values_and_scores_are_read_off_the_right_tokens(before: bool) -> None:
    model = model_of()
    model.score = torch.nn.Linear(SHAPE["hidden_size"], 1).double()
    assert_the_same(PackedScores(PackedModel(model), before=before), batch_of([(5, [3, 1, 4]), (2, [6])]), saves=10)


def test_a_window_reaches_into_the_shared_part() -> None:
    batch = batch_of([(9, [3, 12, 1])])
    assert_the_same(PackedLogProbs(PackedModel(model_of(window=4)), temperature=1.0), batch, saves=18)


def test_the_varlen_kernel_is_told_which_keys_each_segment_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    """In flash attention's place stands its documented meaning: causal, aligned at the end, per pair of spans."""

    def varlen(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, **how: Any) -> torch.Tensor:
        assert (how["causal"], how["window_size"]) == (True, (-1, -1))
        assert (max_q, max_k) == (int(torch.diff(cu_q).max()), int(torch.diff(cu_k).max()))
        outs = []
        for i in range(len(cu_q) - 1):
            own, keys, values = q[cu_q[i] : cu_q[i + 1]], k[cu_k[i] : cu_k[i + 1]], v[cu_k[i] : cu_k[i + 1]]
            keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (keys, values))
            scores = torch.einsum("qhd,khd->hqk", own, keys) * how["softmax_scale"]
            seen = torch.ones(scores.shape[1:]).tril(len(keys) - len(own)).bool()
            outs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), values))
        return torch.cat(outs)

    library: Any = types.ModuleType("flash_attn")
    library.flash_attn_varlen_func = varlen
    monkeypatch.setitem(sys.modules, "flash_attn", library)
    batch = batch_of([(5, [3, 1, 40]), (4, [2])])
    ours = PackedLogProbs(PackedModel(model_of(RAGGED_VARLEN)), temperature=1.0)
    theirs = PackedLogProbs(PackedModel(model_of(RAGGED_SDPA)), temperature=1.0)
    row = PackedRow.of(batch, CPU, hidden_size=WIDE)
    torch.testing.assert_close(ours(row)[0], theirs(row)[0], rtol=1e-5, atol=1e-5)


@given(
    groups=st.lists(
        st.tuples(st.integers(1, 20), st.lists(st.integers(1, 30), min_size=1, max_size=6)), min_size=1, max_size=6
    ),
    ranks=st.integers(1, 4),
)
@settings(max_examples=100, deadline=None)
def test_no_row_exceeds_the_budget_and_no_sample_is_lost(groups: list[tuple[int, list[int]]], ranks: int) -> None:
    batch = batch_of(groups)
    shares = Split.of(batch, ranks=ranks, token_budget=64, hidden_size=WIDE).shares()
    assert len({len(share) for share in shares}) == 1
    assert max(PackedRow.of(micro, CPU, hidden_size=WIDE).tokens.numel() for share in shares for micro in share) <= 64
    assert sorted(int(i) for share in shares for micro in share for i in micro.sample_ids) == list(range(len(batch)))


def test_one_rank_computes_each_prompt_once_and_several_ranks_share_the_work() -> None:
    batch = batch_of([(50, [10] * 8), (50, [10] * 8)])
    [[micro]] = Split.of(batch, ranks=1, token_budget=4096, hidden_size=WIDE).shares()
    assert PackedRow.of(micro, CPU, hidden_size=WIDE).tokens.numel() == 2 * (50 + 80)
    shares = Split.of(batch, ranks=4, token_budget=4096, hidden_size=WIDE).shares()
    sizes = [sum(PackedRow.of(micro, CPU, hidden_size=WIDE).tokens.numel() for micro in share) for share in shares]
    assert max(sizes) < 2 * min(sizes)
