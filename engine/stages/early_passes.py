"""Forward passes over groups as they finish, by models that have nothing else to do while others are generated.

Each group is a batch of its own, so that what comes out does not depend on the order in which groups finish.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from engine.data.batch import Batch

Pass = Callable[[Batch], np.ndarray]
"""[T] values of a batch's tokens."""


class EarlyPasses:
    """One thread for each model; results are kept until a batch asks for its samples."""

    def __init__(self, passes: Mapping[str, Pass]) -> None:
        self._passes = passes
        self._threads = {name: ThreadPoolExecutor(1, thread_name_prefix=name) for name in passes}
        self._started: dict[str, list[tuple[Batch, Future[np.ndarray]]]] = {name: [] for name in passes}

    def start(self, batch: Batch) -> None:
        """Begin all passes over a group's samples."""
        for name, call in self._passes.items():
            self._started[name].append((batch, self._threads[name].submit(call, batch)))

    def take(self, name: str, batch: Batch) -> np.ndarray | None:
        """[T] values of a batch's tokens, once they are there; None if the pass was not begun over every sample."""
        wanted = set(batch.sample_ids.tolist())
        mine: list[tuple[Batch, Future[np.ndarray]]] = []
        others: list[tuple[Batch, Future[np.ndarray]]] = []
        for held in self._started.get(name, []):
            (others if wanted.isdisjoint(held[0].sample_ids.tolist()) else mine).append(held)
        self._started[name] = others
        parts: dict[int, np.ndarray] = {}
        for group, result in mine:
            values = np.split(result.result(), np.cumsum(group.seq_lens)[:-1])
            parts |= dict(zip(group.sample_ids.tolist(), values, strict=True))
        if not wanted <= parts.keys():
            return None
        return np.concatenate([parts[sample] for sample in batch.sample_ids.tolist()])
