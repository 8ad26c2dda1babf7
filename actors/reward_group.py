"""The controller's side of the reward pool: start scoring a group at once, collect the scores as they come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import ray

from actors.group import WorkerGroup, as_completed
from engine.config import Config
from engine.rewards.contract import Sample, Scores


class RewardGroup:
    """Scores several groups at the same time; a slow function holds up its own group only."""

    def __init__(self, config: Config, workers: WorkerGroup) -> None:
        self.config = config
        self.workers = workers
        self._pending: dict[Any, int] = {}
        self._done: list[tuple[int, Scores]] = []

    def submit(self, key: int, samples: Sequence[Sample]) -> None:
        """Start scoring; results come from `collect`. Raises what earlier calls have raised by now."""
        self._pending[self.workers.submit(0, "score", list(samples))] = key
        finished, _ = ray.wait(list(self._pending), num_returns=len(self._pending), timeout=0)
        self._done += self._wait_for(finished)

    def collect(self) -> Iterator[tuple[int, Scores]]:
        """Yields (key, scores) of everything submitted, as it is done."""
        done, self._done = self._done, []
        yield from done
        yield from self._wait_for(list(self._pending))

    def _wait_for(self, refs: Sequence[Any]) -> Iterator[tuple[int, Scores]]:
        names = dict.fromkeys(refs, self.workers.rank_name(0))
        for ref, scores in as_completed(names, "score", self.config.timeouts.reward):
            yield self._pending.pop(ref), scores
