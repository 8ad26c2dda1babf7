"""What the backward pass of a model keeps, by watching a forward pass of tensors that have shapes but no memory.

torch tells which tensors autograd saves, on a model of fake tensors too, so the number holds for every architecture and
no list of its layers' intermediate results is needed. Attention is stood for by what flash attention keeps
(arXiv:2205.14135): queries, keys, values, the output and one number per head and token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, PreTrainedConfig
from transformers.masking_utils import AttentionMaskInterface

from engine.model_shape import empty_model

WATCHED_TOKENS = 256
"""Length of the pass that is watched; what is kept grows with it in proportion."""
_ATTENTION = "watched"


class _KeptByFlashAttention(torch.autograd.Function):
    """Keeps what flash attention keeps and computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """[1, heads, T, size], three times -> [1, T, heads, size of a value]."""
        batch, heads, tokens, _ = query.shape
        out = query.new_empty(batch, tokens, heads, value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(batch, heads, tokens, dtype=torch.float32))
        return out


def _watched_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: None, **_: Any
) -> tuple[torch.Tensor, None]:
    return _KeptByFlashAttention.apply(query, key, value), None


AttentionInterface.register(_ATTENTION, _watched_attention)
AttentionMaskInterface.register(_ATTENTION, lambda *args, **kwargs: None)


def saved_bytes_per_token(
    config: PreTrainedConfig | Mapping[str, Any], dtype: torch.dtype, *, trust_remote_code: bool = False
) -> int:
    """Bytes that one token's forward pass through the decoder keeps for the backward pass, without checkpointing.

    The products of a mixture's experts have shapes for bfloat16 only, so in float32 twice that is told; it is a little
    too much, since some results are float32 anyway.

    Raises:
        UserError: transformers has no such causal language model.
        RuntimeError: its forward pass depends on values, which fake tensors do not have.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):  # some models make a constant on the side
        arguments = {"attn_implementation": _ATTENTION, "trust_remote_code": trust_remote_code}
        model = empty_model(config, dtype=dtype, **arguments).train()
        if dtype != torch.bfloat16 and any(".experts." in name for name, _ in model.named_parameters()):
            half = saved_bytes_per_token(config, torch.bfloat16, trust_remote_code=trust_remote_code)
            return half * dtype.itemsize // 2
        weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = storage  # alive, so that no other one takes its place
            return tensor

        tokens = torch.zeros(1, WATCHED_TOKENS, dtype=torch.long, device="meta")
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.base_model(input_ids=tokens, position_ids=tokens, attention_mask=None, use_cache=False)
        return sum(storage.nbytes() for storage in kept.values()) // WATCHED_TOKENS
