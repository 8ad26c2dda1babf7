"""PPO's own machinery on real actors: ranks, warm-up, early stop, reward models as reward and as critic, placement."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from engine import pipeline
from engine.cluster import started_workers
from engine.config import Config, UserError
from engine.rewards.contract import Row, Sample
from tests.cluster.conftest import random_batch
from tests.conftest import thorough

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(600)]


def ppo(raw_config: dict[str, Any], name: str, **more: Any) -> Config:
    algorithm = {"name": "ppo", "kl_coef": 0.001} | more.pop("algorithm", {})
    raw = raw_config | {"name": name, "algorithm": algorithm, "optimizer": {"learning_rate": 0.01}}
    raw |= {"critic": {"learning_rate": 0.01}, "evaluation": {}, "data": {"train": raw_config["data"]["train"]}}
    return Config.model_validate(raw | more)


def steps_of(config: Config) -> list[dict[str, float]]:
    """Metrics of a run's steps, without what measures time."""
    pipeline.run(config)
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows if "reward/mean" in row]


def test_two_ranks_of_policy_and_critic_train_like_one_of_each(raw_config):
    sizes = {"steps": 5, "prompts_per_step": 4, "samples_per_prompt": 4, "minibatches_per_step": 2}
    one = steps_of(ppo(raw_config, "one", rl=sizes))
    two = steps_of(
        ppo(
            raw_config,
            "two",
            rl=sizes,
            policy={"ranks": 2, "zero_stage": 2, "tokens_per_microbatch": 128},
            critic={"ranks": 2, "learning_rate": 0.01},
        )
    )
    assert len(one) == len(two) == 5
    for ours, theirs in zip(two, one, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name] == pytest.approx(theirs[name], abs=1e-4, rel=1e-3), name
    assert one[-1]["critic/value"] > 1e-3, "the critic has moved"
    assert one[-1]["policy/kl"] > 1e-3, "the policy has moved"


def test_in_the_critics_warm_up_the_policy_stays_and_the_early_stop_ends_a_steps_updates(raw_config):
    config = ppo(
        raw_config,
        "warm-up",
        rl={"steps": 3, "prompts_per_step": 4, "samples_per_prompt": 4, "minibatches_per_step": 4},
        critic={"learning_rate": 0.01, "warmup_steps": 2},
        algorithm={"target_kl": 1e-6, "entropy_coef": 0.01},
    )
    first, second, third = steps_of(config)
    for step in (first, second):
        assert "policy/loss" not in step
        assert "rollout/weight_version" not in step
        assert (step["critic/updates"], step["policy/kl"]) == (4, pytest.approx(0, abs=1e-6))
    assert third["policy/kl"] == pytest.approx(0, abs=1e-6), "its samples are the starting policy's"
    assert third["rollout/weight_version"] == 3
    assert 1 <= third["policy/updates"] < 4, "the second update has moved too far from the policy that sampled"


@pytest.fixture(scope="module")
def reward_models(tiny_model, tmp_path_factory, ray_session) -> dict[str, str]:
    """A pairwise and a process reward model, barely trained."""
    rows = {
        "pairwise": {"prompt": "the quick", "chosen": " brown fox", "rejected": " lazy dog"},
        "process": {"prompt": "one and", "steps": ["two", "three are"], "labels": [1, 0]},
    }
    made = {}
    for kind, row in rows.items():
        folder = tmp_path_factory.mktemp(kind)
        (folder / "rows.jsonl").write_text("".join(json.dumps(row | {"n": i}) + "\n" for i in range(4)))
        raw = {
            "output_dir": str(folder),
            "stage": "reward_model",
            "model": {"path": str(tiny_model)},
            "data": {"train": str(folder / "rows.jsonl")},
            "reward_model": {"kind": kind},
            "training": {"updates": 2, "rows_per_update": 4, "max_length": 64},
            "optimizer": {"learning_rate": 0.01},
        }
        made[kind] = str(pipeline.run(Config.model_validate(raw)).model)
    return made


def samples_of(tokenizer: Any) -> list[Sample]:
    texts = [" brown fox", " two\nthree are\n", " the lazy\n\ndog"]
    prompt = tuple(tokenizer("the quick")["input_ids"])
    return [
        Sample(i, "the quick", text, Row({}), completion_ids=(*tokenizer(text)["input_ids"], 1), prompt_ids=prompt)
        for i, text in enumerate(texts)
    ]


@pytest.mark.parametrize(("mode", "devices"), [*thorough(("separate", 4)), ("packed", 1), ("turns", 1)])
def test_roles_sit_as_the_placement_says_and_reward_models_score_as_transformers_does(
    raw_config, reward_models, mode, devices
):
    """Policy, critic, reward model and engine; by turns they are four on one device, each working when asked."""
    kind = "process" if mode == "packed" else "pairwise"
    config = ppo(
        raw_config,
        mode,
        algorithm={"kl_coef": 0.0},
        placement={"mode": mode, "device": "accel"},
        critic={"path": reward_models["pairwise"]},
        rewards={"models": [{"path": reward_models[kind], "weight": 2.0}]},
    )
    tokenizer = AutoTokenizer.from_pretrained(reward_models[kind])
    samples = samples_of(tokenizer)
    with started_workers(config, updates=2) as workers:
        assert 4 - ray.available_resources().get("accel", 0.0) == pytest.approx(devices, abs=1e-2)
        workers.sampling.rollouts.publish(0)
        workers.sampling.rewards.submit(7, samples)
        [(key, scores)] = workers.sampling.rewards.poll(60.0, engines_idle=True)
        batch = random_batch(5)
        values = workers.critic.values(batch)
        again = workers.policy.logprobs(batch)
    assert key == 7
    expected = [judged(kind, reward_models[kind], sample, tokenizer) for sample in samples]
    np.testing.assert_allclose(scores.components["reward_model"], expected, rtol=1e-4, atol=1e-5)
    assert not scores.dropped
    np.testing.assert_allclose(values, valued(reward_models["pairwise"], batch), rtol=1e-3, atol=1e-4)
    assert (again[batch.loss_mask] < 0).all()


def judged(kind: str, path: str, sample: Sample, tokenizer: Any) -> float:
    """The reward of one sample, from transformers alone."""
    record = json.loads(Path(path, "reward_model.json").read_text())
    ids = torch.tensor([[*sample.prompt_ids, *sample.completion_ids]])
    with torch.no_grad():
        if kind == "pairwise":
            model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)
            return (model(ids).logits[0, 0].item() - record["mean"]) / record["std"]
        model = AutoModelForTokenClassification.from_pretrained(path, dtype=torch.float32)
        chances = model(ids).logits[0, :, 0].sigmoid()
    text, ends = "", []
    for position, token in enumerate(sample.completion_ids):
        before, text = text, text + ("" if token == 1 else tokenizer.decode([token]))
        if text.count("\n") > before.count("\n"):
            ends.append(position)
    if text.rpartition("\n")[2].strip():
        ends.append(len(sample.completion_ids) - 2)  # the last token before the end
    return float(min(chances[len(sample.prompt_ids) + end] for end in ends))


def valued(path: str, batch: Any) -> np.ndarray:
    """Values of a critic that starts as a reward model: its normalised score of what lies before each token."""
    record = json.loads(Path(path, "reward_model.json").read_text())
    model = AutoModelForTokenClassification.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        model.score.bias.zero_()
        parts = np.split(batch.tokens, np.cumsum(batch.seq_lens)[:-1])
        scores = [model(torch.from_numpy(part).long()[None]).logits[0, :, 0].numpy() for part in parts]
    before = np.concatenate([np.concatenate([[0.0], part[:-1]]) for part in scores])
    return np.where(batch.loss_mask, (before - record["mean"]) / record["std"], 0.0)


def test_what_no_cluster_can_hold_is_told_before_anything_starts(raw_config):
    config = ppo(raw_config, "large", placement={"device": "accel"}, rollout=raw_config["rollout"] | {"engines": 3})
    with pytest.raises(UserError, match=r"placement: .*accel.*; add nodes, let roles share devices"):
        pipeline.run(config)
    assert not (config.run_dir / "model").exists()
