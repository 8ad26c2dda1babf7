"""The order in which rows are used: shuffled each epoch, driven by the seed, resumable to the row."""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.config import UserError


class RowSampler:
    """Endless indices in [0, num_rows), every row once per epoch, each epoch in its own order.

    The order of an epoch depends on (seed, epoch) alone, so the state is two counters.

    Raises:
        UserError: there are no rows.
    """

    def __init__(self, num_rows: int, *, seed: int) -> None:
        if num_rows < 1:
            raise UserError("there are no rows to sample from; check data.train and what was skipped")
        self._num_rows = num_rows
        self._seed = seed
        self._start_epoch(0)

    def _start_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._position = 0
        self._order = np.random.default_rng([self._seed, epoch]).permutation(self._num_rows)

    def next(self, count: int) -> list[int]:
        """The next `count` row indices.

        An epoch's tail is carried over, never dropped: the boundary may fall inside the result, and then (always when
        `count > num_rows`) a row may occur in it more than once.
        """
        chosen: list[int] = []
        while len(chosen) < count:
            if self._position == self._num_rows:
                self._start_epoch(self._epoch + 1)
            span = self._order[self._position : self._position + count - len(chosen)].tolist()
            self._position += len(span)
            chosen += span
        return chosen

    @property
    def epoch(self) -> int:
        """The epoch of the index returned last, from 0."""
        return self._epoch

    def state_dict(self) -> dict[str, Any]:
        """Where the sampler stands: plain integers, for a checkpoint."""
        return {
            "num_rows": self._num_rows,
            "seed": self._seed,
            "epoch": self._epoch,
            "position": self._position,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken.

        Raises:
            UserError: it was taken with another number of rows or another seed, so the order would differ.
        """
        for key, mine in (("num_rows", self._num_rows), ("seed", self._seed)):
            if state[key] != mine:
                raise UserError(
                    f"cannot resume the order of rows: the checkpoint has {key} {state[key]}, this run has {mine}; "
                    "resume with the same data and seed"
                )
        self._start_epoch(int(state["epoch"]))
        self._position = int(state["position"])
