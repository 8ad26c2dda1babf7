"""A micro-batch as one row without padding, in which samples of one group share the tokens that they begin with.

    group of three samples:  prompt A, prompt B C, prompt D
    row:                     prompt | A | B C | D          positions restart after the prompt for each response
    segments:                prompt sees prompt; A sees prompt A; B C sees prompt B C; D sees prompt D

What is shared is computed once, forward and backward: each of its tokens receives the gradients of all samples. Where
nothing is shared a segment is a sample.
Legend: T tokens of the row, R trained (response) tokens, B samples, S segments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engine.data.batch import Batch
from engine.data.prefixes import shared_prefixes


@dataclass(frozen=True)
class PackedRow:
    """One micro-batch on its device."""

    tokens: torch.Tensor
    """[1, T] int64."""
    position_ids: torch.Tensor
    """[1, T] int64, from 0 in each sample."""
    cu_seq_lens: torch.Tensor
    """[S + 1] int32: where segments begin and end in the row."""
    cu_key_lens: torch.Tensor
    """[S + 1] int32: where their keys begin and end in `key_index`."""
    key_index: torch.Tensor | None
    """int64: where in the row the keys of each segment lie; None: a segment's keys are its own tokens."""
    predictors: torch.Tensor
    """[R] int64: the position before each trained token."""
    trained_at: torch.Tensor
    """[R] int64: the position of each trained token."""
    targets: torch.Tensor
    """[R] int64: the trained tokens."""
    response_lens: torch.Tensor
    """[B] int64: trained tokens of each sample."""

    @staticmethod
    def of(batch: Batch, device: torch.device, *, hidden_size: int | None = None) -> PackedRow:
        """Pack a batch. An empty one becomes a single token without a target, so that every rank runs a pass.

        `hidden_size` is the model's, which decides where sharing pays; None shares nothing.
        """
        if len(batch) == 0:
            batch = Batch.offline(np.zeros(1, np.int32), np.ones(1, np.int32), np.zeros(1, bool), np.zeros(1, np.int64))
            response_lens = np.zeros(0, np.int64)
        else:
            response_lens = batch.response_lens
        layout = _Layout.of(batch, hidden_size)
        trained = np.flatnonzero(batch.loss_mask)
        assert (layout.position_of[trained] > 0).all(), "a sample's first token has no predictor and cannot be trained"

        def on_device(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        return PackedRow(
            tokens=on_device(batch.tokens[layout.kept].astype(np.int64))[None],
            position_ids=on_device(layout.position_of[layout.kept])[None],
            cu_seq_lens=on_device(_ends(layout.query_lens)),
            cu_key_lens=on_device(_ends([len(keys) for keys in layout.keys])),
            key_index=on_device(np.concatenate(layout.keys)) if layout.shares else None,
            predictors=on_device(layout.place_of[trained - 1]),
            trained_at=on_device(layout.place_of[trained]),
            targets=on_device(batch.tokens[trained].astype(np.int64)),
            response_lens=on_device(response_lens),
        )

    def attention_arguments(self) -> dict[str, Any]:
        """What the model hands on to its attention (actors/ragged_attention.py)."""
        return {
            "cu_seq_lens_q": self.cu_seq_lens,
            "cu_seq_lens_k": self.cu_key_lens,
            "max_length_q": int(torch.diff(self.cu_seq_lens).max()),
            "max_length_k": int(torch.diff(self.cu_key_lens).max()),
            "key_index": self.key_index,
        }


@dataclass(frozen=True)
class _Layout:
    """Which of a batch's tokens are in the row, and where."""

    kept: np.ndarray
    """[T]: the batch's tokens that make up the row."""
    place_of: np.ndarray
    """For every token of the batch: its place in the row, that of its group's first sample where it is shared."""
    position_of: np.ndarray
    """For every token of the batch: its position in its sample."""
    query_lens: list[int]
    """[S]."""
    keys: list[np.ndarray]
    """[S]: places of the keys of each segment."""

    @property
    def shares(self) -> bool:
        """Whether any token is shared."""
        return len(self.kept) < len(self.place_of)

    @staticmethod
    def of(batch: Batch, hidden_size: int | None) -> _Layout:
        lens = batch.seq_lens.tolist()
        prefixes = [0] * len(lens) if hidden_size is None else shared_prefixes(batch, hidden_size)
        place_of = np.zeros(len(batch.tokens), np.int64)
        kept, query_lens, keys = [], [], []
        start = place = 0
        prefix = np.zeros(0, np.int64)
        for sample, (length, shared) in enumerate(zip(lens, prefixes, strict=True)):
            leads = shared > 0 and (sample == 0 or batch.group_ids[sample] != batch.group_ids[sample - 1])
            if leads:
                prefix = np.arange(place, place + shared)
                kept.append(np.arange(start, start + shared))
                query_lens.append(shared)
                keys.append(prefix)
                place += shared
            own = np.arange(place, place + length - shared)
            place_of[start : start + length] = np.concatenate([prefix[:shared], own])
            if len(own):
                kept.append(np.arange(start + shared, start + length))
                query_lens.append(len(own))
                keys.append(place_of[start : start + length])
            start, place = start + length, place + len(own)
        ends = np.cumsum(batch.seq_lens, dtype=np.int64)
        positions = np.arange(len(batch.tokens)) - np.repeat(ends - batch.seq_lens, batch.seq_lens)
        return _Layout(np.concatenate(kept), place_of, positions, query_lens, keys)


def _ends(lens: list[int]) -> np.ndarray:
    return np.cumsum([0, *lens]).astype(np.int32)
