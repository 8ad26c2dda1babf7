"""What a person watches: one line per step, and on a terminal a live bar below them.

Without a terminal (a job's log, a file) there are only the lines, without control codes.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Mapping
from datetime import timedelta
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

STEPS_IN_ETA = 20
"""The ETA takes the mean of this many last steps, so that it follows responses that grow longer."""

SHOWN = {
    "reward/mean": "reward {:.4f}",
    "train/loss": "loss {:.4f}",
    "train/accuracy": "accuracy {:.3f}",
    "policy/kl": "KL {:.3g}",
    "time/tokens_per_second": "{:.0f} tok/s",
}
"""Metrics in the line of a step, where a stage measures them."""


class Progress:
    """The progress of one stage: `with Progress("grpo", total=100) as progress: progress.step(1, metrics)`."""

    def __init__(self, stage: str, total: int, start: int = 0, *, file: TextIO | None = None) -> None:
        """`total` is the number of steps, of which `start` were done before; `file` is by default standard output."""
        self._stage, self._total, self._start = stage, total, start
        self._file = file
        self._seconds: deque[float] = deque(maxlen=STEPS_IN_ETA)
        self._bar: RichProgress | None = None

    def __enter__(self) -> Progress:
        out = self._file or sys.stdout
        if out.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
            console = Console(file=out, force_terminal=True, highlight=False)
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"))
            self._bar = RichProgress(*columns, console=console, transient=True)
            state = f"{self._start}/{self._total}"
            self._task = self._bar.add_task(self._stage, total=self._total, completed=self._start, state=state)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show that step number `step` (`start` + 1 to `total`) is done, with the metrics that `SHOWN` names.

        The ETA follows from `time/step` (seconds).
        """
        if "time/step" in metrics:
            self._seconds.append(float(metrics["time/step"]))
        line = f"{self._stage}  step {step:>{len(str(self._total))}}/{self._total}"
        for name, shape in SHOWN.items():
            if name in metrics:
                line += "  " + shape.format(float(metrics[name]))
        if self._seconds:
            line += f"  {self._seconds[-1]:.1f} s/step  ETA {self._eta(step)}"
        self._print(line)
        if self._bar:
            state = f"{step}/{self._total}" + (f"  ETA {self._eta(step)}" if self._seconds else "")
            self._bar.update(self._task, completed=step, state=state)

    def _eta(self, step: int) -> str:
        left = max(0, self._total - step) * sum(self._seconds) / len(self._seconds)
        return str(timedelta(seconds=round(left)))

    def _print(self, line: str) -> None:
        if self._bar:
            self._bar.console.print(Text(line), soft_wrap=True)
        else:
            print(line, file=self._file or sys.stdout, flush=True)
