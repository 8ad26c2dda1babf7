"""Weeks in small: many steps with a fault now and then; no process grows, and none keeps files open.

Every `SAMPLE_S` seconds the memory (unique set size: what would be free if it ended) and the open files of each process
of the run are taken, and a line is fitted over the steps of its life, without its first `WARM_UP` steps.
"""

from __future__ import annotations

import random
import threading
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import psutil

from tests.chaos.faults import Fault, strike_all
from tests.chaos.outcome import Outcome, lost_samples, nothing_left
from tests.chaos.runs import ACTORS, Observed, actors
from tests.chaos.workshop import PROMPTS, SAMPLES, Workshop

EVERY = 50
"""Steps between faults."""
WARM_UP, LONG_ENOUGH = 300, 600
"""Steps of a process's life that do not count, and how many it must have lived for a slope: by then each thread of its
pools has had its turn, and holds what it keeps."""
SAMPLE_S = 2.0
LIMIT_MB = 1.0
"""Growth per 100 steps."""
ROLES = ("policy", "rollout", "rewards", "reward_model", "reference")
"""Struck one after the other, each as often in a row as makes all of them equal: the others live long meanwhile."""


@dataclass
class Life:
    """Of one process: its step, memory in MB and open files at each look."""

    role: str
    steps: list[int] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)
    files: list[int] = field(default_factory=list)

    def slope(self, values: list[float] | list[int]) -> float | None:
        """Growth per 100 steps; None for a life that was too short."""
        if not self.steps or self.steps[-1] - self.steps[0] < LONG_ENOUGH:
            return None
        late = [i for i, step in enumerate(self.steps) if step - self.steps[0] >= WARM_UP]
        return float(np.polyfit([self.steps[i] for i in late], [values[i] for i in late], 1)[0]) * 100


class Observer:
    """Looks at the processes of a run until it is closed."""

    def __init__(self, run: Observed, steps: int) -> None:
        self.run = run
        self.steps = steps
        self.lives: dict[int, Life] = defaultdict(lambda: Life("controller"))
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Observer:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        self._thread.join(30)

    def _look(self) -> None:
        while not self._closed.wait(SAMPLE_S):
            step = self.run.furthest()
            assert self.run.process is not None
            found = [("controller", psutil.Process(self.run.process.pid))]
            found += [(role, process) for role in ACTORS for process in actors(role)]
            for role, process in found:
                try:
                    memory, files = process.memory_full_info().uss / 2**20, process.num_fds()
                except psutil.Error:
                    continue
                if step >= self.steps:
                    return  # what a run frees on its way out is no slope
                life = self.lives[process.pid]
                life.role = role
                life.steps.append(step)
                life.megabytes.append(memory)
                life.files.append(files)


def soak(workshop: Workshop, steps: int, chance: random.Random) -> list[Outcome]:
    """GRPO with a reference and a reward model beside a function, and a fault every `EVERY` steps."""
    run = workshop.run(
        "soak",
        rl={"steps": steps, "prompts_per_step": PROMPTS, "samples_per_prompt": SAMPLES},
        algorithm={"name": "grpo", "loss": f"{workshop.task}:loss", "kl_coef": 0.01},
        rewards={"functions": [f"{workshop.task}:share_of_e"], "models": [str(workshop.reward_model())]},
        checkpoint={"every": 10},
    )
    run.start()
    run.wait_until(lambda: run.furthest() >= 1, 300, "the first step")
    seconds: list[float] = []
    with Observer(run, steps) as observer:
        for step in range(EVERY, steps - 10, EVERY):
            run.wait_until(lambda: run.furthest() >= step, 600, f"step {step}")  # noqa: B023
            role = ROLES[len(ROLES) * step // steps]
            struck = strike_all(run, [Fault("kill", role, "generate")], chance, workshop.switches)
            seconds += [took for times in struck.values() for took in times]
        assert run.wait(1200) == 0, run.tail()
    notes = [_described(life) for life in observer.lives.values() if life.slope(life.megabytes) is not None]
    lost, left = lost_samples(run, steps), nothing_left()
    return [Outcome(f"soak of {steps} steps", len(seconds), seconds, lost, [*notes, *left])]


def _described(life: Life) -> str:
    memory, files = life.slope(life.megabytes), life.slope(life.files)
    assert memory is not None
    too_much = " TOO MUCH" if memory > LIMIT_MB else ""
    return f"{life.role} over {life.steps[-1] - life.steps[0]} steps: {memory:+.2f} MB, {files:+.2f} files{too_much}"
