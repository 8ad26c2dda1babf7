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
from engine.stages.experience import generate as generate_all
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
    return dict(generate_all(workers.sampling.rollouts, requests, SETTINGS))


def generate(workers: Workers, seeds=(1, 2, 3)) -> Batch:
    by_key = answers(workers, seeds)
    assert sorted(by_key) == list(range(len(PROMPTS)))
    return as_batch([(prompt, g) for key, prompt in enumerate(PROMPTS) for g in by_key[key]])


def as_batch(samples: list[tuple[tuple[int, ...], Generation]]) -> Batch:
    return Batch(
        tokens=np.concatenate([[*p, *g.token_ids] for p, g in samples]).astype(np.int32),
        seq_lens=np.array([len(p) + len(g.token_ids) for p, g in samples], np.int32),
        loss_mask=np.concatenate([np.repeat([False, True], [len(p), len(g.token_ids)]) for p, g in samples]),
        rollout_logp=np.concatenate([[0.0] * len(p) + list(g.logprobs) for p, g in samples]).astype(np.float32),
        version=np.concatenate([[-1] * len(p) + list(g.versions) for p, g in samples]).astype(np.int32),
        group_ids=np.arange(len(samples)),
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


def test_the_text_is_the_one_that_the_engine_makes_token_by_token(workers):
    """Which it does where it has to look for strings that end a response."""
    requests = [GenerationRequest(key, prompt, (1, 2, 3)) for key, prompt in enumerate(PROMPTS)]
    watched = replace(SETTINGS, stop=("never said",))
    expected = dict(generate_all(workers.sampling.rollouts, requests, watched))
    found = answers(workers)
    assert {key: [g.text for g in group] for key, group in found.items()} == {
        key: [g.text for g in group] for key, group in expected.items()
    }
    assert any(g.text for group in found.values() for g in group)


def test_more_prompt_tokens_than_one_engine_step_takes(workers):
    long = tuple(range(40, 90))
    requests = [GenerationRequest(key, (5 + key, *long), (key,)) for key in range(220)]
    answers = dict(generate_all(workers.sampling.rollouts, requests, SETTINGS))
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


def prompt_of(key: int) -> tuple[int, ...]:
    return (5 + key % 40, 7)


def busy(workers: Workers, samples: int = 64) -> int:
    """Give the engines something to do for a while; how many they have yet to answer."""
    requests = [GenerationRequest(key, prompt_of(key), (key,)) for key in range(samples)]
    workers.sampling.rollouts.ask(requests, replace(SETTINGS, max_new_tokens=60))
    return samples - len(workers.sampling.rollouts.poll(0.0))


def under_way(rollouts: RolloutGroup) -> bool:
    """Whether answers are outstanding."""
    return bool(rollouts._waiting) or any(rollouts._held)


def rest_of(rollouts: RolloutGroup) -> dict[int, Generation]:
    """What is under way."""
    answers: dict[int, Generation] = {}
    while under_way(rollouts):
        answers |= {key: generation for key, [generation] in rollouts.poll(1.0)}
    return answers


def test_an_engine_that_has_nothing_to_give_says_so(workers):
    for answers, _ in workers.sampling.rollouts.workers.call("collect", wait_s=0.01, timeout_s=60):
        assert answers == []


def test_weights_change_in_flight_and_each_token_knows_which_made_it(workers):
    rollouts: RolloutGroup = workers.sampling.rollouts
    version = rollouts.version
    workers.policy.update([random_batch(17)])
    asked = busy(workers)
    time.sleep(0.1)
    assert under_way(rollouts)
    rollouts.publish(version + 1)
    answers = list(rest_of(rollouts).values())
    assert len(answers) == asked
    assert all(len(g.versions) == len(g.token_ids) == len(g.logprobs) for g in answers)
    assert all(list(g.versions) == sorted(g.versions) for g in answers)
    assert {v for g in answers for v in g.versions} == {version, version + 1}
    assert any(len(set(g.versions)) == 2 for g in answers), "some responses go on under the new weights"
    assert mismatch(workers, generate(workers)) < 1e-4, "and later ones know nothing of the old"


def test_what_is_under_way_is_forgotten_and_engines_want_weights_again(workers):
    rollouts: RolloutGroup = workers.sampling.rollouts
    version = rollouts.version
    busy(workers)
    rollouts.reset()
    assert not under_way(rollouts)
    rollouts.publish(version)
    assert mismatch(workers, generate(workers)) < 1e-4


def test_weights_that_lost_a_bit_are_told_and_published_again(workers, monkeypatch):
    rollouts: RolloutGroup = workers.sampling.rollouts
    incidents: list[Incident] = []
    publish, tampered = rollouts.policy.publish, []

    def lose_a_bit(version: int, **how: bool):
        snapshot = publish(version, **how)
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


def test_engines_of_another_machine_get_the_weights_through_the_object_store(workers, monkeypatch):
    rollouts: RolloutGroup = workers.sampling.rollouts
    incidents: list[Incident] = []
    publish = rollouts.policy.publish

    def far_away(version: int, **how: bool):
        snapshot = publish(version, **how)
        return replace(snapshot, addresses=tuple(replace(a, path="/proc/0/fd/0") for a in snapshot.addresses))

    monkeypatch.setattr(rollouts.policy, "publish", far_away)
    monkeypatch.setattr(rollouts.workers, "report", incidents.append)
    rollouts.publish(rollouts.version + 1)
    assert incidents == []
    assert mismatch(workers, generate(workers)) < 1e-4


def test_an_engine_that_dies_leaves_its_prompts_to_the_other_and_comes_back(workers, monkeypatch):
    rollouts: RolloutGroup = workers.sampling.rollouts
    incidents: list[Incident] = []
    monkeypatch.setattr(rollouts.workers, "report", incidents.append)
    expected = {g.token_ids for group in answers(workers).values() for g in group}
    requests = [GenerationRequest(k, p, (1, 2), sample_ids=(2 * k, 2 * k + 1)) for k, p in enumerate(PROMPTS)]
    going = generate_all(rollouts, requests, SETTINGS)
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


def test_an_engine_that_keeps_a_prompt_for_too_long_is_replaced(workers, monkeypatch):
    rollouts: RolloutGroup = workers.sampling.rollouts
    incidents: list[Incident] = []
    monkeypatch.setattr(rollouts.workers, "report", incidents.append)
    patient = rollouts.config
    timeouts = patient.timeouts.model_copy(update={"generate": 0.01})
    asked = busy(workers)
    rollouts.config = patient.model_copy(update={"timeouts": timeouts})
    time.sleep(0.05)
    first = rollouts.poll(0.0)
    rollouts.config = patient
    assert [incident.kind for incident in incidents] == ["actor_late"]
    assert "no answer from generate() after" in incidents[0].message
    assert len(first) + len(rest_of(rollouts)) == asked, "the others took its prompts over"


def test_an_untied_output_embedding_arrives_too_and_responses_under_way_are_recomputed(untied_model, tmp_path):
    config = configure(untied_model, tmp_path, engines=1)
    config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"on_new_weights": "recompute"})})
    with started_workers(config, updates=9) as workers:
        workers.sampling.rollouts.publish(0)
        workers.policy.update([random_batch(13)])
        busy(workers)
        time.sleep(0.1)
        workers.sampling.rollouts.publish(1)
        answers = rest_of(workers.sampling.rollouts)
        assert {v for g in answers.values() for v in g.versions} == {0, 1}
        batch = as_batch([(prompt_of(key), g) for key, g in answers.items()])
        new = batch.version == 1
        assert np.abs(workers.policy.logprobs(batch) - batch.rollout_logp)[new].max() < 1e-4
        assert mismatch(workers, batch) > 1e-2, "what was said before is of the old weights"
        assert mismatch(workers, generate(workers)) < 1e-4
