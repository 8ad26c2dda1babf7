"""What became of a run that was struck: the lines of the table, and what must be true at the end of each run."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field

import ray

from tests.chaos.runs import Observed, orphans
from tests.chaos.workshop import PROMPTS, SAMPLES


@dataclass
class Outcome:
    """A line of the table."""

    fault: str
    times: int
    seconds: list[float]
    lost: int
    """Samples without an account at the end of the run."""
    notes: list[str] = field(default_factory=list)

    def cells(self) -> list[str]:
        """As text."""
        spent = f"{statistics.median(self.seconds):.1f} ({max(self.seconds):.1f})" if self.seconds else "-"
        return [self.fault, str(self.times), str(len(self.seconds)), spent, str(self.lost), "; ".join(self.notes)]


def lost_samples(run: Observed, steps: int) -> int:
    """Samples that were admitted and neither trained nor dropped for a reason. Raises if steps are missing."""
    rows = run.rows()
    assert [row["step"] for row in rows] == list(range(1, steps + 1)), "a step is missing, or is there twice"
    last = rows[-1]
    dropped = sum(value for name, value in last.items() if name.startswith("rollout/dropped/"))
    assert last["rollout/admitted"] == steps * PROMPTS * SAMPLES
    return int(last["rollout/admitted"] - last["rollout/trained"] - dropped)


def nothing_left(within_s: float = 30.0) -> list[str]:
    """What is still there of runs that have ended: processes, placement groups."""
    end = time.monotonic() + within_s
    while True:
        groups = [g for g in ray.util.placement_group_table().values() if g["state"] != "REMOVED"]
        left = orphans() + [f"placement group {group['placement_group_id']}" for group in groups]
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.5)


def print_table(outcomes: list[Outcome]) -> None:
    """In Markdown."""
    print("| fault | times | recovered | seconds to two more steps: median (longest) | samples lost | |")
    print("|---|---|---|---|---|---|")
    for outcome in outcomes:
        print("| " + " | ".join(outcome.cells()) + " |")
