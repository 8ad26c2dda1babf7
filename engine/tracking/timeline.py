"""Who worked when: the spans of a run's events, as a trace for Perfetto or Chrome, and what they come to.

A span is an event with `actor` (`policy[0]`, `rollout[1]`, `controller`), `phase`, `start` (unix seconds) and
`seconds`. The controller's are the phases of its steps and whole steps; the others are what the actors did for it, by
the controller's clock from call to answer, but for the engines, which tell themselves when they generate.

The trace is in the Trace Event Format, which https://ui.perfetto.dev and chrome://tracing open.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import UserError
from engine.tracking.jsonl import read_rows, replace_file
from engine.tracking.run_folder import EVENTS

CONTROLLER = "controller"
WHOLE_STEP = "step"
"""The controller's phase that is a whole step."""
MICROSECONDS = 1e6


@dataclass(frozen=True)
class Span:
    """Something that an actor did."""

    actor: str
    phase: str
    start: float
    """Unix seconds."""
    seconds: float
    step: int | None = None
    """Of the controller's spans."""

    @property
    def end(self) -> float:
        """Unix seconds."""
        return self.start + self.seconds


@dataclass(frozen=True)
class Busy:
    """How much of the steps an actor was at work."""

    actor: str
    seconds: float
    share: float
    """Of the steps' time."""


def read_spans(run_dir: Path) -> list[Span]:
    """The spans of a run, in order of their start.

    Raises:
        UserError: the folder holds none.
    """
    events = read_rows(run_dir / EVENTS) if (run_dir / EVENTS).is_file() else []
    spans = [
        Span(event["actor"], event["phase"], event["start"], event["seconds"], event.get("step"))
        for event in events
        if event["kind"] == "span"
    ]
    if not spans:
        raise UserError(f"{run_dir}: its {EVENTS} holds no spans; give the folder of a run that has made a step")
    return sorted(spans, key=lambda span: span.start)


def write_trace(spans: Sequence[Span], file: Path) -> None:
    """Write a trace: a process for each role, a thread for each rank, more where one does several things at once."""
    rows: list[dict[str, Any]] = []
    roles = sorted({_role(span) for span in spans}, key=lambda role: (role != CONTROLLER, role))
    for number, role in enumerate(roles):
        rows.append({"ph": "M", "name": "process_name", "pid": number, "args": {"name": role}})
        threads: dict[tuple[str, int], int] = {}
        for span, lane in _in_lanes(span for span in spans if _role(span) == role):
            thread = threads.setdefault((span.actor, lane), len(threads))
            times = {"ts": span.start * MICROSECONDS, "dur": span.seconds * MICROSECONDS}
            about = {} if span.step is None else {"args": {"step": span.step}}
            rows.append({"ph": "X", "name": span.phase, "pid": number, "tid": thread, **times, **about})
        for (actor, _), thread in threads.items():
            rows.append({"ph": "M", "name": "thread_name", "pid": number, "tid": thread, "args": {"name": actor}})
    replace_file(file, json.dumps({"traceEvents": rows, "displayTimeUnit": "ms"}).encode())


def busy(spans: Sequence[Span]) -> tuple[list[Busy], float]:
    """Each actor's part in the steps' time, the busiest first; and the share of that time in which none worked.

    That share is the controller's own: what it decides, packs, sends and writes down while all others wait.
    """
    steps = [(span.start, span.end) for span in spans if span.actor == CONTROLLER and span.phase == WHOLE_STEP]
    total = sum(end - start for start, end in steps)
    workers = sorted({span.actor for span in spans} - {CONTROLLER})
    worked = {actor: [(s.start, s.end) for s in spans if s.actor == actor] for actor in workers}
    parts = {actor: _overlap(_union(held), steps) for actor, held in worked.items()}
    anyone = _overlap(_union([pair for held in worked.values() for pair in held]), steps)
    found = [Busy(actor, seconds, seconds / total if total else 0.0) for actor, seconds in parts.items()]
    return sorted(found, key=lambda held: -held.seconds), 1 - anyone / total if total else 0.0


def _role(span: Span) -> str:
    return span.actor.partition("[")[0]


def _in_lanes(spans: Iterable[Span]) -> Iterable[tuple[Span, int]]:
    """Each span with a lane of its actor, in which it either follows or lies within what is there."""
    lanes: dict[str, list[list[float]]] = {}
    for span in spans:
        held = lanes.setdefault(span.actor, [])
        for number, ends in enumerate(held):
            while ends and ends[-1] <= span.start:
                ends.pop()
            if not ends or span.end <= ends[-1]:
                ends.append(span.end)
                yield span, number
                break
        else:
            held.append([span.end])
            yield span, len(held) - 1


def _union(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    joined: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def _overlap(union: Sequence[tuple[float, float]], steps: Sequence[tuple[float, float]]) -> float:
    """Seconds of the union within the steps."""
    seconds, first = 0.0, 0
    for start, end in sorted(steps):
        while first < len(union) and union[first][1] <= start:
            first += 1
        for at in range(first, len(union)):
            if union[at][0] >= end:
                break
            seconds += min(end, union[at][1]) - max(start, union[at][0])
    return seconds
