"""Generation that runs ahead of the training: what starts when, what a step takes, what survives a resume."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config import Config
from engine.data.batch import Batch
from engine.data.prompts import Prompt
from engine.plan import Plan
from engine.rewards.composition import Component
from engine.rewards.contract import Sample, Scores
from engine.roles import Generation, GenerationRequest, Workers
from engine.stages.rl import RLStage
from engine.tracking.tracker import Tracker
from tests.stages.doubles import Engines, Rewards, sampling


class Policy:
    """Keeps what it was given; `meanwhile` happens while an update is going on."""

    def __init__(self) -> None:
        self.seen: list[Batch] = []
        self.meanwhile = lambda: None

    def update(self, minibatches: Any) -> dict[str, float]:
        self.seen += minibatches
        self.meanwhile()
        return {"policy/updates": 1.0, "policy/skipped_updates": 0.0}


def two_tokens(request: GenerationRequest, version: int) -> list[Generation]:
    return [Generation((9, 1), (-1.0, -1.0), (version, version), "x", "stop") for _ in request.seeds]


def by_place(samples: list[Sample]) -> Scores:
    totals = np.arange(len(samples), dtype=np.float32)
    return Scores({"r": totals}, totals)


@contextmanager
def running(folder: Path, engines: Engines, policy: Policy, staleness: int, steps: int = 8) -> Any:
    raw = {"model": {"path": "m"}, "data": {"train": "t"}, "rewards": {"functions": ["a.py:f"]}}
    raw |= {"name": folder.name, "output_dir": str(folder.parent)}
    raw |= {"rl": {"steps": steps, "prompts_per_step": 2, "samples_per_prompt": 2, "max_staleness": staleness}}
    config = Config.model_validate(raw)
    tracker = Tracker(config)
    model: Any = policy
    workers = Workers(policy=model, sampling=sampling(engines, Rewards(by_place)))
    prompts = [Prompt((5, 6, i), f"prompt {i}", {}) for i in range(7)]
    yield RLStage(config, workers, tracker, Plan(train_prompts=prompts, components=[Component("r")]))
    tracker.close("succeeded")


def test_prompts_of_later_steps_are_asked_before_the_first_is_trained(tmp_path):
    engines = Engines(two_tokens)
    with running(tmp_path / "run", engines, Policy(), 2) as stage:
        stage.begin(0)
        stage.step(1)
        assert len(engines.requests) == 6
        stage.step(2)
        assert len(engines.requests) == 8


def test_answers_are_scored_while_the_policy_is_in_training(tmp_path):
    engines, policy = Engines(two_tokens, at_once=False), Policy()
    scored = threading.Event()
    with running(tmp_path / "run", engines, policy, 1) as stage:
        stage.begin(0)

        def finish_others() -> None:
            engines.finish(*engines.open)
            assert scored.wait(10), "nobody took them while the update was going on"

        policy.meanwhile = finish_others
        ask, score = engines.ask, stage.experience.rewards.submit

        def ask_and_finish_a_step(requests: Any, settings: Any) -> None:
            ask(requests, settings)
            if len(engines.requests) == 4:
                engines.finish(0, 1)

        def submit(key: int, samples: Any) -> None:
            score(key, samples)
            if key == 3:
                scored.set()

        engines.ask, stage.experience.rewards.submit = ask_and_finish_a_step, submit
        stage.step(1)
    assert scored.is_set()


def test_how_old_the_tokens_are_is_measured_and_bounded(tmp_path):
    engines, policy = Engines(two_tokens), Policy()
    with running(tmp_path / "run", engines, policy, 1) as stage:
        stage.begin(0)
        first, second, third = (stage.step(step) for step in (1, 2, 3))
    assert (first["rollout/staleness/0"], first["rollout/staleness"]) == (1.0, 0.0)
    assert (second["rollout/staleness/1"], third["rollout/staleness/1"]) == (1.0, 1.0)
    versions = [set(batch.version[batch.loss_mask].tolist()) for batch in policy.seen]
    assert versions == [{0}, {0}, {1}]


def test_a_token_beyond_the_bound_is_never_trained(tmp_path):
    engines, policy = Engines(lambda request, version: two_tokens(request, 0)), Policy()
    with running(tmp_path / "run", engines, policy, 1) as stage:
        stage.begin(0)
        for step in (1, 2):
            stage.step(step)
        with pytest.raises(AssertionError, match="version 0 are to be trained, more than 1 versions behind 2"):
            stage.step(3)
    assert len(policy.seen) == 2


def test_what_was_under_way_is_generated_again_after_a_resume_and_nothing_is_lost(tmp_path):
    engines = Engines(two_tokens)
    with running(tmp_path / "killed", engines, Policy(), 2) as stage:
        stage.begin(0)
        for step in (1, 2):
            stage.step(step)
        state = json.loads(json.dumps(stage.state()))
        under_way = [(r.prompt, r.seeds, r.sample_ids) for r in engines.requests[4:]]
    engines, policy = Engines(two_tokens), Policy()
    with running(tmp_path / "resumed", engines, policy, 2) as stage:
        stage.load_state(state)
        stage.begin(2)
        for step in range(3, 9):
            metrics = stage.step(step)
            assert max(age for age in range(3) if metrics[f"rollout/staleness/{age}"] > 0) <= 2
        asked = [(r.prompt, r.seeds, r.sample_ids) for r in engines.requests]
        assert asked[: len(under_way)] == under_way
        assert not stage.ledger.in_flight
        assert (stage.ledger.admitted, stage.ledger.trained) == (32, 32)
    trained = [int(i) for batch in policy.seen for i in batch.sample_ids]
    assert sorted(trained) == list(range(8, 32))


def test_staleness_leaves_the_samples_of_a_run_as_they_are(tmp_path):
    """Which prompts with which seeds: only the weights that answer them differ."""
    asked = []
    for staleness in (0, 1, 3):
        engines = Engines(two_tokens)
        with running(tmp_path / f"run{staleness}", engines, Policy(), staleness) as stage:
            stage.begin(0)
            for step in range(1, 9):
                stage.step(step)
        asked.append([(r.prompt, r.seeds, r.sample_ids) for r in engines.requests])
    assert asked[0] == asked[1] == asked[2]
    assert len(asked[0]) == 16
