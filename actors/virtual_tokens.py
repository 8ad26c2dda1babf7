"""Virtual tokens of prompt and prefix tuning in a packed row, which has no padding.

    samples        a1 a2 a3 | b1 b2
    with V = 2     v v a1 a2 a3 | v v b1 b2      positions 0 1 2 3 4 | 0 1 2 3

Legend: B samples and T tokens of a packed row, V virtual tokens, H width of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache


class Places:
    """Where tokens and virtual tokens lie once V virtual ones are in front of every sample of a packed row."""

    def __init__(self, cu_seq_lens: torch.Tensor, position_ids: torch.Tensor, virtual: torch.Tensor) -> None:
        self.cu_seq_lens = cu_seq_lens
        """[B + 1] int32."""
        self.position_ids = position_ids
        """[T + B * V] int64."""
        self.virtual_at = virtual.nonzero()[:, 0]
        """[B * V] int64."""
        self.token_at = (~virtual).nonzero()[:, 0]
        """[T] int64."""

    @staticmethod
    def of(cu_seq_lens: torch.Tensor, virtual_tokens: int) -> Places:
        """From where samples begin and end without them, [B + 1]."""
        lengths_B = torch.diff(cu_seq_lens) + virtual_tokens
        samples = torch.arange(len(cu_seq_lens), device=cu_seq_lens.device, dtype=cu_seq_lens.dtype)
        ends = cu_seq_lens + virtual_tokens * samples
        positions = torch.arange(int(ends[-1]), device=ends.device) - ends[:-1].long().repeat_interleave(lengths_B)
        return Places(ends, positions, positions < virtual_tokens)

    def insert(self, words_TH: torch.Tensor, virtual_VH: torch.Tensor) -> torch.Tensor:
        """[T + B * V, H]: the virtual tokens in front of every sample."""
        samples = len(self.cu_seq_lens) - 1
        both = torch.cat([virtual_VH.repeat(samples, 1), words_TH])
        return both[torch.cat([self.virtual_at, self.token_at]).argsort()]

    def overwrite(self, states: torch.Tensor, virtual: torch.Tensor) -> torch.Tensor:
        """[1, heads, T + B * V, head_dim] with [1, heads, V, head_dim] at the virtual tokens of every sample."""
        samples = len(self.cu_seq_lens) - 1
        return states.index_copy(2, self.virtual_at, virtual.to(states.dtype).repeat(1, 1, samples, 1))


class PrefixInRow(Cache):
    """Hands every layer the trained keys and values in place of those that it computed for the virtual tokens.

    What a layer computes at the virtual tokens is therefore seen by no token.
    """

    def __init__(self, prefix: Sequence[tuple[torch.Tensor, torch.Tensor]], places: Places) -> None:
        """`prefix` holds keys and values [1, heads, V, head_dim] of every layer."""
        super().__init__(layers=[])
        self._prefix = prefix
        self._places = places

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[1, heads, T + B * V, head_dim], twice."""
        keys, values = self._prefix[layer_idx]
        return self._places.overwrite(key_states, keys), self._places.overwrite(value_states, values)


class Recorder(Cache):
    """Keeps each layer's keys and values as they come."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.states: list[tuple[torch.Tensor, torch.Tensor]] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[1, heads, T, head_dim], twice, unchanged."""
        self.states.append((key_states, value_states))
        return key_states, value_states
