"""Engines and rewards as a stage sees them: what they say is told, and when they say it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from engine.rewards.contract import Sample, Scores
from engine.roles import Generation, GenerationRequest, Sampling


class Engines:
    """Answer every prompt with `answer`, of the version published last; `at_once=False`: those that `finish` names."""

    def __init__(self, answer: Callable[[GenerationRequest, int], list[Generation]], *, at_once: bool = True) -> None:
        self.answer = answer
        self.at_once = at_once
        self.requests: list[GenerationRequest] = []
        self.versions: list[int] = []
        self.open: dict[int, GenerationRequest] = {}
        self._finished: list[tuple[int, list[Generation]]] = []

    def ask(self, requests: Sequence[GenerationRequest], settings: Any) -> None:
        self.requests += requests
        self.open |= {request.key: request for request in requests}
        if self.at_once:
            self.finish(*self.open)

    def finish(self, *keys: int) -> None:
        version = self.versions[-1] if self.versions else 0
        self._finished += [(key, self.answer(self.open.pop(key), version)) for key in keys]

    def poll(self, wait_s: float) -> list[tuple[int, list[Generation]]]:
        finished, self._finished = self._finished, []
        assert finished or not self.at_once or wait_s == 0, "nothing will ever come"
        return finished

    def publish(self, version: int) -> dict[str, float]:
        self.versions.append(version)
        return {}


class Rewards:
    """Score every group with `score`, when asked for the result."""

    def __init__(self, score: Callable[[list[Sample]], Scores]) -> None:
        self.score = score
        self.samples: list[Sample] = []
        self._open: dict[int, list[Sample]] = {}

    def submit(self, key: int, samples: Sequence[Sample]) -> None:
        self._open[key] = list(samples)
        self.samples += samples

    def poll(self, wait_s: float, *, engines_idle: bool) -> list[tuple[int, Scores]]:
        scored, self._open = self._open, {}
        return [(key, self.score(samples)) for key, samples in scored.items()]


def sampling(engines: Engines, rewards: Rewards) -> Sampling:
    doubles: Any = (engines, rewards)
    return Sampling(*doubles)
