"""Publishing weights, measured against one memcpy of their bytes in the same run.

    python -m benchmarks.publish models/SmolLM2-135M-Instruct
    python -m benchmarks.publish models/SmolLM2-135M-Instruct --lora
    python -m benchmarks.publish models/SmolLM2-135M-Instruct --route gloo

A real policy and a real engine. `pack` is what the trainer does (one copy into the buckets, and the checksum), `whole`
ends when the engine has acknowledged the version: it has read the buckets once for the checksum and once to load them.
By gloo the weights take the steps that they take by NCCL on GPUs, over sockets.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer

from engine.cluster import connected, started_workers
from engine.config import Config


def main(
    model: Annotated[str, typer.Argument(help="Folder of a model.")],
    lora: Annotated[bool, typer.Option(help="Train a LoRA adapter, which alone is published.")] = False,
    route: Annotated[Literal["memory", "gloo"], typer.Option(help="How weights reach the engine.")] = "memory",
    repeats: Annotated[int, typer.Option(help="Versions that are published; the first two are not counted.")] = 9,
) -> None:
    """Publish again and again, and print the medians."""
    rewards = Path(tempfile.mkdtemp(prefix="publish-")) / "task.py"
    rewards.write_text("def zero(completions, **columns):\n    return [0.0] * len(completions)\n")
    raw: dict[str, Any] = {
        "model": {"path": str(Path(model).absolute())} | ({"adapter": {"kind": "lora"}} if lora else {}),
        "data": {"train": "unused.jsonl"},
        "rewards": {"functions": [f"{rewards}:zero"]},
        "algorithm": {"kl_coef": 0},
        "rollout": {"max_new_tokens": 8, "max_model_len": 64, "kv_cache_gib": 0.1},
    }
    config = Config.model_validate(raw)
    rows: list[tuple[float, float, float]] = []
    with connected([config]), started_workers(config, updates=1, route=route) as workers:
        assert workers.sampling is not None
        num_bytes = 0.0
        for version in range(repeats):
            start = time.perf_counter()
            metrics = workers.sampling.rollouts.publish(version)
            whole = time.perf_counter() - start
            num_bytes = metrics["rollout/weight_bytes"]
            rows.append((metrics.get("time/publish_pack", 0.0), whole, memcpy(int(num_bytes))))
    pack, whole, copy = (statistics.median(column) for column in zip(*rows[2:], strict=True))
    print(f"{num_bytes / 1e6:.1f} MB by {route}; memcpy {1e3 * copy:.1f} ms")
    if pack:
        print(f"pack {1e3 * pack:.1f} ms, {pack / copy:.2f} times memcpy")
    print(f"whole {1e3 * whole:.1f} ms, {whole / copy:.2f} times memcpy")


def memcpy(num_bytes: int) -> float:
    """Seconds of one copy between memory that has been touched before."""
    source, target = np.ones(num_bytes, np.uint8), np.ones(num_bytes, np.uint8)
    start = time.perf_counter()
    np.copyto(target, source)
    return time.perf_counter() - start


if __name__ == "__main__":
    typer.run(main)
