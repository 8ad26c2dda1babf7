"""A run's folder as a synchronous run with known costs would leave it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from engine.schedule.balancing import plan_microbatches
from engine.schedule.costs import Costs
from engine.simulation.engines import Engine

SAMPLES, RANKS, PROMPT = 4, 2, 52


def raw_config(**rollout: Any) -> dict[str, Any]:
    """A small `rl` run with a reference; its model and rows need not be there to be simulated."""
    return {
        "model": {"path": "a/model"},
        "data": {"train": "rows.jsonl"},
        "rewards": {"functions": ["format"]},
        "rl": {"prompts_per_step": 6, "samples_per_prompt": SAMPLES},
        "algorithm": {"name": "grpo", "kl_coef": 0.01},
        "policy": {"ranks": RANKS, "tokens_per_microbatch": 4096},
        "reference": {"ranks": 1},
        "rollout": {"engines": 2, "max_new_tokens": 2000, "max_model_len": 2100, "concurrent_samples": 4} | rollout,
    }


def write_run(folder: Path, costs: Costs, *, mean: float, steps: int = 6, seed: int = 0, **rollout: Any) -> Path:
    """Lengths of `mean` tokens, groups dealt out one by one to the engines, and what each phase takes under `costs`."""
    raw = raw_config(**rollout)
    engines, slots = raw["rollout"]["engines"], raw["rollout"]["concurrent_samples"]
    groups = raw["rl"]["prompts_per_step"]
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(raw))
    random = np.random.default_rng(seed)
    metrics, events = [], []
    for step in range(1, steps + 1):
        lengths = random.lognormal(math.log(mean), 0.6, groups * SAMPLES).clip(1, 2000).astype(int).tolist()
        prompts = [PROMPT] * len(lengths)
        rollout_s = max(_generation_s(costs, slots, lengths, range(e, groups, engines)) for e in range(engines))
        phases = {
            "time/rollout": rollout_s + costs.reward_s,
            "time/reference": costs.forward_token_s * (sum(lengths) + groups * PROMPT),
            "time/update": costs.update_s + costs.train_token_s * _fullest([PROMPT // SAMPLES + n for n in lengths]),
            "time/publish": costs.publish_s,
        }
        cold = 30.0 if step == 1 else 0.0
        metrics.append({"step": step, **phases, "time/step": sum(phases.values()) + cold})
        metrics[-1]["time/rollout"] += cold
        events.append({"kind": "consumed", "step": step, "lengths": lengths, "prompt_lengths": prompts})
    for name, rows in (("metrics.jsonl", metrics), ("events.jsonl", events)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _generation_s(costs: Costs, slots: int, lengths: list[int], groups: range) -> float:
    engine, end = Engine(costs, slots), 0.0
    for group in groups:
        engine.give(0.0, group, PROMPT, lengths[group * SAMPLES : (group + 1) * SAMPLES])
    while (time := engine.next_finish()) < math.inf:
        end = time
        engine.finish()
    return end


def _fullest(lens: list[int]) -> int:
    plan = plan_microbatches(lens, ranks=RANKS, token_budget=sum(lens))
    return max(sum(lens[i] for micro in share for i in micro) for share in plan)
