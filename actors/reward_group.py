"""The controller's side of all rewards: functions start on a group at once, and so do reward models that do not share
their devices or cores with the engines; the others score when the engines are idle.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np

from actors.group import Pulse, WorkerGroup, finished, late
from actors.reward_scorer import ModelScores, RewardScorerGroup
from engine.config import Config
from engine.data.batch import Batch
from engine.rewards.contract import Sample, Scores
from engine.roles import WorkerLostError


class RewardGroup:
    """Scores several groups at the same time; a slow function holds up its own group only."""

    def __init__(self, config: Config, pool: WorkerGroup | None, models: Mapping[str, RewardScorerGroup]) -> None:
        """`pool` runs the functions, if there are any; `models` are by the names of `rewards.models`."""
        self.config = config
        self.pool = pool
        self.models = models
        self._samples: dict[int, list[Sample]] = {}
        self._pending: dict[Any, tuple[int, float]] = {}
        self._done: dict[int, Scores] = {}
        self._answers: dict[int, Future[dict[str, ModelScores]]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reward-models")
        self._pulse = Pulse()

    def submit(self, key: int, samples: Sequence[Sample]) -> None:
        """Start scoring; `poll` gives the result."""
        self._samples[key] = list(samples)
        if self.pool is None:
            self._done[key] = Scores.without_opinion(len(samples))
        else:
            self._ask_functions(key)
        if self.models and self.config.roles_overlap:
            self._answers[key] = self._thread.submit(self._ask_models, self._samples[key])

    def poll(self, wait_s: float, *, engines_idle: bool) -> list[tuple[int, Scores]]:
        """(key, scores) of groups that are scored; waits for the first up to `wait_s` seconds.

        Raises what a function or a model has raised.
        """
        if self._pending:
            self._take_functions(wait_s)
        if self.models and engines_idle and not self.config.roles_overlap and not self._pending:
            for key in self._samples.keys() - self._answers.keys():
                self._answers[key] = self._thread.submit(self._ask_models, self._samples[key])
        if self._answers and not self._pending:
            wait(self._answers.values(), wait_s, return_when="FIRST_COMPLETED")
        return [(key, self._taken(key)) for key in list(self._done) if self._is_scored(key)]

    def reset(self) -> None:
        """Forget what was submitted."""
        for answer in self._answers.values():
            answer.cancel()
        for held in (self._pending, self._samples, self._done, self._answers):
            held.clear()

    def _is_scored(self, key: int) -> bool:
        return not self.models or (key in self._answers and self._answers[key].done())

    def _taken(self, key: int) -> Scores:
        samples, scores = self._samples.pop(key), self._done.pop(key)
        if self.models:
            for name, answer in self._answers.pop(key).result().items():
                scores = scores.plus(name, *answer, [sample.id for sample in samples])
        return scores

    def _ask_functions(self, key: int) -> None:
        assert self.pool is not None, "only it runs functions"
        self._pending[self.pool.submit(0, "score", self._samples[key])] = (key, time.monotonic())

    def _ask_models(self, samples: Sequence[Sample]) -> dict[str, ModelScores]:
        """What each model says of a group."""
        batch = _to_batch(samples)
        return {name: model.scores(batch) for name, model in self.models.items()}

    def _take_functions(self, wait_s: float) -> None:
        """Take the results that are there; a pool that is lost is replaced and asked again for all that it owed."""
        assert self.pool is not None, "only it has calls to wait for"
        try:
            for ref, scores in finished(dict.fromkeys(self._pending, (self.pool, 0)), "score", wait_s, self._pulse):
                key, since = self._pending.pop(ref)
                self._done[key] = scores
                now = time.time()
                self.pool.record_span(0, "score", now - (time.monotonic() - since), now)
            oldest = min((since for _, since in self._pending.values()), default=time.monotonic())
            deadline_s = self.config.timeouts.generate
            if time.monotonic() - oldest > deadline_s:
                raise late([(self.pool, 0)], "score", time.monotonic() - oldest, deadline_s)
        except WorkerLostError as error:
            self.pool.replace(error)
            keys = [key for key, _ in self._pending.values()]
            self._pending.clear()
            for key in keys:
                self._ask_functions(key)


def _to_batch(samples: Sequence[Sample]) -> Batch:
    """A group's prompt and responses, the responses marked."""
    lens = [(len(sample.prompt_ids), len(sample.completion_ids)) for sample in samples]
    return Batch.offline(
        tokens=np.concatenate([np.array([*s.prompt_ids, *s.completion_ids], np.int32) for s in samples]),
        seq_lens=np.array([prompt + response for prompt, response in lens], np.int32),
        loss_mask=np.concatenate([np.repeat([False, True], pair) for pair in lens]),
        group_ids=np.zeros(len(samples), np.int64),
    )
