"""A run that is killed goes on from its newest checkpoint to the same end, bit for bit, in every stage."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from safetensors.torch import load_file

from engine import pipeline
from engine.config import Config, UserError
from engine.stages.loop import Result
from tests.conftest import thorough

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(600)]
STEPS = 5
EVERY = 2

PAIR = {"prompt": "the quick", "chosen": " brown fox", "rejected": " lazy dog"}
ROWS: dict[str, list[dict[str, Any]]] = {
    "pretrain": [{"text": f"the quick brown fox jumps over the lazy dog {i} times"} for i in range(12)],
    "sft": [{"prompt": f"number {i}", "completion": "one two"[: 3 + i % 4]} for i in range(12)],
    "preference": [PAIR | {"prompt": f"the quick {i}"} for i in range(12)],
    "reward_model": [PAIR | {"prompt": f"the quick {i}"} for i in range(12)],
    "distill": [{"prompt": f"number {i}"} for i in range(12)],
    "rl": [{"prompt": f"number {i}"} for i in range(12)],
}


def configure(stage: str, folder: Path, tiny_model: Path, **more: Any) -> dict[str, Any]:
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS[stage]))
    raw: dict[str, Any] = {
        "name": "killed",
        "output_dir": str(folder),
        "stage": stage,
        "model": {"path": str(tiny_model)},
        "data": {"train": str(rows), "evaluation": str(rows)},
        "training": {"updates": STEPS, "rows_per_update": 4, "max_length": 64},
        "policy": {"tokens_per_microbatch": 256},
        "optimizer": {"learning_rate": 0.01, "schedule": "cosine", "warmup_updates": 1},
        "checkpoint": {"every": EVERY, "keep": 1},
    }
    if stage in ("rl", "distill"):
        raw["rollout"] = {"max_new_tokens": 8, "max_model_len": 64, "kv_cache_gib": 0.03}
    if stage == "distill":
        raw["distill"] = {"teacher": str(tiny_model)}
    if stage == "rl":
        (folder / "task.py").write_text("def e(sample):\n    return sample.completion.count('e') / 8\n")
        raw["rewards"] = {"functions": [f"{folder / 'task.py'}:e"]}
        raw["rl"] = {"steps": STEPS, "prompts_per_step": 4, "samples_per_prompt": 4}
    return raw | more


def metrics(folder: Path) -> list[dict[str, float]]:
    """All that was logged, without what measures time."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


def tensors(result: Result) -> dict[str, Any]:
    """The saved model."""
    return load_file(result.model / "model.safetensors")


def run_and_kill(raw: dict[str, Any], folder: Path) -> None:
    """Run as a job on the session's cluster, and kill that once a checkpoint and a step more are there."""
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(raw))
    run = Path(raw["output_dir"]) / raw["name"]
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    process = subprocess.Popen(
        [sys.executable, "-m", "engine", "run", str(config)], env=environment, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 300
        while not _has_passed_a_checkpoint(run):
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def _has_passed_a_checkpoint(run: Path) -> bool:
    if not [*run.glob("checkpoints/step_*[0-9]"), *run.parent.glob("kept/killed/step_*/manifest.json")]:
        return False
    steps = [
        json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines() if line.endswith("}")
    ]
    return max(steps) > EVERY


VARIANTS = {
    "pretrain": {},
    "sft": {},
    "sft, two ranks of ZeRO-2": {"policy": {"tokens_per_microbatch": 256, "ranks": 2, "zero_stage": 2}},
    "preference": {},
    "preference, kto": {"preference": {"loss": "kto"}},
    "reward_model": {},
    "distill": {},
    "rl": {},
    "rl, ppo with a steered KL": {
        "algorithm": {"name": "ppo", "kl_coef": 0.01, "kl_target": 1.0, "kl_horizon": 100},
        "critic": {"learning_rate": 0.01},
    },
}


COVERED = (
    "pretrain",
    "sft",
    "sft, two ranks of ZeRO-2",
    "preference",
    "preference, kto",
    "reward_model",
    "distill",
    "rl",
)
"""By the other variants, in other words: the same loop, the same trainer."""


@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=pytest.mark.thorough if v in COVERED else ()) for v in VARIANTS]
)
def test_a_killed_run_ends_as_if_it_had_never_been_killed(variant, tiny_model, tmp_path):
    stage = variant.split(",")[0]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    never_killed = pipeline.run(Config.model_validate(configure(stage, whole, tiny_model, **VARIANTS[variant])))

    raw = configure(stage, killed, tiny_model, **VARIANTS[variant])
    run_and_kill(raw, killed)
    resumed = pipeline.run(Config.model_validate(raw))

    assert metrics(killed / "killed") == metrics(whole / "killed")
    assert (resumed.before, resumed.after) == (never_killed.before, never_killed.after)
    ours, theirs = tensors(resumed), tensors(never_killed)
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)
    events = [json.loads(line) for line in (killed / "killed" / "events.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["kind"] == "run_resumed"] in ([EVERY], [2 * EVERY])


TWO = {"tokens_per_microbatch": 256, "ranks": 2, "zero_stage": 2}
ONE = {"tokens_per_microbatch": 256}


@pytest.mark.parametrize(("first", "second"), [(TWO, ONE), *thorough((ONE, TWO))], ids=["two to one", "one to two"])
def test_a_run_goes_on_with_another_number_of_ranks_from_a_url(first, second, tiny_model, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    never_killed = pipeline.run(Config.model_validate(configure("sft", whole, tiny_model, policy=first)))
    url = f"file://{killed}/kept"
    raw = configure("sft", killed, tiny_model, policy=first, checkpoint={"every": EVERY, "keep": 1, "folder": url})
    run_and_kill(raw, killed)
    resumed = pipeline.run(Config.model_validate(raw | {"policy": second}))

    for ours, theirs in zip(metrics(killed / "killed"), metrics(whole / "killed"), strict=True):
        assert ours["step"] == theirs["step"]
        for name in ("train/loss", "eval/nll"):
            assert ours.get(name, 0.0) == pytest.approx(theirs.get(name, 0.0), abs=1e-5)
    ours, theirs = tensors(resumed), tensors(never_killed)
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-4


def test_the_best_model_is_kept_beside_the_last(tiny_model, tmp_path):
    raw = configure("sft", tmp_path, tiny_model, evaluation={"every": 1})
    raw["checkpoint"] = {"best": "-eval/nll"}
    raw["optimizer"]["learning_rate"] = 0.3  # it gets better and worse again
    pipeline.run(Config.model_validate(raw))
    run = tmp_path / "killed"
    measured = {row["step"]: row["eval/nll"] for row in metrics(run) if "eval/nll" in row}
    best = json.loads((run / "best.json").read_text())
    assert best == {"step": best["step"], "metric": "eval/nll", "value": min(measured.values())}
    assert measured[best["step"]] == best["value"] < measured[STEPS]
    kept = pipeline.run(Config.model_validate(raw | {"name": "again", "model": {"path": str(run / "best")}}))
    assert kept.before["eval/nll"] == pytest.approx(best["value"], abs=1e-5)


def test_a_best_that_is_not_measured_is_told(tiny_model, tmp_path):
    raw = configure("sft", tmp_path, tiny_model) | {"checkpoint": {"best": "eval/reward"}}
    with pytest.raises(UserError, match=r"checkpoint.best: eval/reward is not measured; .* eval/nll, "):
        pipeline.run(Config.model_validate(raw))
