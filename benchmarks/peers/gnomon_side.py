"""Gnomon's side: the configuration of `gnomon run`, and its record from what the run wrote down."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.peers.record import Run, Step
from benchmarks.peers.workloads import SEED, Workload

REWARDS = Path(__file__).with_name("rewards.py")
WITHIN = {"publish_pack": "publish"}
"""Parts of a step that lie within others."""


def configuration(workload: Workload, *, model: str, rows: Path, folder: Path, threads: int) -> dict[str, Any]:
    """The YAML of a run, as nested mappings; the roles take turns, so each has all threads."""
    config: dict[str, Any] = {
        "name": "run",
        "output_dir": str(folder),
        "seed": SEED,
        "device": "cpu",
        "model": {"path": model},
        "data": {"train": str(rows), "chat_template": "never"},
        "optimizer": {"learning_rate": workload.learning_rate, "betas": [0.9, 0.95], "max_grad_norm": 1.0},
        "policy": {"threads": threads, "tokens_per_microbatch": workload.tokens_per_microbatch},
        "tracking": {"samples_per_step": 4},
        "ray": {"cpus_per_rank": 0.5, "object_store_gib": 2.0},
    }
    offline = {
        "updates": workload.steps,
        "rows_per_update": workload.rows_per_step,
        "max_length": workload.max_length,
    }
    match workload.kind:
        case "grpo":
            config |= {
                "rewards": {"functions": [f"{REWARDS}:{workload.reward}"]},
                "rl": {
                    "steps": workload.steps,
                    "prompts_per_step": workload.rows_per_step,
                    "samples_per_prompt": workload.group,
                },
                "algorithm": {"name": "grpo", "kl_coef": 0.0, "correction": {"mode": "none"}},
                "rollout": {
                    "threads": threads,
                    "max_new_tokens": workload.max_new_tokens,
                    "max_model_len": workload.max_length,
                    "concurrent_samples": workload.samples_per_step,
                    "kv_cache_gib": 0.5,
                },
            }
        case "sft":
            config |= {"stage": "sft", "training": offline}
        case "dpo":
            config |= {
                "stage": "preference",
                "training": offline,
                "preference": {"loss": "sigmoid", "beta": workload.beta},
            }
    return config


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def record(workload: Workload, run_dir: Path, *, started_at: float, settings: dict[str, Any]) -> Run:
    """The record of a finished run."""
    metrics = [row for row in read_lines(run_dir / "metrics.jsonl") if "time/step" in row]
    return from_rows(workload, metrics, read_lines(run_dir / "events.jsonl"), started_at, settings)


def from_rows(
    workload: Workload,
    metrics: Iterable[dict[str, Any]],
    events: Iterable[dict[str, Any]],
    started_at: float,
    settings: dict[str, Any],
) -> Run:
    """A step begins with its first phase and ends where the next one begins; the last one took `time/step`."""
    began: dict[int, float] = {}
    training_at = started_at
    for event in events:
        if event["kind"] == "training":
            training_at = event["time"]
        elif event["kind"] == "phase" and event["step"] > 0:
            began.setdefault(event["step"], event["time"])
    samples = workload.samples_per_step
    steps = []
    for row in metrics:
        number = row["step"]
        seconds = {name.removeprefix("time/"): v for name, v in row.items() if name.startswith("time/")}
        seconds.pop("tokens_per_second", None)
        ended_at = began.get(number + 1, began[number] + seconds["step"])
        whole = seconds.pop("step")
        inner = {f"{outer}, of it {name}": seconds.pop(name) for name, outer in WITHIN.items() if name in seconds}
        steps.append(
            Step(
                began_at=began[number],
                ended_at=ended_at,
                samples=samples,
                trained_tokens=round(row["rollout/tokens"]),
                generated_tokens=round(row.get("rollout/response_length", 0.0) * samples),
                reward=row.get("reward/mean"),
                loss=row.get("policy/loss", row.get("train/loss")),
                phases=seconds
                | {"controller": whole - sum(seconds.values()), "between steps": ended_at - began[number] - whole}
                | inner,
            )
        )
    reference_s = began[1] - training_at if workload.kind == "dpo" else 0.0
    return Run("gnomon", started_at, training_at, tuple(steps), reference_s, settings)
