"""A batch over ranks and micro-batches, by cost, and the results back in the batch's order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.data.batch import Batch
from engine.data.prefixes import shared_prefixes
from engine.schedule.balancing import cost_of, plan_microbatches


@dataclass(frozen=True)
class Split:
    """A batch split by cost over ranks and micro-batches, and the way back."""

    batch: Batch
    plan: list[list[list[int]]]

    @staticmethod
    def of(
        batch: Batch,
        *,
        ranks: int,
        token_budget: int,
        hidden_size: int,
        whole_groups: bool = False,
        share: bool = True,
    ) -> Split:
        """Plan the split of a batch (see `plan_microbatches`).

        Samples of one group stay together as far as the budget allows, since what they begin with is then computed
        once (`share`); `whole_groups` keeps them together in any case and raises the budget to the largest group.
        """
        prefixes = shared_prefixes(batch, hidden_size) if share else [0] * len(batch)
        lens = batch.seq_lens.tolist()
        units = batch.groups() if whole_groups else _units(batch, prefixes, ranks=ranks, token_budget=token_budget)
        sizes = [_tokens(unit, lens, prefixes) for unit in units]
        costs = [
            cost_of(prefixes[unit[0]], hidden_size)
            + sum(cost_of(lens[i] - prefixes[i], hidden_size, seen=prefixes[i]) for i in unit)
            for unit in units
        ]
        budget = max([token_budget, *sizes]) if whole_groups else token_budget
        plan = plan_microbatches(sizes, ranks=ranks, token_budget=budget, costs=costs)
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


def _units(batch: Batch, prefixes: Sequence[int], *, ranks: int, token_budget: int) -> list[list[int]]:
    """Samples that are kept together: runs of a group that share what they begin with, and all others alone.

    A run is cut where it exceeds the budget, or a quarter of a rank's part of the batch, so that ranks can be balanced.
    """
    lens = batch.seq_lens.tolist()
    most = token_budget
    if ranks > 1:
        whole = sum(_tokens(group, lens, prefixes) for group in batch.groups())
        most = min(token_budget, whole // (4 * ranks))
    units: list[list[int]] = []
    for group in batch.groups():
        unit: list[int] = []
        for sample in group:
            joins = unit and prefixes[sample] > 0 and sample == unit[-1] + 1
            if joins and _tokens([*unit, sample], lens, prefixes) <= most:
                unit.append(sample)
                continue
            unit = [sample]
            units.append(unit)
    return units


def _tokens(unit: Sequence[int], lens: Sequence[int], prefixes: Sequence[int]) -> int:
    """Tokens of a row with these samples of one group."""
    return prefixes[unit[0]] + sum(lens[sample] - prefixes[sample] for sample in unit)
