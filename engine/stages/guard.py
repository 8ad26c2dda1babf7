"""What is not finite teaches nothing: it is left out, kept as evidence, and stops the run when it does not cease.

Evidence is `incidents/step_000012.npz` in the run's folder: the batch as numpy arrays, under the names of its fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.data.batch import SAMPLE_FIELDS, TOKEN_FIELDS, Batch
from engine.roles import Trained
from engine.tracking.tracker import Tracker

INCIDENTS = "incidents"


class NumericsError(RuntimeError):
    """Too many updates in a row were skipped because a loss, a gradient or a log-prob was not finite."""


class NumericsGuard:
    """Counts updates that were skipped in a row."""

    def __init__(self, tracker: Tracker, *, stop_after: int) -> None:
        self.tracker = tracker
        self.stop_after = stop_after
        self.in_a_row = 0

    def update(self, trained: Trained, minibatches: Sequence[Batch], step: int) -> dict[str, float]:
        """`trained.update`, which skips what is not finite; returns its metrics.

        Raises:
            NumericsError: `stop_after` updates in a row were skipped.
        """
        metrics = trained.update(minibatches)
        [skipped] = [value for name, value in metrics.items() if name.endswith("/skipped_updates")]
        if skipped == 0:
            self.in_a_row = 0
            return metrics
        if skipped < len(minibatches):
            self.in_a_row = 0
        for batch in minibatches:
            self._keep(batch, step)
        self._count(int(skipped), step, "the loss or the gradient")
        return metrics

    def check(self, batch: Batch, step: int) -> bool:
        """Whether all numbers of a batch are finite; if not, it counts as a skipped update.

        Raises:
            NumericsError: as `update`.
        """
        broken = [name for name, values in batch.annotations.items() if not np.isfinite(values).all()]
        if broken:
            self._keep(batch, step)
            self._count(1, step, ", ".join(broken))
        return not broken

    def _keep(self, batch: Batch, step: int) -> None:
        folder = self.tracker.run_dir / INCIDENTS
        folder.mkdir(exist_ok=True)
        taken = len(list(folder.glob(f"step_{step:06d}*.npz")))
        arrays: dict[str, Any] = {name: getattr(batch, name) for name in (*TOKEN_FIELDS, *SAMPLE_FIELDS)}
        file = folder / (f"step_{step:06d}.npz" if taken == 0 else f"step_{step:06d}_{taken}.npz")
        np.savez(file, **arrays | batch.annotations | batch.labels | batch.rewards)

    def _count(self, skipped: int, step: int, what: str) -> None:
        self.in_a_row += skipped
        self.tracker.event("update_skipped", step=step, updates=skipped, in_a_row=self.in_a_row, not_finite=what)
        self.tracker.note(
            f"step {step}: {what} is not finite; {skipped} updates skipped, the samples are in {INCIDENTS}/"
        )
        if self.in_a_row >= self.stop_after:
            raise NumericsError(
                f"{self.in_a_row} updates in a row were skipped (optimizer.stop_after_skipped): {what} is not finite. "
                f"The weights are those before them. Lower optimizer.learning_rate, or inspect the samples in "
                f"{self.tracker.run_dir / INCIDENTS}"
            )
