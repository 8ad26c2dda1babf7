"""Checkpoints beside the training: captured in memory between two steps, written by a thread while the next ones run.

    save(): wait for the one before --> every rank copies its state --> the training goes on
                                                                   \\-> thread: ranks write, manifest, rename, rotate

A checkpoint that cannot be written is an incident; the older ones stay, and the next is tried in its turn.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from engine.checkpoint import Checkpoints
from engine.remote_checkpoints import RemoteCheckpoints
from engine.roles import Report, Trained
from engine.schedule.incidents import Incident


class Saver:
    """Writes one checkpoint at a time."""

    def __init__(self, checkpoints: Checkpoints | RemoteCheckpoints, report: Report, *, timeout_s: float) -> None:
        """`timeout_s` is how long a checkpoint may take to be written."""
        self.checkpoints = checkpoints
        self.report = report
        self.saved: int | None = None
        """Step of the last checkpoint that is whole."""
        self._timeout_s = timeout_s
        self._writing: Future[int] | None = None

    def save(self, step: int, state: dict[str, Any], models: Mapping[str, Trained]) -> None:
        """Take the state of a step, and begin to write it. One that is still being written is waited for."""
        self.settle()
        if self._writing is not None:
            return  # storage that hangs must not hold up the training as well
        for model in models.values():
            model.capture_state()
        written = self._writing = Future[int]()

        def write() -> None:
            try:
                with self.checkpoints.writing(step, state) as folder:
                    for name, model in models.items():
                        model.write_state(f"{folder}/{name}")
                written.set_result(step)
            except BaseException as error:
                written.set_exception(error)

        threading.Thread(target=write, name="checkpoint", daemon=True).start()

    def poll(self) -> None:
        """Tell of a checkpoint that could not be written, if that is known by now."""
        if self._writing is not None and self._writing.done():
            self.settle()

    def settle(self, within_s: float | None = None) -> None:
        """Wait until the checkpoint that is being written is whole, or known to have failed."""
        if self._writing is None:
            return
        try:
            self.saved = self._writing.result(self._timeout_s if within_s is None else within_s)
        except Exception as error:
            action = "the older ones stay, the next is tried in its turn"
            message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            if self._writing.done():  # else it hangs, and may yet come to its end
                self._writing = None
            self.report(Incident("checkpoint_failed", "checkpoint", action, message))
        else:
            self._writing = None
