"""What every trained model's actor and group share: updates over split batches, metrics, saving, checkpoints.

controller: TrainedGroup                  ranks: TrainedActor
split each batch by cost    ------->      one loss per micro-batch, summed into one optimizer update
metrics of rank 0           <-------      metrics reduced over ranks
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from actors.group import WorkerGroup
from actors.packed_row import PackedRow
from actors.process import RankInfo
from actors.split import Split
from actors.trainer import Trainable, Trainer
from actors.trainer_state import Captured
from engine.config import Config
from engine.data.batch import Batch


@dataclass(frozen=True)
class Minibatch:
    """One rank's share of one optimizer update, with the denominators of all ranks together."""

    microbatches: Sequence[Batch]
    total_tokens: int
    """Trained tokens of the whole update."""
    total_sequences: int
    """Samples with a trained token in the whole update."""
    total_groups: int
    """Groups (pairs, rankings) in the whole update."""
    total_chosen_tokens: int
    """Of pairs: trained tokens of the chosen samples in the whole update."""


@dataclass
class Stats:
    """Means and maxima of values seen in an update, over micro-batches and ranks.

    Every rank names the same `means` and `maxima`, whether or not it had samples, since they are reduced together.
    """

    means: tuple[str, ...]
    maxima: tuple[str, ...] = ()
    sums: dict[str, tuple[float, int]] = field(default_factory=dict)
    tops: dict[str, float] = field(default_factory=dict)

    def add(self, values: Mapping[str, torch.Tensor]) -> None:
        """Take values, one per token, sample or pair, into the means."""
        for name, x in values.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + float(x.detach().double().sum()), count + x.numel())

    def maximum(self, values: Mapping[str, torch.Tensor]) -> None:
        """Keep the largest absolute value."""
        for name, x in values.items():
            largest = float(x.detach().abs().max()) if x.numel() else 0.0
            self.tops[name] = max(self.tops.get(name, 0.0), largest)

    def merge(self, other: Stats) -> None:
        """Take in what another update saw."""
        for name, (total, count) in other.sums.items():
            before, number = self.sums.get(name, (0.0, 0))
            self.sums[name] = (before + total, number + count)
        for name, top in other.tops.items():
            self.tops[name] = max(self.tops.get(name, 0.0), top)

    def reduce(self, trainer: Trainer) -> dict[str, float]:
        """Global values under their names; what nobody saw is left out."""
        assert set(self.sums) <= set(self.means), "an undeclared mean"
        assert set(self.tops) <= set(self.maxima), "an undeclared maximum"
        pairs = torch.tensor([self.sums.get(name, (0.0, 0)) for name in self.means], dtype=torch.float64)
        pairs = trainer.all_reduce(pairs.reshape(-1, 2))
        tops = torch.tensor([self.tops.get(name, 0.0) for name in self.maxima], dtype=torch.float64)
        tops = trainer.all_reduce(tops, dist.ReduceOp.MAX)
        seen = zip(self.means, pairs.tolist(), strict=True)
        return {name: total / count for name, (total, count) in seen if count} | dict(
            zip(self.maxima, tops.tolist(), strict=True)
        )


class TrainedActor(ABC):
    """One rank of a trained model. Subclasses say what is trained (`make`) and on what loss (`loss`)."""

    prefix = "train"
    """Of the metrics that every update has."""

    def __init__(self, config: Config, info: RankInfo, updates: int) -> None:
        """`updates` is the run's total number of optimizer updates, for the learning-rate schedule."""
        self.config = config
        self.info = info
        self.updates = updates
        self._captured: Captured | None = None

    def start(self) -> None:
        """Join the process group and load the model."""
        self.trainer = Trainer(self.config, self.info, self.make, self.updates)

    @abstractmethod
    def make(self) -> Trainable:
        """The model, its adapter, and the module that the engine runs."""

    @abstractmethod
    def new_stats(self) -> Stats:
        """Names of the metrics that `loss` reports."""

    @abstractmethod
    def loss(self, batch: Batch, minibatch: Minibatch, stats: Stats) -> torch.Tensor:
        """This micro-batch's share of the global loss; of an empty batch 0, after the same forward pass."""

    def row(self, batch: Batch) -> PackedRow:
        """A micro-batch as the model takes it."""
        hidden_size = None if self.config.model.adapter.virtual else self.hidden_size()
        return PackedRow.of(batch, self.trainer.device, hidden_size=hidden_size)

    def hidden_size(self) -> int:
        """Width of the model, for the cost of a sample."""
        return int(self.trainer.model.config.get_text_config().hidden_size)

    def update(self, minibatches: Sequence[Minibatch]) -> dict[str, float]:
        """One optimizer update per minibatch; returns global metrics, equal on every rank.

        Updates whose loss or gradient is not finite are skipped and counted, and leave no other trace.
        """
        seen, updates, skipped = self.new_stats(), [], 0
        for minibatch in minibatches:
            stats = self.new_stats()
            losses = [partial(self.loss, batch, minibatch, stats) for batch in minibatch.microbatches]
            update = self.trainer.update(losses)
            if update is None:
                skipped += 1
                continue
            updates.append(update)
            seen.merge(stats)
            if self.enough(stats):
                break
        metrics = {name: float(np.mean([u[name] for u in updates])) for name in (updates[0] if updates else {})}
        metrics |= {"updates": float(len(updates)), "skipped_updates": float(skipped)}
        return {f"{self.prefix}/{name}": value for name, value in metrics.items()} | seen.reduce(self.trainer)

    def enough(self, stats: Stats) -> bool:
        """Whether the remaining updates of this call are to be left out, after one that saw `stats`; on every rank."""
        return False

    def save(self, folder: Path, record: dict[str, Any] | None = None) -> None:
        """Write the model in Hugging Face format."""
        self.trainer.save(folder, record)

    def capture_state(self) -> None:
        """Keep a copy of what training goes on from, in memory."""
        self._captured = self.trainer.state.capture()

    def write_state(self, folder: str) -> None:
        """Write the copy, beside the training; it is given up."""
        assert self._captured is not None, "capture_state comes before write_state"
        try:
            self.trainer.state.write(self._captured, folder)
        finally:
            self._captured = None

    def load_state(self, folder: str) -> None:
        """Go on from what `write_state` wrote, on any number of ranks."""
        self.trainer.state.restore(folder)

    def sleep(self) -> None:
        """Leave the device's memory to others until `wake`."""
        self.trainer.sleep()

    def wake(self) -> None:
        """Return to the device."""
        self.trainer.wake()


class TrainedGroup:
    """The controller's side: splits batches over the ranks and gathers what they return."""

    def __init__(self, config: Config, workers: WorkerGroup) -> None:
        self.config = config
        self.workers = workers
        self.changes = 0
        self.hidden_size = workers.call("hidden_size", timeout_s=config.timeouts.start)[0]
        pairs = config.stage == "rl" and config.algorithm.trains_pairs
        self._whole_groups = pairs or config.stage in ("preference", "reward_model")

    def update(self, minibatches: Sequence[Batch]) -> dict[str, float]:
        """One optimizer update per minibatch; returns metrics over all of them."""
        per_rank: list[list[Minibatch]] = [[] for _ in self.workers.actors]
        for batch in minibatches:
            trained_lens = batch.response_lens
            totals = (
                int(trained_lens.sum()),
                int((trained_lens > 0).sum()),
                len(np.unique(batch.group_ids)),
                int(trained_lens[0::2].sum()),
            )
            for share, minibatch in zip(self._split(self.needed(batch)).shares(), per_rank, strict=True):
                minibatch.append(Minibatch(share, *totals))
        self.changes += 1
        return self.workers.scatter("update", per_rank, timeout_s=self.config.timeouts.update)[0]

    def needed(self, batch: Batch) -> Batch:
        """The samples that the loss depends on; the others count in its denominators and are not computed."""
        return batch

    def save(self, folder: Path, record: dict[str, Any] | None = None) -> None:
        """Write the model in Hugging Face format, whole or not at all."""
        self.workers.call("save", folder, record, timeout_s=self.config.timeouts.publish)

    def capture_state(self) -> None:
        """Keep a copy of what training goes on from, in the ranks' memory."""
        self.workers.call("capture_state", timeout_s=self.config.timeouts.publish)

    def write_state(self, folder: str) -> None:
        """Write the copy into a folder or URL that every rank reaches; the training may go on meanwhile."""
        self.workers.call("write_state", folder, aside=True, timeout_s=self.config.timeouts.publish)

    def load_state(self, folder: str) -> None:
        """Go on from what `write_state` wrote, on any number of ranks."""
        self.workers.call("load_state", folder, timeout_s=self.config.timeouts.publish)

    def _split(self, batch: Batch) -> Split:
        return Split.of(
            batch,
            ranks=len(self.workers.actors),
            token_budget=self.config.policy.tokens_per_microbatch,
            hidden_size=self.hidden_size,
            whole_groups=self._whole_groups,
            share=not self.config.model.adapter.virtual,
        )
