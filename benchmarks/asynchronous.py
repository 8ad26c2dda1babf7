"""Synchronous and asynchronous runs of one task side by side: time of a step, who worked how long, what was learned.

    python -m benchmarks.asynchronous --steps 60 --seeds 3 --long 500

Engine and policy have one thread each and are bound to a core of their own, so that an asynchronous step should take
about as long as the longer of generating and training. Each seed is run with `rl.max_staleness` 0 and 1, by turns; then
one asynchronous run of `--long` steps shows that no token is ever older than it may be.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
import yaml

from engine.tracking.jsonl import read_rows
from engine.tracking.timeline import busy, read_spans
from tests.conftest import build_tiny_model

CORES = {"ray::RolloutActor": 0, "ray::PolicyActor": 1}
LAST = 20
"""Steps at the end whose mean reward counts."""
TASK = "def share_of_e(completions, **columns):\n    return [t.count('e') / max(1, len(t)) for t in completions]\n"


@dataclass(frozen=True)
class Measured:
    """What came of a run, in seconds per step."""

    step: float
    generate: float
    train: float
    reward: float
    """Mean of the last steps."""
    oldest: int
    """Versions that the oldest token was behind."""


def run(folder: Path, model: Path, *, seed: int, staleness: int, steps: int, sizes: dict[str, int]) -> Measured:
    """One run of the real command."""
    name = f"staleness-{staleness}-seed-{seed}-{steps}"
    config = folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump(_configuration(folder, model, name, seed, staleness, steps, sizes)))
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", "engine", "run", str(config)], stdout=log, stderr=log)
        ended = threading.Event()
        binder = threading.Thread(target=_bind, args=(process.pid, ended))
        binder.start()
        code = process.wait()
        ended.set()
        binder.join()
    if code:
        raise RuntimeError(f"{name} failed: {(folder / f'{name}.log').read_text()[-2000:]}")
    return _measure(folder / "runs" / name, staleness)


def _configuration(
    folder: Path, model: Path, name: str, seed: int, staleness: int, steps: int, sizes: dict[str, int]
) -> dict[str, Any]:
    (folder / "task.py").write_text(TASK)
    (folder / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"number {i}"}) + "\n" for i in range(64)))
    return {
        "name": name,
        "output_dir": str(folder / "runs"),
        "seed": seed,
        "model": {"path": str(model)},
        "data": {"train": str(folder / "rows.jsonl")},
        "rewards": {"functions": [f"{folder / 'task.py'}:share_of_e"]},
        "rl": {
            "steps": steps,
            "max_staleness": staleness,
            "prompts_per_step": sizes["prompts"],
            "samples_per_prompt": 8,
        },
        "algorithm": {"name": "grpo", "kl_coef": 0},
        "optimizer": {"learning_rate": 0.003},
        "rollout": {
            "max_new_tokens": sizes["tokens"],
            "max_model_len": sizes["tokens"] + 64,
            "kv_cache_gib": 0.25,
            "concurrent_samples": sizes["prompts"] * 8,
        },
        "ray": {"cpus_per_rank": 0.5},
    }


def _bind(root: int, ended: threading.Event) -> None:
    """Bind each actor, as it comes up, to its core."""
    bound: set[int] = set()
    while not ended.wait(0.5):
        try:
            children = psutil.Process(root).children(recursive=True)
        except psutil.NoSuchProcess:
            return
        for child in children:
            if child.pid in bound:
                continue
            try:
                title = " ".join(child.cmdline())
                core = next((core for name, core in CORES.items() if title.startswith(name)), None)
                if core is not None:
                    for thread in child.threads():
                        psutil.Process(thread.id).cpu_affinity([core])
                    child.cpu_affinity([core])
                    bound.add(child.pid)
            except psutil.Error:
                continue


def _measure(run_dir: Path, staleness: int) -> Measured:
    rows = [row for row in read_rows(run_dir / "metrics.jsonl") if "time/step" in row]
    actors, _ = busy(read_spans(run_dir))
    parts = {held.actor: held.seconds / len(rows) for held in actors}
    ages = [age for age in range(staleness + 1) if any(row.get(f"rollout/staleness/{age}", 0) > 0 for row in rows)]
    return Measured(
        step=statistics.fmean(row["time/step"] for row in rows),
        generate=parts["rollout[0]"],
        train=parts["policy[0]"],
        reward=statistics.fmean(row["reward/mean"] for row in rows[-LAST:]),
        oldest=max(ages),
    )


def main(
    steps: Annotated[int, typer.Option(help="Steps of each run that is compared.")] = 60,
    seeds: Annotated[int, typer.Option(help="Seeds, each run both ways.")] = 3,
    long: Annotated[int, typer.Option(help="Steps of one long asynchronous run; 0 for none.")] = 500,
    prompts: Annotated[int, typer.Option(help="Prompts of a step, 8 samples each.")] = 16,
    tokens: Annotated[int, typer.Option(help="Tokens of a response.")] = 48,
    folder: Annotated[Path | None, typer.Option(help="Where to work; by default a temporary folder.")] = None,
) -> None:
    """Compare, and print a table."""
    place = folder or Path(tempfile.mkdtemp(prefix="asynchronous-"))
    place.mkdir(parents=True, exist_ok=True)
    model = place / "model"
    if not model.is_dir():
        build_tiny_model(model)
    sizes = {"prompts": prompts, "tokens": tokens}
    rewards: dict[int, list[float]] = {0: [], 1: []}
    print(f"{'run':24} {'step s':>8} {'generate':>9} {'train':>8} {'step/max':>9} {'oldest':>7} {'reward':>8}")
    plan = [(seed, staleness, steps) for seed in range(seeds) for staleness in (0, 1)]
    for seed, staleness, count in [*plan, *([(0, 1, long)] if long else [])]:
        start = time.monotonic()
        m = run(place, model, seed=seed, staleness=staleness, steps=count, sizes=sizes)
        name = f"staleness {staleness} seed {seed} x{count}"
        longest = max(m.generate, m.train)
        print(
            f"{name:24} {m.step:8.3f} {m.generate:9.3f} {m.train:8.3f} {m.step / longest:9.2f} {m.oldest:7d} "
            f"{m.reward:8.3f}   ({time.monotonic() - start:.0f} s)",
            flush=True,
        )
        if count == steps:
            rewards[staleness].append(m.reward)
    for staleness, held in rewards.items():
        spread = statistics.stdev(held) if len(held) > 1 else 0.0
        print(f"staleness {staleness}: reward of the last {LAST} steps {statistics.fmean(held):.3f} ± {spread:.3f}")


if __name__ == "__main__":
    typer.run(main)
