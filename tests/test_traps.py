"""Traps that engines of this kind fell into, each with a test whose name tells it. Those that are not here:

Maths, in tests/algorithms
    identical rewards that are no binary fraction   test_advantages::test_equal_scores_that_are_no_binary_fraction...
    GAE across tool tokens                          test_advantages::test_gae_does_not_decay_across_tool_tokens
    gradients at log-ratios of 200                  test_kl, test_policy_losses, test_invariances::..._up_to_200
    a pairwise loss at a gap of 100                 test_reward_model::test_a_pairwise_loss_does_not_overflow...
    log-probs and entropy: float32, temperature     test_logprobs
    normalisation over micro-batches and ranks      test_invariances, and on real ranks cluster/test_policy
    statistics of the global batch                  test_invariances::test_statistics_belong_to_the_global_batch...
    clipping before baselines                       stages/test_rl_steps::test_rewards_are_clipped_before...
    top-p and top-k                                 are not offered, so the log-probs are those of the distribution
Tokens, in tests/data/test_conversations, test_prompts
Loop
    a rank's error while others hang                cluster/test_group::test_one_ranks_exception_surfaces_at_once...
    equally many passes, within the budget          schedule/test_balancing
    the critic's warm-up                            cluster/test_ppo::test_in_the_critics_warm_up_the_policy_stays...
    dynamic sampling that runs out                  stages/test_rl_steps::test_dynamic_sampling_keeps_the_accepted...
    an update skipped leaves no gradients           cluster/test_policy::test_an_update_that_is_not_finite_leaves...
"""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.group import Split
from actors.weights import pack
from engine.algorithms.advantages import whiten
from engine.algorithms.off_policy import importance_weights
from engine.config import Config
from engine.data.batch import Batch
from engine.data.sampler import RowSampler
from engine.plan import Plan
from engine.rewards.contract import Scores
from engine.roles import GenerationRequest, Workers
from engine.stages.pretrain import PretrainStage
from engine.tracking.tracker import Tracker


def configure(**changes: Any) -> Config:
    raw: dict[str, Any] = {"model": {"path": "m"}, "data": {"train": "t"}, "rewards": {"functions": ["a.py:f"]}}
    return Config.model_validate(raw | changes)


def test_one_reward_that_is_not_finite_does_not_reach_the_whitening():
    scores = Scores.without_opinion(4).plus("rm", np.array([1, np.nan, 3, np.inf], np.float32), 2.0, [10, 11, 12, 13])
    assert scores.dropped == {1: "reward_not_finite", 3: "reward_not_finite"}
    assert [incident["sample_id"] for incident in scores.incidents] == [11, 13]
    kept = [i for i in range(4) if i not in scores.dropped]
    assert whiten(torch.from_numpy(scores.totals[kept])).isfinite().all()
    again = scores.plus("other", np.ones(4, np.float32), 1.0, [10, 11, 12, 13])
    assert (again.totals[kept].tolist(), set(again.dropped)) == ([3.0, 7.0], {1, 3})


def test_a_reward_model_does_not_bring_back_what_a_function_failed_on():
    failed = Scores({"f": np.array([np.nan, 1], np.float32)}, np.array([np.nan, 1], np.float32), {0: "reward_timeout"})
    scores = failed.plus("rm", np.ones(2, np.float32), 1.0, [0, 1])
    assert scores.dropped == {0: "reward_timeout"}
    assert math.isnan(scores.totals[0])
    assert scores.totals[1] == 2


def test_sequence_masked_weights_do_not_let_single_tokens_through_unbounded():
    """Tokens of ratio e^4 and e^-4: the sample's weight is 1, and so is each token's, not 55."""
    logp_T, rollout_T = torch.tensor([0.0, -4.0, -1.0]), torch.tensor([-4.0, 0.0, -1.0])
    for level in ("sequence", "geometric"):
        weights = importance_weights(logp_T, rollout_T, [3], level=level, mode="mask", cap=2.0)
        torch.testing.assert_close(weights, torch.ones(3))


def test_temperature_0_is_refused_for_training():
    with pytest.raises(ValueError, match=r"rollout\.temperature: 0 is greedy"):
        configure(rollout={"temperature": 0})


def test_a_response_as_long_as_the_model_leaves_no_prompt_and_is_refused():
    with pytest.raises(ValueError, match="leaves no room for a prompt"):
        configure(rollout={"max_new_tokens": 2048, "max_model_len": 2048})


class Counter:
    """A model in training, as a stage sees it, that counts rows."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def update(self, minibatches: Any) -> dict[str, float]:
        self.rows += [len(batch) for batch in minibatches]
        return {"train/skipped_updates": 0.0}


def test_the_last_small_batch_of_an_epoch_trains(tmp_path, monkeypatch):
    config = configure(stage="pretrain", training={"rows_per_update": 4}, output_dir=str(tmp_path), rewards={})
    counter: Any = Counter()
    monkeypatch.setattr(PretrainStage, "batch", lambda self, rows, step: batch_of([3] * len(rows)))
    tracker = Tracker(config)
    stage = PretrainStage(config, Workers(policy=counter), tracker, Plan(train=[None] * 10, rows=10, updates=3))
    for step in (1, 2, 3):
        stage.step(step)
    tracker.close("succeeded")
    assert counter.rows == [4, 4, 2]


def batch_of(lens: list[int]) -> Batch:
    total = sum(lens)
    mask = np.ones(total, bool)
    mask[np.cumsum([0, *lens[:-1]])] = False
    return Batch.offline(np.arange(total, dtype=np.int32), np.array(lens, np.int32), mask, np.arange(len(lens)))


@given(lens=st.lists(st.integers(2, 60), min_size=1, max_size=30), ranks=st.integers(1, 4))
@settings(max_examples=300, deadline=None)
def test_every_rank_runs_equally_many_passes_none_over_the_budget_and_no_sample_is_lost(lens, ranks):
    batch = batch_of(lens)
    shares = Split.of(batch, ranks=ranks, token_budget=64, hidden_size=8).shares()
    assert len({len(share) for share in shares}) == 1
    assert max(len(micro.tokens) for share in shares for micro in share) <= 64
    ids = sorted(int(i) for share in shares for micro in share for i in micro.sample_ids)
    assert ids == list(range(len(lens)))


def test_what_is_sent_to_an_engine_is_token_ids_and_no_tokenizer():
    request = GenerationRequest(0, tuple(range(100)), (1, 2, 3))
    assert len(pickle.dumps(request)) < 1000


def test_weights_travel_in_buckets_and_not_one_by_one():
    weights = [(f"layer.{i}", torch.ones(16, 16)) for i in range(300)]
    assert [len(bucket.entries) for bucket in pack(weights)] == [300]
    assert len(list(pack(weights, bucket_bytes=100 * 1024))) == 3


def test_the_seed_drives_the_order_of_the_prompts():
    orders = [RowSampler(64, seed=seed).next(64) for seed in (0, 0, 1)]
    assert list(orders[0]) == list(orders[1])
    assert list(orders[0]) != list(orders[2])
