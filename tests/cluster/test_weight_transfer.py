"""Weights from a real policy to two real engines by vLLM's transfer engines: over gloo, the steps that NCCL takes."""

from __future__ import annotations

import time

import pytest
import ray

from actors.rollout_group import RolloutGroup
from engine.cluster import started_workers
from engine.roles import WorkerLostError
from tests.cluster.conftest import random_batch
from tests.cluster.test_rollout import busy, configure, generate, mismatch, rest_of

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def workers(tiny_model, tmp_path_factory, ray_session):
    config = configure(tiny_model, tmp_path_factory.mktemp("transfer"), engines=2)
    with started_workers(config, updates=9, route="gloo") as workers:
        workers.sampling.rollouts.publish(0)
        yield workers


def test_engines_compute_with_what_was_sent(workers):
    rollouts: RolloutGroup = workers.sampling.rollouts
    before = mismatch(workers, generate(workers))
    workers.policy.update([random_batch(17)])
    stale = mismatch(workers, generate(workers))
    metrics = rollouts.publish(rollouts.version + 1)
    assert max(before, mismatch(workers, generate(workers))) < 1e-4 < stale
    assert metrics["rollout/weight_bytes"] == rollouts.policy.publish(9).num_bytes, "each of them once"
    acks = rollouts.workers.call("acknowledge", timeout_s=60)
    assert acks[0] == acks[1]
    assert acks[0].version == rollouts.version


def test_responses_under_way_go_on_with_the_new_weights(workers):
    rollouts: RolloutGroup = workers.sampling.rollouts
    version = rollouts.version
    asked = busy(workers)
    time.sleep(0.1)
    rollouts.publish(version + 1)
    answers = list(rest_of(rollouts).values())
    assert len(answers) == asked
    assert {v for g in answers for v in g.versions} == {version, version + 1}


def test_a_new_engine_is_brought_to_the_weights_by_itself(workers, monkeypatch):
    rollouts: RolloutGroup = workers.sampling.rollouts
    incidents = []
    monkeypatch.setattr(rollouts.workers, "report", incidents.append)
    ray.kill(rollouts.workers.actors[0])
    assert len(generate(workers)) == 12, "the other takes the prompts"
    end = time.monotonic() + 200
    while rollouts.fleet.serving() != [0, 1]:
        assert time.monotonic() < end, "it did not come back"
        generate(workers)
    assert {incident.actor for incident in incidents} == {"rollout[0]"}
    assert mismatch(workers, generate(workers)) < 1e-4
    rollouts.publish(rollouts.version + 1)
    assert rollouts.fleet.serving() == [0, 1]


def test_weights_that_came_in_part_are_never_used(workers):
    """The policy counts as lost, and the engines are replaced."""
    rollouts: RolloutGroup = workers.sampling.rollouts
    version, restarts = rollouts.version, rollouts.restarts
    rollouts.workers.call("begin_weights", version + 1, timeout_s=60)
    with pytest.raises(WorkerLostError, match=r"policy\[0\].*new weights came in part only") as lost:
        rollouts.publish(version + 1)
    assert (lost.value.group, lost.value.rank) == ("policy", 0)
    assert rollouts.restarts == restarts + 2
    workers.rebuild("policy", False)
    rollouts.publish(0)
    assert mismatch(workers, generate(workers)) < 1e-4
