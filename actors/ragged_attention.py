"""Causal attention within each sample of a packed row, where samples may share the tokens that they begin with.

A row is cut into segments (see actors/packed_row.py): each has its own queries, one segment after the other in the row,
and keys at any positions of the row, the last of which are the queries' own. Query i of a segment of Q queries and K
keys sees the first K - Q + i + 1 of them: the alignment that flash attention's varlen kernels have.
Legend: T tokens of the row, S segments, K_all keys of all segments together.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from engine.config import UserError

RAGGED_SDPA, RAGGED_VARLEN = "ragged_sdpa", "ragged_varlen"


def ragged_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor,
    cu_seq_lens_k: torch.Tensor,
    key_index: torch.Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Segment by segment, with torch's own kernels: [1, heads, T, head_dim] -> [1, T, heads, head_dim].

    `cu_seq_lens_q` and `cu_seq_lens_k` [S + 1] are where queries and keys of the segments begin and end; `key_index`
    [K_all] says where in the row the keys lie, None that they are the row itself.

    Raises:
        UserError: the model's attention has sinks or soft-capped scores, which these kernels do not compute.
    """
    if s_aux is not None or softcap is not None:
        raise UserError(
            f"model.path: the attention of {type(module).__name__} needs flash attention; use another model"
        )
    grouped = query.shape[1] != key.shape[1]
    if key_index is not None:
        key, value = key.index_select(2, key_index), value.index_select(2, key_index)
    queries, spans = torch.diff(cu_seq_lens_q).tolist(), torch.diff(cu_seq_lens_k).tolist()
    outs = []
    for q, k, v in zip(query.split(queries, 2), key.split(spans, 2), value.split(spans, 2), strict=True):
        mask = _mask(q.shape[2], k.shape[2], sliding_window, q.device)
        outs.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
            )
        )
    return torch.cat(outs, 2).transpose(1, 2).contiguous(), None


def ragged_varlen(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor,
    cu_seq_lens_k: torch.Tensor,
    max_length_q: int,
    max_length_k: int,
    key_index: torch.Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The same in one varlen kernel of flash attention (arXiv:2307.08691)."""
    from flash_attn import flash_attn_varlen_func

    if key_index is not None:
        key, value = key.index_select(2, key_index), value.index_select(2, key_index)
    out = flash_attn_varlen_func(
        *(states[0].transpose(0, 1) for states in (query, key, value)),
        cu_seq_lens_q,
        cu_seq_lens_k,
        max_length_q,
        max_length_k,
        softmax_scale=scaling,
        causal=True,
        window_size=(-1, -1) if sliding_window is None else (sliding_window - 1, 0),
        softcap=softcap or 0.0,
    )
    return out[None], None


def _mask(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """[queries, keys] bool: what each may see, itself and at most `window - 1` before; None where plain causal does."""
    if queries == keys and (window is None or keys <= window):
        return None
    at = torch.arange(keys, device=device)
    distance = at[keys - queries :, None] - at[None]
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


for name, attention in ((RAGGED_SDPA, ragged_sdpa), (RAGGED_VARLEN, ragged_varlen)):
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, lambda *args, **kwargs: None)


def attention_for(device: str, flash_attention_installed: bool) -> str:
    """Name of the attention that a packed row needs on this device."""
    return RAGGED_VARLEN if device == "cuda" and flash_attention_installed else RAGGED_SDPA
