"""Faults at planned phases of a run, and what became of the run.

For each fault: wait for a step's phase to begin, and a random moment longer, strike, and wait until two steps are
recorded that were not recorded before. An actor that is idle in that phase is missed when it is asked next.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from tests.chaos.runs import Observed, Tail, actors

PHASES = {
    "generate": {"rollout"},
    "score": {"score"},
    "annotate": {"reference", "values", "old_logp"},
    "update": {"critic_update", "update"},
    "publish": {"publish"},
    "checkpoint": {"checkpoint"},
}
"""The phases of a step, by the names that the events have for their parts."""
RECOVERY_S = 240.0
LONGEST_DELAY_S = 0.1
"""A phase of the tiny model takes about so long."""


@dataclass(frozen=True)
class Fault:
    """What is done to whom, and when."""

    kind: Literal["kill", "stop", "nan", "bit"]
    role: str
    phase: str


def strike_all(
    run: Observed, faults: Iterable[Fault], chance: random.Random, switches: Path
) -> dict[Fault, list[float]]:
    """Let the faults happen to a run that is going, one after the other; seconds to recover from each."""
    tail = Tail(run.run_dir / "events.jsonl")
    seconds: dict[Fault, list[float]] = {}
    for fault in faults:
        _wait_for_phase(run, tail, PHASES[fault.phase])
        time.sleep(chance.uniform(0, LONGEST_DELAY_S))
        furthest, start = run.furthest(), time.monotonic()
        _strike(run, fault, chance, switches)
        _wait_for_step(run, furthest + 2, f"recovery from {fault}")
        seconds.setdefault(fault, []).append(time.monotonic() - start)
        print(f"{fault.kind} {fault.role} in {fault.phase}: {seconds[fault][-1]:.1f} s", flush=True)
    return seconds


def _wait_for_phase(run: Observed, tail: Tail, names: set[str]) -> None:
    for _ in tail.new():
        pass
    run.wait_until(
        lambda: any(event["kind"] == "phase" and event["phase"] in names for event in tail.new()),
        RECOVERY_S,
        str(names),
    )


def _wait_for_step(run: Observed, step: int, what: str) -> None:
    run.wait_until(lambda: run.furthest() >= step, RECOVERY_S, what)


def _strike(run: Observed, fault: Fault, chance: random.Random, switches: Path) -> None:
    if fault.kind in ("nan", "bit"):
        (switches / fault.kind).touch()
        return
    if fault.role == "controller":
        run.kill()
        run.start()
        return
    victims = actors(fault.role)
    assert victims, f"there is no process of {fault.role}"
    try:
        chance.choice(victims).send_signal(signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP)
    except psutil.NoSuchProcess:
        raise AssertionError(f"{fault.role} was gone before it could be struck") from None
