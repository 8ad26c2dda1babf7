"""The controller's side of the reward pool: start scoring a group at once, collect the scores as they come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from actors.group import WorkerGroup, as_completed
from engine.config import Config
from engine.rewards.contract import Sample, Scores


class RewardGroup:
    """Scores several groups at the same time; a slow function holds up its own group only."""

    def __init__(self, config: Config, workers: WorkerGroup) -> None:
        self.config = config
        self.workers = workers
        self._pending: dict[Any, int] = {}

    def submit(self, key: int, samples: Sequence[Sample]) -> None:
        """Start scoring; results come from `collect`."""
        self._pending[self.workers.submit(0, "score", list(samples))] = key

    def collect(self) -> Iterator[tuple[int, Scores]]:
        """Yields (key, scores) of everything submitted, as it is done."""
        keys, self._pending = self._pending, {}
        names = dict.fromkeys(keys, self.workers.rank_name(0))
        for ref, scores in as_completed(names, "score", self.config.timeouts.reward):
            yield keys[ref], scores
