"""Small scenarios for the tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from engine.schedule.costs import Costs
from engine.simulation.lengths import LogNormal
from engine.simulation.scenario import Workload

COSTS = Costs(
    decode_step_s=6e-3,
    decode_sample_s=2e-5,
    decode_context_s=1.5e-8,
    prefill_token_s=3e-5,
    forward_token_s=4e-5,
    train_token_s=1.2e-4,
    update_s=0.5,
    publish_s=1.0,
    reward_s=0.25,
)
FREE = Costs(*[0.0] * 9)

WORKLOAD = Workload(
    lengths=LogNormal(800, 1.0),
    steps=8,
    prompts_per_step=8,
    samples_per_prompt=4,
    prompt_tokens=50,
    max_new_tokens=4000,
    concurrent_samples=8,
)


def workload(**changes: Any) -> Workload:
    """`WORKLOAD` with other values."""
    return replace(WORKLOAD, **changes)
