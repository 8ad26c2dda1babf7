"""Traps that engines of this kind fell into, each with a test whose name tells it. Those that are not in this file
(paths from tests/):

Maths
    identical rewards that are no binary fraction
        algorithms/test_advantages.py::test_equal_scores_that_are_no_binary_fraction_give_exactly_zero
        stages/test_rl_steps.py::test_a_group_without_differences_gets_exactly_nothing
    GAE that decays across tool and observation tokens
        algorithms/test_advantages.py::test_gae_does_not_decay_across_tool_tokens
        stages/test_rl_steps.py::test_gae_does_not_decay_across_observation_tokens
    gradients at log-ratios of up to 200
        algorithms/test_kl.py::test_values_and_gradients_stay_finite_up_to_a_log_ratio_of_200
        algorithms/test_policy_losses.py::test_loss_and_gradient_stay_finite_for_extreme_log_ratios
        algorithms/test_invariances.py::test_gradients_of_every_objective_stay_finite_for_log_ratios_up_to_200
    masked importance weights of samples whose tokens are not clamped
        algorithms/test_off_policy.py::test_a_masked_sample_weight_is_never_above_the_cap_though_one_of_its_tokens_is
    log-probs that are not finite, trained on
        stages/test_rl_steps.py::test_log_probs_that_are_not_finite_are_never_trained_on
    a pairwise loss at a gap of 100
        algorithms/test_reward_model.py::test_a_pairwise_loss_does_not_overflow_at_a_gap_of_100
    log-probs in less than float32
        algorithms/test_logprobs.py::test_bfloat16_inputs_are_computed_in_float32_and_get_bfloat16_gradients
        algorithms/test_logprobs.py::test_autocast_does_not_lower_the_precision
    the engines' log-probs at another temperature than the samples'
        cluster/test_rollout.py::test_log_probs_follow_the_sampling_temperature
    entropy at another temperature than the samples'
        algorithms/test_logprobs.py::test_the_entropy_is_that_of_the_sampling_temperature
    a loss normalised per micro-batch or per rank
        algorithms/test_aggregate.py::test_microbatches_with_global_denominators_add_up_to_the_whole
        algorithms/test_invariances.py::test_micro_batches_and_ranks_with_global_denominators_are_the_whole
        algorithms/test_invariances.py::test_token_mean_is_one_mean_over_all_tokens_of_the_update_not_a_mean_of_means
        cluster/test_policy.py::test_ranks_zero_stages_and_microbatch_sizes_give_the_same_training
    gradients left behind by an update that did not happen
        cluster/test_policy.py::test_an_update_that_is_not_finite_leaves_no_trace
    whitening and statistics per micro-batch
        algorithms/test_invariances.py::test_statistics_belong_to_the_global_batch_not_to_a_micro_batch
        stages/test_rl_steps.py::test_rewards_are_whitened_on_the_global_batch
        stages/test_advantage.py::test_whitened_advantages_have_variance_1_over_tokens
    rewards clipped after the baseline
        stages/test_rl_steps.py::test_rewards_are_clipped_before_the_baseline_and_the_overlong_penalty_comes_after
Tokens
    masks by the length of the prompt tokenised alone
        data/test_conversations.py::test_plain_text_trains_the_answer_and_one_end
        data/test_conversations.py::test_a_template_trains_the_answer_through_its_end
        data/test_preferences.py::test_a_pair_is_the_prompt_with_either_answer
    an end forced onto rows that were cut
        data/test_conversations.py::test_a_cut_answer_has_no_end
    over-long prompts
        data/test_prompts.py::test_long_prompts_fail_with_their_places_and_lengths
        data/test_prompts.py::test_long_prompts_are_skipped_and_told
        data/test_prompts.py::test_truncation_keeps_the_end_and_the_prompt_becomes_what_the_model_sees
        data/test_prompts.py::test_truncation_never_cuts_a_chat_template
Loop
    steps that do not divide the prompts
        data/test_sampler.py::test_every_epoch_has_every_prompt_once_however_it_is_cut
    ranks with fewer samples than others
        schedule/test_balancing.py::test_a_rank_without_samples_gets_empty_passes
        actors/test_packed_model.py::test_an_empty_micro_batch_is_one_token_without_a_target
        cluster/test_stages.py::test_sharded_weights_are_measured_and_saved_whole
    the critic's warm-up, on real actors
        cluster/test_ppo.py::test_in_the_critics_warm_up_the_policy_stays_and_the_early_stop_ends_a_steps_updates
    dynamic sampling that runs out
        stages/test_rl_steps.py::test_dynamic_sampling_keeps_the_accepted_groups_when_rounds_run_out
    samples of weights that are not those that the loop believes in
        cluster/test_rollout.py::test_an_update_arrives_in_every_engine_and_old_weights_would_be_noticed
        cluster/test_rollout.py::test_an_engine_refuses_versions_that_do_not_go_up_and_bytes_that_differ
    the account of samples after a restart
        cluster/test_resume.py::test_a_killed_run_ends_as_if_it_had_never_been_killed
    a rank's error while others hang
        cluster/test_group.py::test_one_ranks_exception_surfaces_at_once_even_if_others_hang
"""

from __future__ import annotations

import json
import math
import pickle
import re
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from actors.packed_row import PackedRow
from actors.policy import PolicyActor
from actors.process import RankInfo
from actors.split import Split
from actors.weights import Publisher
from engine.algorithms.advantages import whiten
from engine.algorithms.off_policy import importance_weights
from engine.checkpoint import Checkpoints
from engine.config import Config, DataConfig
from engine.data.batch import Batch
from engine.data.prompts import Prompt, build_prompts
from engine.data.sampler import RowSampler
from engine.data.sources import Rows
from engine.plan import Plan, prepare
from engine.rewards.composition import Component, Composition
from engine.rewards.contract import Row, Sample, Scores
from engine.roles import Generation, GenerationRequest, SamplingSettings, Workers
from engine.schedule.balancing import plan_microbatches
from engine.stages.experience import Experience, Group, RewardScheme, to_batch
from engine.stages.loop import Loop
from engine.stages.rl import RLStage
from engine.stages.sft import SFTStage
from engine.stop_signals import StopSignals
from engine.tracking.incidents import IncidentLog
from engine.tracking.tracker import Tracker
from tests.stages.doubles import Engines, Rewards, sampling

ELSEWHERE = re.findall(r"(\S+\.py)::(\w+)", __doc__)
END = 1
"""Id of the end-of-sequence token of the responses below."""


def configure(**changes: Any) -> Config:
    raw: dict[str, Any] = {"model": {"path": "m"}, "data": {"train": "t"}, "rewards": {"functions": ["a.py:f"]}}
    return Config.model_validate(raw | changes)


def batch_of(lens: list[int]) -> Batch:
    total = sum(lens)
    mask = np.ones(total, bool)
    mask[np.cumsum([0, *lens[:-1]])] = False
    return Batch.offline(np.arange(total, dtype=np.int32), np.array(lens, np.int32), mask, np.arange(len(lens)))


class Model:
    """A model in training, as a stage sees it: it keeps what it was given, and its values are 0."""

    changes = 0

    def __init__(self, name: str) -> None:
        self.name = name
        self.seen: list[Batch] = []
        self.saved: list[int] = []

    def update(self, minibatches: Any) -> dict[str, float]:
        self.seen += minibatches
        return {f"{self.name}/updates": float(len(minibatches)), f"{self.name}/skipped_updates": 0.0}

    def values(self, batch: Batch) -> np.ndarray:
        return np.zeros(len(batch.tokens), np.float32)

    def save(self, folder: Path, record: Any = None) -> None:
        self.saved.append(len(self.seen))


def two_tokens(request: GenerationRequest, version: int) -> list[Generation]:
    return [Generation((9, END), (-1.0, -1.0), (version, version), "x", "stop") for _ in request.seeds]


def by_place(samples: list[Sample], broken: float | None = None) -> Scores:
    """Rewards by the place in the group; that of every second response is `broken`, as a reward model would say it."""
    values_B = np.arange(len(samples), dtype=np.float32)
    if broken is not None:
        values_B[1::2] = broken
    ids = [sample.id for sample in samples]
    return Scores.without_opinion(len(samples)).plus("rm", values_B, [None] * len(ids), ids)


@contextmanager
def online(
    folder: Path,
    policy: Model,
    value_model: Model | None = None,
    *,
    engines: Engines | None = None,
    rewards: Rewards | None = None,
    **changes: Any,
) -> Any:
    """The stage of online training over these, with seven prompts."""
    sizes = {"steps": 3, "prompts_per_step": 3, "samples_per_prompt": 4}
    config = configure(rl=sizes, name=folder.name, output_dir=str(folder.parent), **changes)
    tracker = Tracker(config)
    doubles: dict[str, Any] = {"policy": policy, "critic": value_model}
    answers = sampling(engines or Engines(two_tokens), rewards or Rewards(by_place))
    workers = Workers(**doubles, sampling=answers)
    prompts = [Prompt((5, 6, i), f"prompt {i}", {}) for i in range(7)]
    stage = RLStage(config, workers, tracker, Plan(train_prompts=prompts, components=[Component("rm")]))
    stage.supply.begin(0)
    yield stage
    tracker.close("succeeded")


def test_the_tests_named_above_exist():
    assert len(ELSEWHERE) > 30
    texts = {file: (Path(__file__).parent / file).read_text() for file, _ in ELSEWHERE}
    assert [f"{file}::{test}" for file, test in ELSEWHERE if f"def {test}(" not in texts[file]] == []


# Maths


def test_one_reward_that_is_not_finite_does_not_reach_the_whitening():
    values = np.array([1, np.nan, 3, np.inf], np.float32)
    scores = Scores.without_opinion(4).plus("rm", values, [None] * 4, [10, 11, 12, 13])
    assert scores.dropped == {1: "reward_not_finite", 3: "reward_not_finite"}
    assert [incident["sample_id"] for incident in scores.incidents] == [11, 13]
    kept = [i for i in range(4) if i not in scores.dropped]
    both = scores.plus("other", np.ones(4, np.float32), [None] * 4, [10, 11, 12, 13])
    composition = Composition([Component("rm", 2.0, normalize="running"), Component("other")])
    [composed] = composition.compose([both], learn=True)
    assert np.isnan(composed.totals[[1, 3]]).all()
    assert set(composed.dropped) == {1, 3}
    assert whiten(torch.from_numpy(composed.totals[kept])).isfinite().all()
    assert composition.state_dict() == {"rm": [2.0, 2.0, 2.0]}


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["reinforce_pp", "grpo", "ppo"])
def test_a_step_with_rewards_that_are_not_finite_trains_the_others_on_finite_advantages(tmp_path, name, broken):
    policy, critic = Model("policy"), Model("critic") if name == "ppo" else None
    algorithm = {"name": name, "kl_coef": 0, "whiten_advantages": True, "whiten_rewards": True}
    rewards = Rewards(partial(by_place, broken=broken))
    with online(tmp_path / "run", policy, critic, rewards=rewards, algorithm=algorithm) as stage:
        stage.step(1)
    [batch] = policy.seen
    assert batch.sample_ids.tolist() == [0, 2, 4, 6, 8, 10]
    assert np.isfinite(batch.annotations["advantages"]).all()
    assert np.ptp(batch.annotations["advantages"]) > 0
    assert stage.ledger.dropped == {"reward_not_finite": 6}


def test_a_reward_model_does_not_bring_back_what_a_function_failed_on():
    failed = Scores({"f": np.array([np.nan, 1], np.float32)}, np.array([np.nan, 1], np.float32), {0: "reward_timeout"})
    both = failed.plus("rm", np.ones(2, np.float32), [None, None], [0, 1])
    [scores] = Composition([Component("f"), Component("rm")]).compose([both], learn=True)
    assert scores.dropped == {0: "reward_timeout"}
    assert math.isnan(scores.totals[0])
    assert scores.totals[1] == 2


def test_sequence_masked_weights_do_not_let_single_tokens_through_unbounded():
    """Tokens of ratio e^4 and e^-4: the sample's weight is 1, and so is each token's, not 55."""
    logp_T, rollout_T = torch.tensor([0.0, -4.0, -1.0]), torch.tensor([-4.0, 0.0, -1.0])
    for level in ("sequence", "geometric"):
        weights = importance_weights(logp_T, rollout_T, [3], level=level, mode="mask", cap=2.0)
        torch.testing.assert_close(weights, torch.ones(3))


@pytest.mark.parametrize(("stage", "temperature"), [("rl", 0.5), ("sft", 1.0)])
def test_a_bfloat16_policy_gives_float32_log_probs_and_entropies_at_the_sampling_temperature(
    tiny_model, stage, temperature
):
    """And at 1 where nothing was sampled, whatever the engines are set to."""
    changes: dict[str, Any] = {"stage": stage, "model": {"path": str(tiny_model), "dtype": "bfloat16"}}
    config = configure(rollout={"temperature": 0.5}, **changes)
    made = PolicyActor(config, RankInfo(0, 1, "", 0), updates=1).make()
    row = PackedRow.of(batch_of([7, 5]), torch.device("cpu"))
    with torch.no_grad():
        logp_R, entropy_R = made.module(row)
        hidden_R = made.module.packed(row)[row.predictors]
        logits_RV = hidden_R.float() @ made.model.get_output_embeddings().weight.float().T / temperature
    assert hidden_R.dtype == torch.bfloat16
    assert (logp_R.dtype, entropy_R.dtype) == (torch.float32, torch.float32)
    expected = torch.distributions.Categorical(logits=logits_RV)
    torch.testing.assert_close(logp_R, expected.log_prob(row.targets), atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy_R, expected.entropy(), atol=1e-5, rtol=0)


def test_temperature_0_is_refused_for_training():
    with pytest.raises(ValueError, match=r"rollout\.temperature: 0 is greedy"):
        configure(rollout={"temperature": 0})


@pytest.mark.parametrize("setting", ["top_p", "top_k", "min_p"])
def test_there_is_no_nucleus_over_which_log_probs_would_be_renormalised(setting):
    with pytest.raises(ValueError, match=rf"rollout\.{setting}"):
        configure(rollout={setting: 0.9})


# Tokens


def test_a_response_as_long_as_the_model_leaves_no_prompt_and_is_refused():
    with pytest.raises(ValueError, match="leaves no room for a prompt"):
        configure(rollout={"max_new_tokens": 2048, "max_model_len": 2048})


def test_the_end_is_trained_where_it_was_sampled_and_not_forced_onto_truncated_responses():
    whole = Generation((9, 8, END), (-1.0, -2.0, -3.0), (4, 4, 4), "a b", "stop")
    cut = Generation((9, 8, 7), (-1.0, -2.0, -3.0), (4, 4, 4), "a b c", "length")
    scores = Scores({}, np.array([1, 0], np.float32))
    batch = to_batch([Group(Prompt((5, 6), "p", {}), [0, 1], [whole, cut], scores, [[], []])])
    assert batch.tokens.tolist() == [5, 6, 9, 8, END, 5, 6, 9, 8, 7]
    assert batch.loss_mask.tolist() == [False, False, True, True, True] * 2
    assert batch.rollout_logp.tolist() == [0, 0, -1, -2, -3] * 2


def test_the_reward_sees_the_prompt_and_the_tokens_that_the_model_saw(tiny_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    data = DataConfig(train="t", on_long_row="truncate", chat_template="never")
    text = "the quick brown fox jumps over the lazy dog"
    rows = Rows([{"prompt": text}], ["t:1"], [])
    [prompt] = build_prompts(rows, tokenizer, data=data, max_prompt_tokens=4).prompts
    engines, rewards = Engines(two_tokens), Rewards(by_place)
    tracker = Tracker(configure(name="run", output_dir=str(tmp_path)))
    experience = Experience(sampling(engines, rewards), tracker, RewardScheme(Composition([]), None))
    experience.collect([prompt], [[0]], [(1,)], SamplingSettings(1.0, 8))
    tracker.close("succeeded")
    [request], [sample] = engines.requests, rewards.samples
    assert request.prompt == sample.prompt_ids == tuple(tokenizer(text)["input_ids"][-4:])
    assert sample.prompt == tokenizer.decode(request.prompt)
    assert sample.completion_ids == (9, END)
    assert sample.row.prompt == text


# Loop


@pytest.mark.parametrize(("epochs", "sizes"), [(1.0, [4, 4, 2]), (1.5, [4, 4, 4, 3])])
def test_the_last_small_batch_trains_and_the_model_is_saved_after_it(tiny_model, tmp_path, epochs, sizes):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"number {i}", "completion": f"{i}"}) + "\n" for i in range(10)))
    training = {"epochs": epochs, "rows_per_update": 4, "max_length": 64}
    changes: dict[str, Any] = {"model": {"path": str(tiny_model)}, "data": {"train": str(rows)}, "rewards": {}}
    config = configure(stage="sft", training=training, name="run", output_dir=str(tmp_path), **changes)
    plan = prepare(config)
    model: Any = Model("train")
    tracker = Tracker(config)
    workers = Workers(policy=model)
    stage = partial(SFTStage, config, workers, tracker, plan)
    incidents, signals = IncidentLog(tracker, stop_after=0), StopSignals()
    Loop(config, workers, stage, tracker, Checkpoints(tmp_path, keep=1), incidents, signals).run()
    tracker.close("succeeded")
    assert [len(batch) for batch in model.seen] == sizes
    assert model.saved == [len(sizes)]
    ends = [np.cumsum(batch.seq_lens)[:-1] for batch in model.seen]
    trained = [ids.tobytes() for batch, at in zip(model.seen, ends, strict=True) for ids in np.split(batch.tokens, at)]
    assert len(set(trained[:10])) == 10, "each row once in the first epoch"


@given(lens=st.lists(st.integers(2, 60), min_size=1, max_size=30), ranks=st.integers(1, 4))
@settings(max_examples=300, deadline=None)
def test_every_rank_runs_equally_many_passes_none_over_the_budget_and_no_sample_is_lost(lens, ranks):
    batch = batch_of(lens)
    shares = Split.of(batch, ranks=ranks, token_budget=64, hidden_size=8).shares()
    assert len({len(share) for share in shares}) == 1
    assert max(len(micro.tokens) for share in shares for micro in share) <= 64
    ids = sorted(int(i) for share in shares for micro in share for i in micro.sample_ids)
    assert ids == list(range(len(lens)))


def test_of_3000_random_batches_none_is_packed_over_the_budget():
    random = np.random.default_rng(0)
    for _ in range(3000):
        lens = np.minimum(random.lognormal(4, 1, random.integers(1, 64)).astype(int) + 1, 512).tolist()
        budget, ranks = int(random.integers(max(lens), 1024)), int(random.integers(1, 9))
        plan = plan_microbatches(lens, ranks=ranks, token_budget=budget)
        assert max(sum(lens[i] for i in micro) for share in plan for micro in share) <= budget
        assert len({len(share) for share in plan}) == 1


def test_after_the_critics_warm_up_the_policy_is_not_given_the_samples_of_the_warm_up(tmp_path):
    engines, policy, critic = Engines(two_tokens), Model("policy"), Model("critic")
    algorithm, warm_up = {"name": "ppo", "kl_coef": 0}, {"warmup_steps": 2}
    with online(tmp_path / "run", policy, critic, engines=engines, algorithm=algorithm, critic=warm_up) as stage:
        for step in (1, 2, 3):
            stage.step(step)
    assert [batch.sample_ids.tolist() for batch in critic.seen] == [[*range(n, n + 12)] for n in (0, 12, 24)]
    assert [batch.sample_ids.tolist() for batch in policy.seen] == [[*range(24, 36)]]
    assert engines.versions == [3], "the engines need no weights that they have"


def test_a_resumed_run_goes_on_with_the_prompts_ids_seeds_and_counts_that_it_would_have_had(tmp_path):
    whole, rest = ((Engines(two_tokens), Rewards(by_place)) for _ in range(2))
    with online(tmp_path / "whole", Model("policy"), engines=whole[0], rewards=whole[1]) as stage:
        for step in (1, 2):
            stage.step(step)
        stage.kl.value = 0.3
        state = json.loads(json.dumps(stage.state()))
        before = len(whole[0].requests), len(whole[1].samples)
        stage.step(3)
        expected = stage.ledger.state_dict()
    with online(tmp_path / "rest", Model("policy"), engines=rest[0], rewards=rest[1]) as stage:
        stage.load_state(state)
        stage.begin(2)
        stage.step(3)
    sent = [(request.prompt, request.seeds, request.sample_ids) for request in rest[0].requests]
    assert sent == [(r.prompt, r.seeds, r.sample_ids) for r in whole[0].requests[before[0] :]]
    assert [sample.id for sample in rest[1].samples] == [sample.id for sample in whole[1].samples[before[1] :]]
    assert stage.ledger.state_dict() == expected
    assert stage.kl.value == 0.3


def test_what_is_sent_for_a_call_is_token_ids_and_text_and_no_tokenizer():
    request = GenerationRequest(0, tuple(range(100)), (1, 2, 3))
    sample = Sample(0, "p" * 100, "c" * 100, Row({}), completion_ids=tuple(range(100)), prompt_ids=tuple(range(100)))
    for sent in (request, SamplingSettings(1.0, 8), sample):
        assert len(pickle.dumps(sent)) < 1500


def test_weights_travel_in_buckets_and_not_one_by_one():
    weights = [(f"layer.{i}", torch.ones(16, 16)) for i in range(300)]
    assert [len(bucket.entries) for bucket in Publisher().pack(weights)] == [300]
    assert len(list(Publisher(100 * 1024).pack(weights))) == 3


def test_the_seed_drives_the_order_of_the_prompts():
    orders = [RowSampler(64, seed=seed).next(64) for seed in (0, 0, 1)]
    assert list(orders[0]) == list(orders[1])
    assert list(orders[0]) != list(orders[2])
