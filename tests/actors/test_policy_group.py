"""What the policy's ranks are given of a step: only samples that the loss depends on, with everybody's denominators."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from actors.policy import PolicyGroup
from actors.trained import Minibatch
from engine.config import Config
from tests.cluster.conftest import random_batch


class Ranks:
    """Two ranks that keep what they are given."""

    actors = (0, 1)

    def call(self, method: str, *arguments: Any, timeout_s: float) -> list[int]:
        return [8, 8]

    def scatter(self, method: str, per_rank: list[list[Minibatch]], *, timeout_s: float) -> list[dict[str, float]]:
        self.given = per_rank
        return [{}, {}]


def given(advantages_B: list[float], **algorithm: Any) -> tuple[list[Minibatch], int, int]:
    """Each rank's minibatch of one update on 13 samples with these advantages; trained tokens; samples."""
    raw: dict[str, Any] = {"model": {"path": "m"}, "data": {"train": "t"}, "rewards": {"functions": ["a.py:f"]}}
    config = Config.model_validate(raw | {"algorithm": algorithm})
    batch = random_batch(13)
    advantages_T = np.repeat(advantages_B, batch.seq_lens).astype(np.float32) * batch.loss_mask
    ranks: Any = Ranks()
    PolicyGroup(config, ranks).update([batch.annotate(advantages=advantages_T)])
    return [minibatch for [minibatch] in ranks.given], int(batch.loss_mask.sum()), len(batch)


HALF = [0.0] * 7 + [1.0, -1.0] * 3


def seen(minibatches: list[Minibatch]) -> list[int]:
    return sorted(int(i) for m in minibatches for micro in m.microbatches for i in micro.sample_ids)


@pytest.mark.parametrize("loss", ["ppo_clip", "gspo", "cispo", "reinforce"])
def test_samples_without_an_advantage_are_not_computed_and_count_all_the_same(loss: str) -> None:
    minibatches, tokens, samples = given(HALF, name="grpo", loss=loss, kl_coef=0)
    assert seen(minibatches) == list(range(7, 13))
    assert {(m.total_tokens, m.total_sequences) for m in minibatches} == {(tokens, samples)}


@pytest.mark.parametrize("term", [{"kl_coef": 0.1, "kl_in": "loss"}, {"kl_coef": 0, "entropy_coef": 0.1}])
def test_they_are_where_something_else_enters_the_loss(term: dict[str, Any]) -> None:
    minibatches, _, _ = given(HALF, name="grpo", **term)
    assert seen(minibatches) == list(range(13))


def test_without_any_advantage_each_rank_still_runs_a_pass() -> None:
    minibatches, _, _ = given([0.0] * 13, name="grpo", kl_coef=0)
    assert [[len(micro) for micro in m.microbatches] for m in minibatches] == [[0], [0]]
