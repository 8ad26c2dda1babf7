"""The whole job is killed again and again, and ends as the one that never was: metrics and weights, bit for bit."""

from __future__ import annotations

import json
import random
import time
from typing import Any

from safetensors.torch import load_file

from tests.chaos.outcome import Outcome, lost_samples, nothing_left
from tests.chaos.runs import Observed
from tests.chaos.workshop import PROMPTS, SAMPLES, Workshop

STEPS = {"rl": 200, "sft": 1000, "preference": 600}
ROWS: dict[str, list[dict[str, Any]]] = {
    "sft": [{"prompt": f"number {i}", "completion": "one two"[: 3 + i % 4]} for i in range(12)],
    "preference": [{"prompt": f"the quick {i}", "chosen": " brown fox", "rejected": " lazy dog"} for i in range(12)],
}


def killed_jobs(workshop: Workshop, times: int, chance: random.Random) -> list[Outcome]:
    """GRPO, SFT and DPO."""
    return [_killed_job(workshop, stage, times, chance) for stage in ("rl", "sft", "preference")]


def _killed_job(workshop: Workshop, stage: str, times: int, chance: random.Random) -> Outcome:
    whole, killed = _job(workshop, stage, "whole"), _job(workshop, stage, "killed")
    whole.start()
    assert whole.wait(600) == 0, whole.tail()
    training = sum(row["time/step"] for row in whole.rows())
    seconds: list[float] = []
    while len(seconds) < times:
        furthest = killed.furthest()
        killed.start()
        start = time.monotonic()
        killed.wait_until(lambda: killed.furthest() not in (0, furthest), 300, "the run goes on")  # noqa: B023
        seconds.append(time.monotonic() - start)
        time.sleep(chance.uniform(0, training / times))
        killed.kill()
    killed.start()
    assert killed.wait(600) == 0, killed.tail()
    assert _metrics(killed) == _metrics(whole), f"{stage}: the metrics differ"
    ours, theirs = (load_file(run.run_dir / "model" / "model.safetensors") for run in (killed, whole))
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours), f"{stage}: the weights differ"
    lost = lost_samples(killed, STEPS[stage]) if stage == "rl" else 0
    resumed = [event["step"] for event in killed.events("run_resumed")]
    notes = [f"resumed at steps {', '.join(map(str, resumed))}; bit for bit as the unbroken run", *nothing_left()]
    return Outcome(f"kill -9 of the job, {stage}", len(seconds), seconds, lost, notes)


def _job(workshop: Workshop, stage: str, name: str) -> Observed:
    changes: dict[str, Any] = {"optimizer": {"learning_rate": 0.005, "schedule": "cosine"}}
    if stage == "rl":
        changes["rl"] = {"steps": STEPS[stage], "prompts_per_step": PROMPTS, "samples_per_prompt": SAMPLES}
    else:
        rows = workshop.folder / f"{stage}.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS[stage]))
        changes |= {"stage": stage, "data": {"train": str(rows), "evaluation": str(rows)}}
        changes |= {"training": {"updates": STEPS[stage], "rows_per_update": 4, "max_length": 64}}
        changes |= {"algorithm": {}, "rewards": {}}
    return workshop.run(f"{stage}-{name}", checkpoint={"every": 3}, **changes)


def _metrics(run: Observed) -> list[dict[str, Any]]:
    """All that was logged, without what measures time."""
    rows = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]
