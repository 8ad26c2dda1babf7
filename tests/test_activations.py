"""Estimates against what autograd really keeps in a packed forward pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.packed_model import packed_hidden_states
from actors.packed_row import PackedRow
from actors.ragged_attention import RAGGED_SDPA
from engine.activations import saved_bytes_per_token
from engine.data.batch import Batch
from tests.test_model_shape import small

TOKENS = 192


def really_saved(config: Any, dtype: torch.dtype) -> float:
    """Bytes per token that a packed pass of three samples keeps, parameters left out."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=RAGGED_SDPA).train()
    lens = np.array([TOKENS // 2, TOKENS // 4, TOKENS // 4], np.int32)
    batch = Batch.offline(
        tokens=np.ones(TOKENS, np.int32),
        seq_lens=lens,
        loss_mask=np.arange(TOKENS) % 2 == 1,
        group_ids=np.arange(3),
        labels={},
        annotations={},
    )
    row = PackedRow.of(batch, torch.device("cpu"))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        packed_hidden_states(model, row)
    return sum(storage.nbytes() for storage in kept.values()) / TOKENS


@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen3_moe", "gpt_neox"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_pass_is_said_to_keep_is_what_it_keeps_within_30_percent(kind: str, dtype: torch.dtype) -> None:
    config = small(kind, hidden_size=128, intermediate_size=352, head_dim=32, moe_intermediate_size=96)
    assert saved_bytes_per_token(config, dtype) == pytest.approx(really_saved(config, dtype), rel=0.3)


def test_what_is_kept_grows_with_the_layers_and_not_with_the_weights_alone() -> None:
    one, two = (saved_bytes_per_token(small("llama", num_hidden_layers=n), torch.bfloat16) for n in (1, 2))
    assert 1.7 < two / one < 2.1
    vocabulary = saved_bytes_per_token(small("llama", vocab_size=16000), torch.bfloat16)
    assert vocabulary == saved_bytes_per_token(small("llama"), torch.bfloat16)
