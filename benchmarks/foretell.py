"""How well the simulator foretells runs that its costs were not fitted to.

    python -m benchmarks.foretell --steps 8

Runs of different sizes of a step (prompts, samples, longest response) on this machine, one after the other; costs are
fitted to the first four, and the step times of the others predicted from their configuration and the lengths they drew.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from engine.simulation.calibrate import fit, predict, read_run
from tests.conftest import build_tiny_model

FITTED = [(4, 4, 16), (16, 8, 16), (4, 8, 96), (16, 4, 48)]
FORETOLD = [(8, 8, 32), (8, 4, 96), (24, 8, 24), (12, 8, 64), (4, 16, 48), (32, 4, 32)]
"""(prompts, samples of each, longest response) of a step."""
TASK = "def share_of_e(completions, **columns):\n    return [t.count('e') / max(1, len(t)) for t in completions]\n"


def run(folder: Path, model: str, sizes: tuple[int, int, int], steps: int) -> Path:
    """One run of the real command; its folder."""
    prompts, samples, tokens = sizes
    name = f"{prompts}x{samples}x{tokens}"
    (folder / "task.py").write_text(TASK)
    rows = ({"prompt": " ".join(["number"] * (4 + i % 9)) + f" {i}"} for i in range(64))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw: dict[str, Any] = {
        "name": name,
        "output_dir": str(folder / "runs"),
        "model": {"path": model},
        "data": {"train": str(folder / "rows.jsonl")},
        "rewards": {"functions": [f"{folder / 'task.py'}:share_of_e"]},
        "rl": {"steps": steps, "prompts_per_step": prompts, "samples_per_prompt": samples},
        "algorithm": {"name": "grpo", "kl_coef": 0},
        "rollout": {"max_new_tokens": tokens, "max_model_len": 256, "kv_cache_gib": 0.25, "concurrent_samples": 64},
        "ray": {"cpus_per_rank": 0.5},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(raw))
    done = subprocess.run(
        [sys.executable, "-m", "engine", "run", str(folder / f"{name}.yaml")],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr[-2000:]}")
    return folder / "runs" / name


def main(
    steps: Annotated[int, typer.Option(help="Steps of each run; the first is not used.")] = 8,
    model: Annotated[str, typer.Option(help="Folder of a model; by default a tiny one is made.")] = "",
    folder: Annotated[Path | None, typer.Option(help="Where to work; by default a temporary folder.")] = None,
) -> None:
    """Run, fit, predict, and print a table."""
    place = (folder or Path(tempfile.mkdtemp(prefix="foretell-"))).absolute()
    place.mkdir(parents=True, exist_ok=True)
    if not model:
        model = str(place / "model")
        if not Path(model).is_dir():
            build_tiny_model(Path(model))
    costs = fit([read_run(run(place, model, sizes, steps)) for sizes in FITTED])
    print(costs)
    print(f"{'prompts x samples x tokens':28} {'measured s':>11} {'predicted s':>12} {'ratio':>6}", flush=True)
    for sizes in FORETOLD:
        recorded = read_run(run(place, model, sizes, steps))
        predicted = predict(recorded, costs)
        shown = " x ".join(map(str, sizes))
        ratio = predicted / recorded.step_seconds
        print(f"{shown:28} {recorded.step_seconds:11.3f} {predicted:12.3f} {ratio:6.2f}", flush=True)


if __name__ == "__main__":
    typer.run(main)
