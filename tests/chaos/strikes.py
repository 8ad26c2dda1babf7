"""Runs whose processes are killed and stopped, whose numbers break, and whose weights lose a bit."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Literal

from tests.chaos.faults import PHASES, Fault, strike_all
from tests.chaos.outcome import Outcome, lost_samples, nothing_left
from tests.chaos.runs import Observed
from tests.chaos.workshop import PROMPTS, SAMPLES, Workshop

STEPS_PER_FAULT = 6


def strike_run(run: Observed, steps: int, faults: list[Fault], chance: random.Random, switches: Path) -> list[Outcome]:
    """A run with faults, from its start to its end."""
    run.start()
    run.wait_until(lambda: run.furthest() >= 1, 300, "the first step")
    seconds = strike_all(run, faults, chance, switches)
    code = run.wait(1200)
    assert code == 0, run.tail()
    lost, left = lost_samples(run, steps), nothing_left()
    notes = [f"left over: {', '.join(left)}"] if left else []
    times = {fault: faults.count(fault) for fault in faults}
    return [Outcome(f"{f.kind} {f.role}, {f.phase}", n, seconds.get(f, []), lost, notes) for f, n in times.items()]


def kills(
    workshop: Workshop, times: int, chance: random.Random, kind: Literal["kill", "stop"], roles: tuple[str, ...]
) -> list[Outcome]:
    """SIGKILL or SIGSTOP: a run for each role."""
    found = []
    phases = PHASES if kind == "kill" else ["generate", "update"]
    for role in roles:
        planned = [Fault(kind, role, phase) for phase in phases] * times
        chance.shuffle(planned)
        steps = STEPS_PER_FAULT * len(planned) + 8
        if role == "environments":
            where = {"path": f"{workshop.task}:Echo", "max_turns": 2, "timeout": 5.0, "retries": 3}
            size = {"steps": steps, "prompts_per_step": PROMPTS, "samples_per_prompt": SAMPLES}
            run = workshop.run(f"{kind}-{role}", environment=where, rl=size)
            planned = [fault for fault in planned if fault.phase != "annotate"]  # nothing to annotate in GRPO
        else:
            run = workshop.ppo(f"{kind}-{role}", steps)
        found += strike_run(run, steps, planned, chance, workshop.switches)
    return found


def numbers(workshop: Workshop, times: int, chance: random.Random) -> list[Outcome]:
    """A loss that is not a number; weights that lose a bit on their way."""
    planned = [Fault("nan", "policy", "generate"), Fault("bit", "rollout", "generate")] * times
    chance.shuffle(planned)
    steps = STEPS_PER_FAULT * len(planned) + 8
    size = {"steps": steps, "prompts_per_step": PROMPTS, "samples_per_prompt": SAMPLES}
    run = workshop.run("numbers", rl=size)
    outcomes = strike_run(run, steps, planned, chance, workshop.switches)
    skipped, corrupted = run.events("update_skipped"), run.events("incident")
    assert len(skipped) == times, f"{len(skipped)} updates were skipped"
    assert [event["incident"] for event in corrupted] == ["weights_corrupted"] * times
    return outcomes
