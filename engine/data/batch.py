"""Ragged batches: flat arrays plus lengths, never padded. numpy, so that the object store reads them without a copy.

Legend: B samples, T = sum(seq_lens) tokens (prompt, response and observations, sample after sample). Samples of one
group (the responses to a prompt, the two of a pair) have the same `group_ids`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

TOKEN_FIELDS = ("tokens", "loss_mask", "rollout_logp", "version")
SAMPLE_FIELDS = ("seq_lens", "group_ids", "sample_ids", "totals")


@dataclass(frozen=True)
class Batch:
    """Samples, token by token: of the policy, or of rows (see `offline`)."""

    tokens: np.ndarray
    """[T] int32: token ids."""
    seq_lens: np.ndarray
    """[B] int32: tokens of each sample."""
    loss_mask: np.ndarray
    """[T] bool: True on tokens that are trained on (or, for a reward model, scored)."""
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
    """name -> [T] float32: log-probs under other weights (`old_logp`, `ref_logp`, `start_logp`), `values`, `returns`,
    `advantages`, `labels`, `step_ends`, `step_rewards`; 0 where loss_mask is False."""
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    """name -> [B] float32: what is known of a sample, e.g. `rank`, `margin`, `kl_coef`; `ref_logp`, a sum over it."""

    @staticmethod
    def offline(
        tokens: np.ndarray,
        seq_lens: np.ndarray,
        loss_mask: np.ndarray,
        group_ids: np.ndarray,
        *,
        labels: dict[str, np.ndarray] | None = None,
        annotations: dict[str, np.ndarray] | None = None,
    ) -> Batch:
        """Samples that no policy of this run generated."""
        return Batch(
            tokens=tokens,
            seq_lens=seq_lens,
            loss_mask=loss_mask,
            rollout_logp=np.zeros(len(tokens), np.float32),
            version=np.full(len(tokens), -1, np.int32),
            group_ids=group_ids,
            sample_ids=np.arange(len(seq_lens), dtype=np.int64),
            totals=np.zeros(len(seq_lens), np.float32),
            annotations=annotations or {},
            labels=labels or {},
        )

    def __post_init__(self) -> None:
        total = int(self.seq_lens.sum())
        flat = ((name, getattr(self, name)) for name in TOKEN_FIELDS)
        for name, values in [*flat, *self.annotations.items()]:
            assert len(values) == total, f"{name} has {len(values)} tokens, not {total}"
        per_sample = ((name, getattr(self, name)) for name in SAMPLE_FIELDS)
        for name, values in [*per_sample, *self.rewards.items(), *self.labels.items()]:
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
            labels={name: values[index_B] for name, values in self.labels.items()},
        )

    def annotate(self, **annotations: np.ndarray) -> Batch:
        """The same samples with more annotations."""
        return replace(self, annotations=self.annotations | annotations)

    def label(self, **labels: np.ndarray) -> Batch:
        """The same samples with more labels."""
        return replace(self, labels=self.labels | labels)

    def groups(self) -> list[list[int]]:
        """Positions of each group's samples, groups in the order of their first one."""
        members: dict[int, list[int]] = {}
        for position, group in enumerate(self.group_ids.tolist()):
            members.setdefault(group, []).append(position)
        return list(members.values())

    def sum_per_sample(self, values_T: np.ndarray) -> np.ndarray:
        """[B] float64 sums over each sample's trained tokens."""
        kept = np.where(self.loss_mask, values_T, 0.0)
        return np.add.reduceat(kept, self._starts(), dtype=np.float64) if len(self) else np.zeros(0)

    def _starts(self) -> np.ndarray:
        return np.cumsum(self.seq_lens, dtype=np.int64) - self.seq_lens
