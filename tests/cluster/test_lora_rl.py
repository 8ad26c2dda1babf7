"""LoRA in reinforcement learning: only the adapter travels, engines and trainer agree, a dead engine gets it back."""

from __future__ import annotations

import json

import numpy as np
import pytest
import ray
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from engine import pipeline
from engine.cluster import started_workers
from engine.config import Config
from engine.roles import GenerationRequest, SamplingSettings
from engine.stages.experience import generate as answers
from engine.stages.experience import sample_seeds
from tests.cluster.conftest import random_batch
from tests.cluster.test_rollout import PROMPTS, generate, mismatch

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(600)]
RANK = 4


def adapter_bytes(folder) -> int:
    """Bytes of the LoRA factors of every linear layer of a model: float32, rank * (inputs + outputs) each."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    layers = [m for n, m in model.named_modules() if n.endswith("_proj")]
    return sum(4 * RANK * (layer.in_features + layer.out_features) for layer in layers)


@pytest.fixture
def config(raw_config) -> Config:
    raw_config["model"]["adapter"] = {"kind": "lora", "rank": RANK, "alpha": 8}
    raw_config["optimizer"] = {"learning_rate": 0.02}
    return Config.model_validate(raw_config)


def test_a_step_moves_the_adapters_bytes_and_leaves_the_base_alone(config, tiny_model):
    raw = config.model_dump(mode="json") | {"algorithm": {"kl_coef": 0.01}}
    raw["rl"]["steps"] = 3
    raw["model"]["export"] = "adapter"
    result = pipeline.run(Config.model_validate(raw))

    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    steps = [m for m in map(json.loads, lines) if "policy/loss" in m]
    assert len(steps) == 3
    assert {m["rollout/weight_bytes"] for m in steps} == {adapter_bytes(tiny_model)}
    assert max(m["mismatch/logp_abs_max"] for m in steps) < 1e-3
    assert abs(steps[0]["policy/kl"]) < 1e-6, "the frozen weights are the reference"
    assert steps[-1]["policy/kl"] > 0
    saved = load_file(result.model / "adapter_model.safetensors")
    assert sum(tensor.numel() * 4 for tensor in saved.values()) == adapter_bytes(tiny_model)
    assert not (result.model / "model.safetensors").exists()


def test_a_merged_model_is_saved_by_default(config, tiny_model):
    raw = config.model_dump(mode="json")
    raw["rl"]["steps"] = 1
    result = pipeline.run(Config.model_validate(raw))
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (result.model, tiny_model))
    assert ours.keys() == theirs.keys()
    changed = {name for name in ours if (ours[name] != theirs[name]).any()}
    assert changed == {name for name in ours if "_proj" in name}


def test_a_killed_engine_is_replaced_and_gets_its_adapter_back(config):
    settings = SamplingSettings(temperature=1.0, max_new_tokens=8)
    with started_workers(config, updates=4) as workers:
        rollouts = workers.sampling.rollouts
        rollouts.publish(0)
        workers.policy.update([random_batch(13)])
        rollouts.publish(1)
        requests = [GenerationRequest(i, p, sample_seeds(0, i, count=4)) for i, p in enumerate(PROMPTS)]
        expected = dict(answers(rollouts, requests, settings))
        ray.kill(rollouts.workers.actors[0])
        again = dict(answers(rollouts, requests, settings))
        assert rollouts.restarts == 1
        assert [[g.token_ids for g in again[i]] for i in again] == [[g.token_ids for g in expected[i]] for i in again]
        assert {v for g in again[0] for v in g.versions} == {1}
        batch = generate(workers)
        assert (batch.version[batch.loss_mask] == 1).all()
        assert float(np.abs(workers.policy.base_logprobs(batch) - workers.policy.logprobs(batch)).max()) > 1e-3
    assert batch is not None


@pytest.mark.thorough
def test_dora_and_ia3_are_merged_for_the_engines(raw_config):
    for adapter in ({"kind": "lora", "dora": True, "rank": RANK}, {"kind": "ia3"}):
        raw_config["model"]["adapter"] = adapter
        raw_config["optimizer"] = {"learning_rate": 0.02}
        raw_config["rollout"]["temperature"] = 0.7
        with started_workers(Config.model_validate(raw_config), updates=4) as workers:
            workers.sampling.rollouts.publish(0)
            workers.policy.update([random_batch(13)])
            workers.sampling.rollouts.publish(1)
            assert mismatch(workers, generate(workers)) < 1e-4
