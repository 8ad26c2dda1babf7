"""The policy on real DeepSpeed process groups: neither ranks, ZeRO stage nor micro-batches change the result."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.group import Slots, WorkerGroup, rendezvous, start_all
from actors.policy import PolicyActor, PolicyGroup
from actors.reference import ReferenceActor, ReferenceGroup
from engine.cluster import trainer_environment
from engine.config import Config
from engine.schedule.placement import Seat
from tests.cluster.conftest import random_batch

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(600)]
STEPS = 5


def configure(raw_config, *, model=None, **policy) -> Config:
    raw = raw_config | {
        "model": raw_config["model"] | (model or {}),
        "policy": {"tokens_per_microbatch": 64} | policy,
        "optimizer": {"learning_rate": 1e-2},
        "algorithm": {"correction": {"mode": "none"}, "loss_aggregation": "token-mean"},
    }
    return Config.model_validate(raw)


class Session:
    """A policy group in a placement group of its own."""

    def __init__(self, config: Config) -> None:
        from ray.util.placement_group import placement_group

        ranks = config.policy.ranks
        self.placement = placement_group([{"CPU": 1}] * ranks)
        assert self.placement.wait(60)
        slots = Slots(self.placement, [Seat(rank, {"CPU": 1}) for rank in range(ranks)])
        arguments = [(config, info, STEPS) for info in rendezvous(slots, 60)]
        env = trainer_environment("cpu", 1)
        self.workers = WorkerGroup("policy", PolicyActor, slots, arguments=arguments, env=env)
        start_all([self.workers], 300)
        self.policy = PolicyGroup(config, self.workers)

    def __enter__(self) -> PolicyGroup:
        return self.policy

    def __exit__(self, *exc: object) -> None:
        from ray.util.placement_group import remove_placement_group

        self.workers.kill()
        remove_placement_group(self.placement)


def train(policy: PolicyGroup) -> tuple[list[dict[str, float]], np.ndarray]:
    metrics = [policy.update([random_batch(13, seed=step)]) for step in range(STEPS)]
    return metrics, policy.logprobs(random_batch(7, seed=99))


@pytest.fixture(scope="module")
def one_rank(tiny_model):
    """Losses and final log-probs of one rank without ZeRO, micro-batches of 64 tokens."""
    raw = {
        "model": {"path": str(tiny_model)},
        "data": {"train": "unused.jsonl"},
        "rewards": {"functions": ["unused.py:f"]},
        "rl": {"steps": STEPS, "prompts_per_step": 4, "samples_per_prompt": 4},
        "rollout": {"max_new_tokens": 8, "max_model_len": 64},
    }
    with Session(configure(raw)) as policy:
        return train(policy)


@pytest.mark.parametrize(
    "policy",
    [
        {"ranks": 2, "zero_stage": 0},
        {"ranks": 2, "zero_stage": 2},
        {"ranks": 2, "zero_stage": 3},
        {"zero_stage": 1, "tokens_per_microbatch": 4096},
        {"zero_stage": 3, "model": {"gradient_checkpointing": True}},
    ],
    ids=["two ranks", "two ranks, ZeRO-2", "two ranks, ZeRO-3", "one micro-batch, ZeRO-1", "recomputed activations"],
)
def test_ranks_zero_stages_and_microbatch_sizes_give_the_same_training(one_rank, raw_config, policy):
    expected, expected_logp = one_rank
    with Session(configure(raw_config, **policy)) as group:
        metrics, logp = train(group)
    for ours, theirs in zip(metrics, expected, strict=True):
        assert ours["policy/loss"] == pytest.approx(theirs["policy/loss"], abs=1e-5)
        assert ours["policy/grad_norm"] == pytest.approx(theirs["policy/grad_norm"], rel=1e-3)
        assert ours["policy/entropy"] == pytest.approx(theirs["policy/entropy"], abs=1e-4)
    assert np.abs(logp - expected_logp).max() < 1e-4
    assert max(abs(m["policy/loss"]) for m in expected) > 1e-3, "the losses are large enough to tell a difference"


def test_log_probs_are_those_of_the_model_alone_on_each_sample(raw_config, tiny_model, batch):
    config = configure(raw_config)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with Session(config) as policy:
        ours_T = policy.logprobs(batch)
    start = 0
    for length in batch.seq_lens:
        ids = torch.from_numpy(batch.tokens[start : start + length]).long()
        with torch.no_grad():
            logp = torch.log_softmax(model(ids[None]).logits[0, :-1], -1).gather(1, ids[1:, None])[:, 0]
        mask = batch.loss_mask[start : start + length]
        np.testing.assert_allclose(ours_T[start : start + length][mask], logp.numpy()[mask[1:]], atol=2e-5)
        assert (ours_T[start : start + length][~mask] == 0).all()
        start += length


def test_the_reference_agrees_with_the_untrained_policy(raw_config, batch):
    config = configure(raw_config)
    from ray.util.placement_group import placement_group, remove_placement_group

    placement = placement_group([{"CPU": 1}] * 2)
    slots = Slots(placement, [Seat(rank, {"CPU": 1}) for rank in range(2)])
    workers = WorkerGroup(
        "reference", ReferenceActor, slots, arguments=[(config,)] * 2, env=trainer_environment("cpu", 1)
    )
    start_all([workers], 120)
    with Session(config) as policy:
        ours = policy.logprobs(batch)
        theirs = ReferenceGroup(config, workers, policy.hidden_size).logprobs(batch)
    workers.kill()
    remove_placement_group(placement)
    assert np.abs(ours - theirs).max() < 1e-5


def test_the_saved_model_is_the_trained_one_and_loads_with_transformers(raw_config, tiny_model, batch, tmp_path):
    start = shutil.copytree(tiny_model, tmp_path / "start")
    (start / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.9}')  # loads, but cannot be saved
    folder = tmp_path / "model"
    with Session(configure(raw_config, model={"path": str(start)}, ranks=2, zero_stage=3)) as policy:
        policy.update([batch])
        ours_T = policy.logprobs(batch)
        policy.save(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    AutoTokenizer.from_pretrained(folder)
    length = int(batch.seq_lens[0])
    ids = torch.from_numpy(batch.tokens[:length]).long()
    with torch.no_grad():
        logp = torch.log_softmax(model(ids[None]).logits[0, :-1], -1).gather(1, ids[1:, None])[:, 0].numpy()
    mask = batch.loss_mask[:length]
    np.testing.assert_allclose(ours_T[:length][mask], logp[mask[1:]], atol=2e-5)
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


@pytest.mark.parametrize("stage", [0, 2])
def test_bfloat16_trains_too(raw_config, batch, stage):
    with Session(configure(raw_config, model={"dtype": "bfloat16"}, zero_stage=stage)) as policy:
        before = policy.logprobs(batch)
        metrics = policy.update([batch])
        assert metrics["policy/grad_norm"] > 0
        assert np.abs(policy.logprobs(batch) - before).max() > 1e-2


@pytest.mark.parametrize("policy", [{}, {"ranks": 2, "zero_stage": 2}, {"ranks": 2, "zero_stage": 3}], ids=str)
def test_an_update_that_is_not_finite_leaves_no_trace(raw_config, batch, policy):
    """The same two updates, with one of NaN between them or without: losses, schedule and log-probs are the same."""
    advantages = batch.annotations["advantages"].copy()
    advantages[np.flatnonzero(batch.loss_mask)[0]] = np.nan
    poisoned, other = batch.annotate(advantages=advantages), random_batch(9, seed=5)
    results = []
    for updates in ([batch, other], [batch, poisoned, other]):
        with Session(configure(raw_config, **policy)) as group:
            metrics = group.update(updates)
            results.append((metrics, group.logprobs(batch)))
    (clean, expected), (metrics, logp) = results
    assert (metrics["policy/updates"], metrics["policy/skipped_updates"]) == (2, 1)
    assert (logp == expected).all()
    assert {**metrics, "policy/skipped_updates": 0.0} == clean
