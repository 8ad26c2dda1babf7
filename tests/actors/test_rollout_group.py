"""Prompts that no engine can take do not wait for ever."""

from __future__ import annotations

import time
from typing import Any

import pytest

from actors.group import DeadlineError
from actors.rollout_group import RolloutGroup
from engine.config import Config
from engine.roles import GenerationRequest, SamplingSettings


class OneEngine:
    """An engine that is up and holds no weights."""

    name = "rollout"
    actors = (None,)
    turns = None
    silence_s = None

    def rank_name(self, rank: int) -> str:
        return f"rollout[{rank}]"

    def record(self, kind: str, **fields: Any) -> None:
        pass


def poll_for_ever(rollouts: RolloutGroup) -> None:
    while True:
        assert rollouts.poll(1.0) == []


def test_a_prompt_waits_for_an_engine_as_long_as_one_may_take_to_start() -> None:
    raw: dict[str, Any] = {"model": {"path": "m"}, "data": {"train": "t"}, "rewards": {"functions": ["a.py:f"]}}
    config = Config.model_validate(raw | {"rl": {"max_staleness": 1}, "timeouts": {"start": 0.3}})
    workers: Any = OneEngine()
    policy: Any = None  # is at work, and not asked for weights
    rollouts = RolloutGroup(config, workers, policy)
    rollouts.fleet.expect(4)
    rollouts.ask([GenerationRequest(7, (1, 2), (3,))], SamplingSettings(1.0, 8))
    start = time.monotonic()
    with pytest.raises(DeadlineError, match=r"rollout\[0\]: no answer from start\(\) after 0\.\d s"):
        poll_for_ever(rollouts)
    assert 0.3 < time.monotonic() - start < 1.0, "and looks now and then"
