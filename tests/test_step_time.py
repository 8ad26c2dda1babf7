"""Times that move as they must: with the device, the ranks, the batch, the settings."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import Config, UserError
from engine.footprint import Model
from engine.hardware import NAMES, Accelerator, accelerator
from engine.schedule.costs import Costs
from engine.step_time import (
    BANDWIDTH_EFFICIENCY,
    ENGINE_STEP_S,
    Hardware,
    Workload,
    costs_of,
    first_phases,
    generate_s,
    running_samples,
    step_phases,
)
from tests.test_fit import MIDDLE, SMALL, model
from tests.test_footprint import configure

WORK = Workload(prompt=512, response=1024, samples=512, prompts=64, steps=10)
MIXTURE = model("Qwen3-30B-A3B", 5_000_000)
POLICY = {"ranks": 8, "zero_stage": 1}
ROLLOUT = {"engines": 8, "kv_cache_gib": 40, "concurrent_samples": 256}


def on(name: str, per_node: int = 8) -> Hardware:
    """The same device for trainers and engines."""
    return Hardware(accelerator(name), accelerator(name), per_node)


def run(**sections: Any) -> Config:
    """Eight trainers and eight engines, unless told otherwise."""
    return configure(**{"policy": POLICY, "rollout": ROLLOUT} | sections)


def costs(config: Config, models: dict[str, Model] = MIDDLE, name: str = "H100", **changes: Any) -> Costs:
    """On one kind of device."""
    return costs_of(config, models, on(name), replace(WORK, **changes))


def phases(config: Config, models: dict[str, Model] = MIDDLE, name: str = "H100") -> dict[str, float]:
    """Name -> seconds of a step."""
    hardware = on(name)
    found = step_phases(config, models, hardware, costs_of(config, models, hardware, WORK), WORK)
    return {phase.name: phase.seconds for phase in found}


def test_a_decoding_step_reads_all_weights_once() -> None:
    rate = accelerator("H100").bandwidth * BANDWIDTH_EFFICIENCY
    weights = MIDDLE["model.path"].shape.parameters - MIDDLE["model.path"].shape.embedding
    assert costs(run()).decode_step_s == pytest.approx(2 * weights / rate + ENGINE_STEP_S)


def test_decoding_is_bound_by_memory_and_training_by_arithmetic() -> None:
    """The H200 is an H100 with faster memory."""
    h100, h200 = costs(run(), name="H100"), costs(run(), name="H200")
    assert h200.decode_step_s < h100.decode_step_s
    assert h200.decode_context_s == pytest.approx(h100.decode_context_s * 3.35 / 4.8)
    assert h200.train_token_s == h100.train_token_s
    assert h200.prefill_token_s == h100.prefill_token_s


def test_twice_the_ranks_take_half_the_time_for_a_token() -> None:
    one, two = (costs(run(policy={"ranks": n, "zero_stage": 1})) for n in (4, 8))
    assert one.train_token_s == pytest.approx(2 * two.train_token_s)
    assert one.forward_token_s == pytest.approx(2 * two.forward_token_s)


def test_zero_3_over_a_slow_network_is_bound_by_what_it_sends() -> None:
    config = run(policy={"ranks": 8, "zero_stage": 3, "tokens_per_microbatch": 2048})
    inside, across = (costs_of(config, MIDDLE, on("H100", per_node), WORK) for per_node in (8, 4))
    assert across.train_token_s > 2 * inside.train_token_s
    large = run(policy={"ranks": 8, "zero_stage": 3, "tokens_per_microbatch": 65536})
    assert costs_of(large, MIDDLE, on("H100", 4), WORK).train_token_s < across.train_token_s


def test_checkpointing_costs_one_more_forward_pass_and_an_adapter_saves_one() -> None:
    plain = costs(run()).train_token_s
    repeated = costs(run(model={"path": "any", "gradient_checkpointing": True})).train_token_s
    adapted = costs(run(model={"path": "any", "adapter": {"kind": "lora"}})).train_token_s
    assert 1.1 < repeated / plain < 4 / 3
    assert 2 / 3 < adapted / plain < 0.8


def test_an_adapter_is_published_alone() -> None:
    lora = {"path": "any", "adapter": {"kind": "lora"}}
    dora = {"path": "any", "adapter": {"kind": "lora", "dora": True}}
    whole, alone, merged = (costs(run(model=m)).publish_s for m in ({"path": "any"}, lora, dora))
    assert alone < whole / 10, "though by the host's memory"
    assert merged == whole


def test_a_mixture_computes_like_a_small_model_and_reads_like_a_large_one() -> None:
    few, many = (costs(run(), MIXTURE, samples=n) for n in (8, 2048))
    assert few.decode_step_s < many.decode_step_s < 4 * costs(run()).decode_step_s
    assert many.decode_sample_s < costs(run()).decode_sample_s


def test_an_engine_decodes_as_many_samples_as_settings_and_cache_allow() -> None:
    assert running_samples(run(), MIDDLE, WORK) == 512 / 8
    assert running_samples(run(rollout=ROLLOUT | {"concurrent_samples": 16}), MIDDLE, WORK) == 16
    tokens = 0.5 * 2**30 / MIDDLE["model.path"].shape.cache_per_token / 2
    assert running_samples(run(rollout=ROLLOUT | {"kv_cache_gib": 0.5}), MIDDLE, WORK) == int(tokens / WORK.sample)


@given(prompt=st.floats(1, 1000), response=st.floats(1, 1000), samples=st.integers(1, 4096), engines=st.integers(1, 64))
def test_costs_and_phases_are_finite_and_more_answers_never_take_less(
    prompt: float, response: float, samples: int, engines: int
) -> None:
    config = run(rollout=ROLLOUT | {"engines": engines})
    work = Workload(prompt, response, samples, samples, 1)
    found = costs_of(config, SMALL, on("L40S"), work)
    assert all(math.isfinite(value) and value >= 0 for value in asdict(found).values())
    longer = replace(work, response=2 * response)
    more = costs_of(config, SMALL, on("L40S"), longer)
    assert generate_s(config, SMALL, more, longer) >= 0.99 * generate_s(config, SMALL, found, work)


@pytest.mark.parametrize(
    ("sections", "names"),
    [
        ({}, ["rollout", "update", "publish"]),
        ({"algorithm": {"name": "grpo", "kl_coef": 0.1}}, ["rollout", "reference", "update", "publish"]),
        ({"rl": {"minibatches_per_step": 4}}, ["rollout", "old_logp", "update", "publish"]),
        (
            {"algorithm": "ppo"},
            ["rollout", "reference", "old_logp", "values", "critic_update", "update", "publish"],
        ),
        ({"placement": {"mode": "turns"}}, ["rollout", "update", "publish", "turns"]),
    ],
)
def test_the_phases_of_a_step_are_those_that_the_loop_has(sections: dict[str, Any], names: list[str]) -> None:
    assert list(phases(run(**sections))) == names


def test_the_offline_stages_only_update() -> None:
    for stage in ("sft", "reward_model"):
        assert list(phases(run(stage=stage, rewards={}, policy=POLICY))) == ["update"]


def test_a_preference_loss_asks_the_reference_once_and_orpo_never() -> None:
    for loss, names in (("sigmoid", ["reference"]), ("orpo", [])):
        config = run(stage="preference", rewards={}, preference={"loss": loss})
        found = first_phases(config, MIDDLE, on("H100"), costs(config), WORK)
        assert [phase.name for phase in found] == names


def test_two_epochs_train_twice_as_long_and_generate_once() -> None:
    one, two = (phases(run(rl={"epochs_per_step": n})) for n in (1, 2))
    assert two["rollout"] == one["rollout"]
    assert two["update"] == pytest.approx(2 * one["update"])


def test_a_group_waits_for_its_reward_model() -> None:
    config = run(rewards={"models": [{"path": "rm"}]})
    assert costs(config, MIDDLE | {"rewards.models.0.path": SMALL["model.path"]}).reward_s > 0
    assert costs(run()).reward_s == 0


def test_the_table_has_the_data_sheets_order() -> None:
    a100, h100, h200, b200, l40s = (accelerator(name) for name in NAMES if name != "cpu")
    assert a100.bfloat16_flops < h100.bfloat16_flops == h200.bfloat16_flops < b200.bfloat16_flops
    assert l40s.bandwidth < a100.bandwidth < h100.bandwidth < h200.bandwidth < b200.bandwidth
    assert accelerator("h200") is h200
    with pytest.raises(UserError, match="not known; known: A100-80G"):
        accelerator("H300")


def test_the_cpu_is_measured_and_threads_add_arithmetic_but_no_memory() -> None:
    one = accelerator("cpu")
    assert 1e9 < one.float32_flops < 1e13
    assert 1e8 < one.bandwidth < 1e12
    assert one.memory > 2**30
    assert one.with_threads(1) == one
    assert one.with_threads(10**6).bandwidth == one.bandwidth
    assert isinstance(one, Accelerator)
    assert accelerator("H100").with_threads(8) == accelerator("H100")
