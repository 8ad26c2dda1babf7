"""A batch over ranks and micro-batches, by cost, and the results back in the batch's order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.data.batch import Batch
from engine.schedule.balancing import plan_microbatches


@dataclass(frozen=True)
class Split:
    """A batch split by cost over ranks and micro-batches, and the way back."""

    batch: Batch
    plan: list[list[list[int]]]

    @staticmethod
    def of(batch: Batch, *, ranks: int, token_budget: int, hidden_size: int, whole_groups: bool = False) -> Split:
        """Plan the split of a batch (see `plan_microbatches`); `whole_groups` keeps a group's samples together.

        The budget is raised to the largest group.
        """
        units = batch.groups() if whole_groups else [[sample] for sample in range(len(batch))]
        lens = [int(batch.seq_lens[unit].sum()) for unit in units]
        budget = max([token_budget, *lens]) if whole_groups else token_budget
        plan = plan_microbatches(lens, ranks=ranks, token_budget=budget, hidden_size=hidden_size)
        return Split(batch, [[[s for unit in micro for s in units[unit]] for micro in share] for share in plan])

    def shares(self) -> list[list[Batch]]:
        """The micro-batches of each rank."""
        return [[self.batch.select(samples) for samples in share] for share in self.plan]

    def merge(self, results: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
        """[R] per token of each rank's micro-batches -> [T] in the batch's order, 0 on tokens that are not trained."""
        merged_T = np.zeros(len(self.batch.tokens), np.float32)
        ends = np.cumsum(self.batch.seq_lens)
        for share, values in zip(self.plan, results, strict=True):
            for samples, values_R in zip(share, values, strict=True):
                if not samples:
                    continue
                spans = [np.arange(ends[s] - self.batch.seq_lens[s], ends[s]) for s in samples]
                index_T = np.concatenate(spans)
                merged_T[index_T[self.batch.loss_mask[index_T]]] = values_R
        return merged_T

    def merge_samples(self, results: Sequence[Sequence[Sequence[Any]]]) -> list[Any]:
        """One result per sample of each rank's micro-batches -> [B] in the batch's own order."""
        merged: dict[int, Any] = {}
        for share, values in zip(self.plan, results, strict=True):
            for samples, held in zip(share, values, strict=True):
                merged |= dict(zip(samples, held, strict=True))
        return [merged[sample] for sample in range(len(self.batch))]
