"""Ragged batches: flat arrays plus lengths, never padded. numpy, so that the object store reads them without a copy.

Legend: B samples, T = sum(seq_lens) tokens (prompt, response and observations, sample after sample).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

TOKEN_FIELDS = ("tokens", "loss_mask", "rollout_logp", "version")
SAMPLE_FIELDS = ("seq_lens", "group_ids", "sample_ids", "totals")


@dataclass(frozen=True)
class Batch:
    """Samples of the policy, token by token."""

    tokens: np.ndarray
    """[T] int32: token ids."""
    seq_lens: np.ndarray
    """[B] int32: tokens of each sample."""
    loss_mask: np.ndarray
    """[T] bool: True on tokens that the policy produced and is trained on."""
    rollout_logp: np.ndarray
    """[T] float32: log-prob under the sampling distribution (temperature included); 0 where not generated."""
    version: np.ndarray
    """[T] int32: weight version that produced each token; -1 where not generated."""
    group_ids: np.ndarray
    """[B] int64: prompt group."""
    sample_ids: np.ndarray
    """[B] int64: unique id in the ledger."""
    totals: np.ndarray
    """[B] float32: reward, the weighted sum of the components."""
    rewards: dict[str, np.ndarray] = field(default_factory=dict)
    """name -> [B] float32: each component, unweighted; NaN is "no opinion"."""
    annotations: dict[str, np.ndarray] = field(default_factory=dict)
    """name -> [T] float32: `advantages`, `ref_logp`, `old_logp`; 0 where loss_mask is False."""

    def __post_init__(self) -> None:
        total = int(self.seq_lens.sum())
        flat = ((name, getattr(self, name)) for name in TOKEN_FIELDS)
        for name, values in [*flat, *self.annotations.items()]:
            assert len(values) == total, f"{name} has {len(values)} tokens, not {total}"
        per_sample = ((name, getattr(self, name)) for name in SAMPLE_FIELDS)
        for name, values in [*per_sample, *self.rewards.items()]:
            assert len(values) == len(self.seq_lens), f"{name} has {len(values)} samples, not {len(self.seq_lens)}"

    def __len__(self) -> int:
        return len(self.seq_lens)

    @property
    def response_lens(self) -> np.ndarray:
        """[B] int64: trained tokens of each sample."""
        return np.add.reduceat(self.loss_mask, self._starts(), dtype=np.int64) if len(self) else np.zeros(0, np.int64)

    def select(self, samples: Sequence[int] | np.ndarray) -> Batch:
        """The samples at these positions, in this order."""
        index_B = np.asarray(samples, dtype=np.int64)
        spans = [np.arange(s, s + n) for s, n in zip(self._starts()[index_B], self.seq_lens[index_B], strict=True)]
        index_T = np.concatenate(spans) if spans else np.zeros(0, np.int64)
        chosen = {name: getattr(self, name)[index_T] for name in TOKEN_FIELDS}
        chosen |= {name: getattr(self, name)[index_B] for name in SAMPLE_FIELDS}
        return Batch(
            **chosen,
            rewards={name: values[index_B] for name, values in self.rewards.items()},
            annotations={name: values[index_T] for name, values in self.annotations.items()},
        )

    def annotate(self, **annotations: np.ndarray) -> Batch:
        """The same samples with more annotations."""
        return replace(self, annotations=self.annotations | annotations)

    def _starts(self) -> np.ndarray:
        return np.cumsum(self.seq_lens, dtype=np.int64) - self.seq_lens
