"""The controller's side of all rewards: functions start on a group at once; reward models score when all are there.

Models wait until `collect`, when the engines are idle, because they may share the engines' devices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import ray

from actors.group import WorkerGroup, as_completed
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
        self._pending: dict[Any, int] = {}
        self._done: list[tuple[int, Scores]] = []

    def submit(self, key: int, samples: Sequence[Sample]) -> None:
        """Start scoring; results come from `collect`. Raises what earlier calls have raised by now."""
        self._samples[key] = list(samples)
        if self.pool is None:
            self._done.append((key, Scores.without_opinion(len(samples))))
            return
        self._ask_functions(key)
        finished, _ = ray.wait(list(self._pending), num_returns=len(self._pending), timeout=0)
        self._done += self._wait_for(finished)

    def collect(self) -> Iterator[tuple[int, Scores]]:
        """Yields (key, scores) of everything submitted, as it is done."""
        values = self._ask_models(self._samples)
        scored = [*self._done, *self._wait_for(list(self._pending))]
        samples, self._samples, self._done = self._samples, {}, []
        for key, scores in scored:
            ids = [sample.id for sample in samples[key]]
            for name, by_group in values.items():
                scores = scores.plus(name, *by_group[key], ids)
            yield key, scores

    def reset(self) -> None:
        """Forget what was submitted."""
        self._pending.clear()
        self._samples.clear()
        self._done.clear()

    def _ask_functions(self, key: int) -> None:
        assert self.pool is not None, "only it runs functions"
        self._pending[self.pool.submit(0, "score", self._samples[key])] = key

    def _ask_models(self, samples: Mapping[int, list[Sample]]) -> dict[str, dict[int, ModelScores]]:
        """Name of each model -> key of each group -> rewards of its samples."""
        if not self.models or not samples:
            return {name: {} for name in self.models}
        batch = _to_batch([sample for group in samples.values() for sample in group])
        ends = np.cumsum([len(group) for group in samples.values()]).tolist()
        spans = dict(zip(samples, zip([0, *ends[:-1]], ends, strict=True), strict=True))
        answers = {name: model.scores(batch) for name, model in self.models.items()}
        return {
            name: {key: (values_B[start:end], steps[start:end]) for key, (start, end) in spans.items()}
            for name, (values_B, steps) in answers.items()
        }

    def _wait_for(self, refs: Sequence[Any]) -> Iterator[tuple[int, Scores]]:
        """Results of calls; a pool that is lost is replaced and asked again for all that it owed."""
        while refs:
            assert self.pool is not None, "only it has calls to wait for"
            try:
                pending = dict.fromkeys(refs, (self.pool, 0))
                for ref, scores in as_completed(pending, "score", self.config.timeouts.generate):
                    yield self._pending.pop(ref), scores
                return
            except WorkerLostError as error:
                self.pool.replace(error)
                keys = [self._pending.pop(ref) for ref in list(self._pending)]
                for key in keys:
                    self._ask_functions(key)
                refs = list(self._pending)


def _to_batch(samples: Sequence[Sample]) -> Batch:
    """Prompts and responses, the responses marked."""
    lens = [(len(sample.prompt_ids), len(sample.completion_ids)) for sample in samples]
    return Batch.offline(
        tokens=np.concatenate([np.array([*s.prompt_ids, *s.completion_ids], np.int32) for s in samples]),
        seq_lens=np.array([prompt + response for prompt, response in lens], np.int32),
        loss_mask=np.concatenate([np.repeat([False, True], pair) for pair in lens]),
        group_ids=np.arange(len(samples), dtype=np.int64),
    )
