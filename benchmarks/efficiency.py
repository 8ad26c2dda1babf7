"""Where the time of a run's steps went: phases, the controller, and how near the arithmetic came to the matmul peak.

    python -m benchmarks.efficiency runs/quickstart --warmup 1
    python -m benchmarks.efficiency runs/quickstart --peak 200       # GFLOP/s, where it is known; else it is measured

Read from the run's metrics and events, so any finished run will do. The controller's overhead is a step's time without
the time in which it waits for actors: generation, scoring, updates, publishing. Reward functions score while others are
still generated; "score" is what is left of them after the last response.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.peers import flops, measure
from benchmarks.peers.gnomon_side import WITHIN, read_lines
from benchmarks.peers.tables import Spread, table

NOT_PARTS = {"step", "tokens_per_second"}
WAITS = {"rollout", "generate", "score", "update", "critic_update", "publish", "reference", "old_logp", "values"}
"""Parts in which the controller waits for actors."""


@dataclass(frozen=True)
class Anatomy:
    """The seconds of one step."""

    step: int
    whole: float
    """From its first phase to the next step's, so with the records and checkpoints after it."""
    parts: Mapping[str, float]

    @property
    def controller(self) -> float:
        """In which no actor was waited for."""
        return self.whole - sum(seconds for name, seconds in self.parts.items() if name in WAITS)


def anatomies(metrics: Iterable[Mapping[str, Any]], events: Iterable[Mapping[str, Any]]) -> list[Anatomy]:
    """Of all steps, in order; generation and the rest of the scoring apart."""
    phases: dict[int, dict[str, float]] = defaultdict(dict)
    for event in events:
        if event["kind"] == "phase":
            phases[event["step"]].setdefault(event["phase"], event["time"])
    found = []
    for row in metrics:
        if "time/step" not in row:
            continue
        number = row["step"]
        parts = {name.removeprefix("time/"): seconds for name, seconds in row.items() if name.startswith("time/")}
        parts = {name: s for name, s in parts.items() if name not in NOT_PARTS and name not in WITHIN}
        began = phases[number]
        if "rollout" in parts and "score" in began:
            generated = began["score"] - began["rollout"]
            parts = {"generate": generated, "score": max(0.0, parts.pop("rollout") - generated)} | parts
        following = min(phases.get(number + 1, {}).values(), default=None)
        whole = row["time/step"] if following is None else following - min(began.values())
        found.append(Anatomy(number, whole, parts))
    return found


def report(steps: Sequence[Anatomy]) -> str:
    """Median seconds of each part, and its share of all seconds."""
    total = sum(step.whole for step in steps)
    names = list(dict.fromkeys(name for step in steps for name in step.parts))
    rows = []
    for name in names:
        seconds = [step.parts.get(name, 0.0) for step in steps]
        rows.append([name, str(Spread.of(seconds)), f"{sum(seconds) / total:.1%}"])
    overhead = [step.controller for step in steps]
    rows.append(["controller: no actor is waited for", str(Spread.of(overhead)), f"{sum(overhead) / total:.1%}"])
    rows.append(["step", str(Spread.of([step.whole for step in steps])), "100.0%"])
    return table(["part", "s: median (lowest..highest)", "share"], rows)


def arithmetic(
    config: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], steps: Sequence[Anatomy], peak: float
) -> dict[str, float]:
    """Phase -> model FLOPs by seconds and peak, medians over the steps; responses and prompts taken as equally long."""
    shape = flops.Shape.of(config["model"]["path"])
    by_step = {row["step"]: row for row in metrics if "time/step" in row}
    shares: dict[str, list[float]] = defaultdict(list)
    for step in steps:
        row = by_step[step.step]
        tokens = row["rollout/tokens"]
        if config["stage"] == "rl":
            prompts = row["rollout/prompts"]
            samples = prompts * config["rl"]["samples_per_prompt"]
            response_len = row["rollout/response_length"]
            made = flops.forward(shape, **_sizes(prompts, samples, tokens, samples * response_len))
            shares["generate"].append(made / step.parts["generate"] / peak)
            trained = samples * response_len
        else:
            prompts = config["training"]["rows_per_update"]
            samples = prompts * (2 if config["stage"] == "preference" else 1)
            trained = row["train/tokens_in_loss"]
        if "update" in step.parts:
            passes = config["rl"]["epochs_per_step"] if config["stage"] == "rl" else 1
            work = flops.training(shape, **_sizes(prompts, samples, tokens, trained))
            seconds = step.parts["update"] / passes * peak
            shares["update"].append(work.useful / seconds)
            shares["update, with the recomputed logits"].append((work.useful + work.recompute) / seconds)
    return {name: statistics.median(values) for name, values in shares.items()}


def _sizes(prompts: float, samples: float, tokens: float, trained: float) -> dict[str, float]:
    """Mean lengths, from the tokens of all samples and those of their responses."""
    lengths = {"prompt_len": (tokens - trained) / samples, "response_len": trained / samples}
    return {"prompts": prompts, "samples": samples, **lengths}


def main() -> None:
    """Print both tables for a run's folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a run")
    parser.add_argument("--warmup", type=int, default=1, help="first steps that are left out")
    parser.add_argument("--peak", type=float, help="GFLOP/s of the threads in use; default: measured now")
    given = parser.parse_args()
    metrics = read_lines(given.run / "metrics.jsonl")
    config = yaml.safe_load((given.run / "config.yaml").read_text())
    steps = anatomies(metrics, read_lines(given.run / "events.jsonl"))[given.warmup :]
    if not steps:
        parser.error(f"{given.run}: no step is left after {given.warmup} of warm-up")
    print(f"{given.run}: {len(steps)} steps\n\n{report(steps)}\n")
    if config["device"] == "cpu":
        threads = config["policy"]["threads"]
        peak = given.peak * 1e9 if given.peak else measure.matmul_peaks(threads).fastest
        for name, share in arithmetic(config, metrics, steps, peak).items():
            print(f"{name}: {share:.1%} of {peak / 1e9:.0f} GFLOP/s ({threads} threads)")


if __name__ == "__main__":
    main()
