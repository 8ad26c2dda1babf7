"""SIGTERM (a job that is stopped, a machine that is taken away) and Ctrl-C end a run as KeyboardInterrupt.

Ctrl-C does so at once. SIGTERM lets the loop reach the end of a step whose updates have begun, where there is a state
to save, for at most `PATIENCE_S`; a second signal does not cut the clean-up short.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

CLEAN_UP_S = 15.0
"""An interrupted run ends within this time, once it is interrupted."""
PATIENCE_S = 10.0
"""How long a step may take to its end after SIGTERM."""


class StopSignals:
    """The handlers of one run, put in by `with`; outside of the main thread they stay as they are."""

    def __init__(self) -> None:
        self.worth_waiting: Callable[[], bool] = lambda: False
        """Whether the end of the step is worth waiting for."""
        self._ignored_until = 0.0
        self._stopping = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
            self._previous[signal.SIGALRM] = signal.getsignal(signal.SIGALRM)
        self.catch()
        return self

    def catch(self) -> None:
        """Put the handlers in again, should a library have replaced them."""
        for number in self._previous:
            signal.signal(number, self._handle)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def step_is_over(self) -> None:
        """Raise KeyboardInterrupt if a signal has come during the step."""
        if self._stopping:
            self._interrupt()

    def _handle(self, signum: int, frame: Any) -> None:
        if signum == signal.SIGTERM and not self._stopping and self.worth_waiting():
            self._stopping = True
            signal.setitimer(signal.ITIMER_REAL, PATIENCE_S)
        elif time.monotonic() >= self._ignored_until:
            self._interrupt()

    def _interrupt(self) -> None:
        self._ignored_until = time.monotonic() + CLEAN_UP_S
        self._stopping = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        raise KeyboardInterrupt
