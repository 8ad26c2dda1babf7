"""The suite: every kind of actor x every phase of a step, and what else can break; each run's account is checked.

make chaos                                       # everything, about two hours on two cores
make chaos ARGS='--times 1 --only kill,stop'     # some of it
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from engine.ray_token import use_private_token
from tests.chaos.faults import PHASES, Fault, strike_all
from tests.chaos.runs import Observed, orphans

ROLES = ("policy", "critic", "reference", "reward_model", "rollout", "rewards", "controller")
PROMPTS, SAMPLES = 4, 4
STEPS_PER_FAULT = 6
SILENCE_S = 8.0


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


class Workshop:
    """A cluster, a folder and tiny models, for runs that are broken."""

    def __init__(self, folder: Path) -> None:
        from tests.conftest import build_tiny_model

        self.folder = folder
        self.switches = folder / "switches"
        self.switches.mkdir()
        self.task = Path(shutil.copy(Path(__file__).with_name("task.py"), folder / "task.py"))
        self.model = build_tiny_model(folder / "model")
        rows = folder / "rows.jsonl"
        rows.write_text("".join(json.dumps({"prompt": f"number {i}"}) + "\n" for i in range(16)))
        pairs = folder / "pairs.jsonl"
        pair = {"chosen": " two", "rejected": " one"}
        pairs.write_text("".join(json.dumps(pair | {"prompt": f"number {i}"}) + "\n" for i in range(16)))
        self.rows, self.pairs = rows, pairs
        self.address = ray.get_runtime_context().gcs_address

    def run(self, name: str, **changes: Any) -> Observed:
        """A run of the tiny model."""
        raw: dict[str, Any] = {
            "name": name,
            "output_dir": str(self.folder / "runs"),
            "model": {"path": str(self.model)},
            "data": {"train": str(self.rows)},
            "rewards": {"functions": [f"{self.task}:share_of_e"]},
            "algorithm": {"name": "grpo", "loss": f"{self.task}:loss"},
            "rl": {"steps": 20, "prompts_per_step": PROMPTS, "samples_per_prompt": SAMPLES},
            "policy": {"tokens_per_microbatch": 512},
            "rollout": {"max_new_tokens": 8, "max_model_len": 64, "kv_cache_gib": 0.03},
            "checkpoint": {"every": 2, "keep": 2},
            "timeouts": {"silence": SILENCE_S},
            "ray": {"cpus_per_rank": 0.5, "stop_after_incidents": 10_000},
        }
        return Observed(self.folder, raw | changes, self.address)

    def reward_model(self) -> Path:
        """One that was trained for a moment."""
        training = {"updates": 2, "rows_per_update": 4, "max_length": 64}
        run = self.run("reward-model", stage="reward_model", training=training, data={"train": str(self.pairs)})
        run.start()
        assert run.wait(300) == 0, run.tail()
        return run.run_dir / "model"

    def ppo(self, name: str, steps: int) -> Observed:
        """A run with every kind of actor that has a model."""
        return self.run(
            name,
            algorithm={"name": "ppo", "loss": f"{self.task}:loss", "kl_coef": 0.01},
            rewards={
                "functions": [f"{self.task}:share_of_e"],
                "models": [str(self.folder / "runs" / "reward-model" / "model")],
            },
            rl={"steps": steps, "prompts_per_step": PROMPTS, "samples_per_prompt": SAMPLES},
            rollout={"engines": 2, "max_new_tokens": 8, "max_model_len": 64, "kv_cache_gib": 0.03},
        )


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


def kills(workshop: Workshop, times: int, chance: random.Random, kind: str, roles: tuple[str, ...]) -> list[Outcome]:
    """SIGKILL or SIGSTOP: a run for each role."""
    found = []
    phases = PHASES if kind == "kill" else ["generate", "update"]
    for role in roles:
        planned = [Fault(kind, role, phase) for phase in phases] * times  # type: ignore[arg-type]
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


SUITE = ("kill", "stop", "environments", "numbers")


def main() -> None:
    """Run what is asked for, and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, default=5, help="how often each fault strikes")
    parser.add_argument("--only", default=",".join(SUITE), help="parts, of " + ", ".join(SUITE))
    parser.add_argument("--roles", default=",".join(ROLES))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    roles = tuple(given.roles.split(","))
    outcomes: list[Outcome] = []
    with workshop() as shop:
        if {"kill", "stop"} & set(given.only.split(",")):
            shop.reward_model()
        for part in given.only.split(","):
            chance = random.Random(f"{given.seed} {part}")
            match part:
                case "kill":
                    outcomes += kills(shop, given.times, chance, "kill", roles)
                case "stop":
                    outcomes += kills(
                        shop, max(1, given.times // 2), chance, "stop", tuple(r for r in roles if r != "controller")
                    )
                case "environments":
                    outcomes += kills(shop, given.times, chance, "kill", ("environments",))
                case "numbers":
                    outcomes += numbers(shop, given.times, chance)
    print_table(outcomes)


def print_table(outcomes: list[Outcome]) -> None:
    """In Markdown."""
    print("| fault | times | recovered | seconds to two more steps: median (longest) | samples lost | |")
    print("|---|---|---|---|---|---|")
    for outcome in outcomes:
        print("| " + " | ".join(outcome.cells()) + " |")


@contextlib.contextmanager
def workshop() -> Iterator[Workshop]:
    """On a cluster of this process's own."""
    use_private_token()
    with tempfile.TemporaryDirectory(prefix="gnomon-chaos-") as folder:
        ray.init(
            address="local",
            num_cpus=16,
            include_dashboard=False,
            object_store_memory=2**30,
            log_to_driver=False,
            logging_level="ERROR",
        )
        try:
            yield Workshop(Path(folder))
        finally:
            ray.shutdown()


if __name__ == "__main__":
    main()
