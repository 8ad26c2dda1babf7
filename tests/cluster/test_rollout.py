"""Two real vLLM engines beside a real trainer: the weights arrive, and log-probs are those the trainer computes."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import ray

from actors.group import ActorError
from actors.rollout_group import RolloutGroup
from engine.cluster import started_workers
from engine.config import Config
from engine.data.batch import Batch
from engine.roles import Generation, GenerationRequest, SamplingSettings, Workers
from engine.schedule.incidents import Incident
from tests.cluster.conftest import random_batch

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(600)]
SETTINGS = SamplingSettings(temperature=0.7, max_new_tokens=8)
PROMPTS = [(7, 8, 9), (20, 21, 22, 23, 24), tuple(range(40, 90)), (5,)]


def configure(model, tmp_path, engines: int) -> Config:
    rewards = tmp_path / "rewards.py"
    rewards.write_text("def length(sample):\n    return float(sample.num_tokens)\n")
    return Config.model_validate(
        {
            "model": {"path": str(model)},
            "data": {"train": "unused.jsonl"},
            "rewards": {"functions": [f"{rewards}:length"]},
            "rl": {"steps": 9, "prompts_per_step": 4, "samples_per_prompt": 4},
            "optimizer": {"learning_rate": 0.05},
            "rollout": {
                "engines": engines,
                "temperature": 0.7,
                "max_new_tokens": 8,
                "max_model_len": 64,
                "kv_cache_gib": 0.03,
                "concurrent_samples": 128,
            },
        }
    )


@pytest.fixture(scope="module")
def workers(tiny_model, tmp_path_factory, ray_session):
    with started_workers(configure(tiny_model, tmp_path_factory.mktemp("rollout"), engines=2), updates=9) as workers:
        engines = workers.sampling.rollouts.workers
        with pytest.raises(ActorError, match=r"holds weights version None, not 0"):
            engines.call("admit", [GenerationRequest(0, (7, 8), (1,))], SETTINGS, version=0, timeout_s=60)
        workers.sampling.rollouts.publish(0)
        yield workers


def answers(workers: Workers, seeds=(1, 2, 3)) -> dict[int, list[Generation]]:
    requests = [GenerationRequest(key, prompt, seeds) for key, prompt in enumerate(PROMPTS)]
    return dict(workers.sampling.rollouts.generate(requests, SETTINGS))


def generate(workers: Workers, seeds=(1, 2, 3)) -> Batch:
    by_key = answers(workers, seeds)
    assert sorted(by_key) == list(range(len(PROMPTS)))
    samples = [(prompt, g) for key, prompt in enumerate(PROMPTS) for g in by_key[key]]
    return Batch(
        tokens=np.concatenate([[*p, *g.token_ids] for p, g in samples]).astype(np.int32),
        seq_lens=np.array([len(p) + len(g.token_ids) for p, g in samples], np.int32),
        loss_mask=np.concatenate([np.repeat([False, True], [len(p), len(g.token_ids)]) for p, g in samples]),
        rollout_logp=np.concatenate([[0.0] * len(p) + list(g.logprobs) for p, g in samples]).astype(np.float32),
        version=np.concatenate([[-1] * len(p) + list(g.versions) for p, g in samples]).astype(np.int32),
        group_ids=np.repeat(np.arange(len(PROMPTS)), len(seeds)),
        sample_ids=np.arange(len(samples)),
        totals=np.zeros(len(samples), np.float32),
    )


def mismatch(workers: Workers, batch: Batch) -> float:
    return float(np.abs(workers.policy.logprobs(batch) - batch.rollout_logp).max())


def test_log_probs_follow_the_sampling_temperature(workers):
    assert mismatch(workers, generate(workers)) < 1e-4


def test_the_same_seeds_give_the_same_responses_on_either_engine(workers):
    assert (generate(workers).tokens == generate(workers).tokens).all()
    assert not np.array_equal(generate(workers).tokens, generate(workers, seeds=(4, 5, 6)).tokens)


def test_more_prompt_tokens_than_one_engine_step_takes(workers):
    long = tuple(range(40, 90))
    requests = [GenerationRequest(key, (5 + key, *long), (key,)) for key in range(220)]
    answers = dict(workers.sampling.rollouts.generate(requests, SETTINGS))
    assert sorted(answers) == list(range(220))


def test_prompts_are_shared_between_the_engines(workers, monkeypatch):
    rollouts: RolloutGroup = workers.sampling.rollouts
    ranks = []
    submit = rollouts.workers.submit
    monkeypatch.setattr(
        rollouts.workers, "submit", lambda rank, *a, **k: (ranks.append(rank), submit(rank, *a, **k))[1]
    )
    generate(workers)
    assert set(ranks) == {0, 1}


def test_an_update_arrives_in_every_engine_and_old_weights_would_be_noticed(workers):
    old = generate(workers)
    workers.policy.update([random_batch(13)])
    assert mismatch(workers, old) > 1e-2, "the update is large enough to be seen"
    version = workers.sampling.rollouts.version + 1
    metrics = workers.sampling.rollouts.publish(version)
    assert metrics["rollout/weight_version"] == version
    new = generate(workers)
    assert mismatch(workers, new) < 1e-4
    assert set(new.version[new.loss_mask]) == {version}
    assert set(new.version[~new.loss_mask]) == {-1}


def test_an_engine_refuses_versions_that_do_not_go_up_and_bytes_that_differ(workers):
    rollouts: RolloutGroup = workers.sampling.rollouts
    version = rollouts.version
    snapshot = rollouts.policy.publish(version)
    with pytest.raises(ActorError, match=f"version {version} is not newer than {version}"):
        rollouts.workers.call("load_weights", snapshot, 60, timeout_s=60)
    tampered = replace(rollouts.policy.publish(version + 1), checksum="0" * 32)
    with pytest.raises(ActorError, match=f"version {version + 1} has checksum"):
        rollouts.workers.call("load_weights", tampered, 60, timeout_s=60)
    assert mismatch(workers, generate(workers)) < 1e-4, "the refused weights changed nothing"


def test_a_late_sample_is_aborted_and_leaves_the_engine_usable(workers):
    actor = workers.sampling.rollouts.workers
    late = [GenerationRequest(0, (7, 8), (1, 2))]
    actor.call("admit", late, SETTINGS, version=workers.sampling.rollouts.version, timeout_s=60)
    with pytest.raises(ActorError, match="samples not finished after 0 s"):
        actor.call("collect", 0, within_s=0.001, timeout_s=60)
    assert mismatch(workers, generate(workers)) < 1e-4


def test_weights_that_lost_a_bit_are_told_and_published_again(workers, monkeypatch):
    rollouts: RolloutGroup = workers.sampling.rollouts
    incidents: list[Incident] = []
    publish, tampered = rollouts.policy.publish, []

    def lose_a_bit(version: int):
        snapshot = publish(version)
        if not tampered:
            tampered.append(version)
            return replace(snapshot, checksum="0" * 32)
        return snapshot

    monkeypatch.setattr(rollouts.policy, "publish", lose_a_bit)
    monkeypatch.setattr(rollouts.workers, "report", incidents.append)
    rollouts.publish(rollouts.version + 1)
    assert {incident.kind for incident in incidents} == {"weights_corrupted"}
    assert rollouts.fleet.serving() == [0, 1]
    assert mismatch(workers, generate(workers)) < 1e-4


def test_an_engine_that_dies_leaves_its_prompts_to_the_other_and_comes_back(workers, monkeypatch):
    rollouts: RolloutGroup = workers.sampling.rollouts
    incidents: list[Incident] = []
    monkeypatch.setattr(rollouts.workers, "report", incidents.append)
    expected = {g.token_ids for group in answers(workers).values() for g in group}
    requests = [GenerationRequest(k, p, (1, 2), sample_ids=(2 * k, 2 * k + 1)) for k, p in enumerate(PROMPTS)]
    going = rollouts.generate(requests, SETTINGS)
    first = next(going)
    ray.kill(rollouts.workers.actors[0])
    rest = dict([first, *going])
    assert sorted(rest) == list(range(len(PROMPTS)))
    assert {g.token_ids for group in rest.values() for g in group} <= expected, "the same seeds, the same tokens"
    rollouts.publish(rollouts.version + 1)
    assert 1 in rollouts.fleet.serving(), "nobody waits for the new engine"
    end = time.monotonic() + 200
    while rollouts.fleet.serving() != [0, 1]:
        assert time.monotonic() < end, "it did not come back"
        rollouts.publish(rollouts.version + 1)
        time.sleep(0.5)
    assert all(incident.kind == "actor_died" and incident.actor == "rollout[0]" for incident in incidents)
    assert mismatch(workers, generate(workers)) < 1e-4


def test_an_untied_output_embedding_arrives_too(untied_model, tmp_path):
    with started_workers(configure(untied_model, tmp_path, engines=1), updates=9) as workers:
        workers.sampling.rollouts.publish(0)
        workers.policy.update([random_batch(13)])
        workers.sampling.rollouts.publish(1)
        assert mismatch(workers, generate(workers)) < 1e-4
