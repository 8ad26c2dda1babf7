"""How a run is doing, read from its folder alone: nothing is asked, nothing is changed."""

from __future__ import annotations

import fcntl
import time
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np

from engine.config import UserError
from engine.tracking.console import SHOWN, STEPS_IN_ETA
from engine.tracking.jsonl import read_rows
from engine.tracking.run_folder import EVENTS, METRICS

State = Literal["starting", "running", "succeeded", "failed", "interrupted", "killed"]
FAILURES = ("reward_error", "reward_timeout", "environment_error", "environment_timeout")
"""Events of calls of the user's code that came to nothing."""


@dataclass(frozen=True)
class Status:
    """What is known of a run."""

    name: str
    state: State
    """`killed`: its process is gone and has not said goodbye."""
    doing: str
    """Phase of the step and how long it has taken, while it runs; else why it ended."""
    step: int
    total: int | None
    """None until it is known."""
    seconds_left: float | None
    metrics: dict[str, float]
    """Of the last step."""
    incidents: dict[str, int]
    """Of machines and of user code, by kind."""
    alarms: dict[str, int]
    checkpoints: list[int]
    """Steps of those in the run's folder."""

    def lines(self) -> list[str]:
        """For a person."""
        total = f" of {self.total}" if self.total is not None else ""
        left = f", {timedelta(seconds=round(self.seconds_left))} left" if self.seconds_left is not None else ""
        shown = [text.format(self.metrics[name]) for name, text in SHOWN.items() if name in self.metrics]
        found = [
            ("", f"{self.name}: {self.state}{f' ({self.doing})' if self.doing else ''}"),
            ("step", f"{self.step}{total}{left}"),
            ("last step", ", ".join(shown)),
            ("incidents", _counted(self.incidents) or "none"),
            ("alarms", _counted(self.alarms)),
            ("checkpoints", ", ".join(f"step {step}" for step in self.checkpoints)),
        ]
        return [f"{label}: {text}" if label else text for label, text in found if text]


def status_of(run_dir: Path) -> Status:
    """The state of a run.

    Raises:
        UserError: the folder is not a run's.
    """
    events = read_rows(run_dir / EVENTS)
    if not events:
        raise UserError(f"{run_dir}: holds no {EVENTS}; give the folder of a run, runs/<name>")
    begun = max((i for i, e in enumerate(events) if e["kind"] in ("run_started", "run_resumed")), default=0)
    last_start = events[begun:]
    steps = [row for row in read_rows(run_dir / METRICS) if "time/step" in row]
    step = int(steps[-1]["step"]) if steps else 0
    totals = [int(event["total"]) for event in events if event["kind"] == "training"]
    total = totals[-1] if totals else None
    state = _state(run_dir, last_start)
    alive = state in ("starting", "running")
    seconds = [row["time/step"] for row in steps[-STEPS_IN_ETA:]]
    return Status(
        name=str(events[0].get("name", run_dir.name)),
        state=state,
        doing=_doing(last_start) if alive else _why(last_start),
        step=step,
        total=total,
        seconds_left=float(np.mean(seconds)) * (total - step) if alive and seconds and total is not None else None,
        metrics={name: value for name, value in (steps[-1] if steps else {}).items() if isinstance(value, float)},
        incidents=dict(
            Counter(e["incident"] for e in events if e["kind"] == "incident")
            + Counter(e["kind"] for e in events if e["kind"] in FAILURES)
        ),
        alarms=dict(Counter(event["alarm"] for event in events if event["kind"] == "alarm")),
        checkpoints=sorted(int(path.parent.name[5:]) for path in run_dir.glob("checkpoints/step_*[0-9]/manifest.json")),
    )


def _state(run_dir: Path, events: list[dict[str, Any]]) -> State:
    ended = [event["status"] for event in events if event["kind"] == "run_ended"]
    if ended:
        return ended[-1]
    if not _is_open(run_dir / EVENTS):
        return "killed"
    return "running" if any(event["kind"] == "training" for event in events) else "starting"


def _is_open(path: Path) -> bool:
    """Whether a run writes this file, by the lock that it holds on it. Where files have no locks, none is seen."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        return False


def _doing(events: list[dict[str, Any]]) -> str:
    phases = [event for event in events if event["kind"] == "phase"]
    if not phases:
        return ""
    return f"step {phases[-1]['step']}: {phases[-1]['phase']} since {time.time() - phases[-1]['time']:.0f} s"


def _why(events: list[dict[str, Any]]) -> str:
    return next((str(event["message"]) for event in reversed(events) if event["kind"] == "run_failed"), "")


def _counted(kinds: dict[str, int]) -> str:
    return ", ".join(f"{n} x {kind}" for kind, n in sorted(kinds.items()))
