"""What a step of online training makes of its samples: shaped rewards, advantages, selections; numbers not finite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import AlgorithmConfig, Config, UserError
from engine.data.batch import Batch
from engine.data.prompts import Prompt
from engine.plan import Plan
from engine.presets import PRESETS
from engine.rewards.composition import Component, Composition
from engine.rewards.contract import Sample, Scores
from engine.roles import Generation, GenerationRequest, Workers
from engine.stages.advantage import shaped_scores, with_advantages
from engine.stages.guard import NumericsError, NumericsGuard
from engine.stages.rl import RLStage, kl_controller
from engine.tracking.report import over_optimised, reward_parts
from engine.tracking.tracker import Tracker
from tests.stages.doubles import Engines, Rewards, sampling


def batch_of(totals: list[float], groups: list[int], masks: list[list[bool]] | None = None, **tokens: Any) -> Batch:
    """Samples with the given trained tokens (default: three behind a prompt of two)."""
    masks = masks or [[False, False, True, True, True]] * len(totals)
    mask = np.concatenate([np.array(m) for m in masks])
    batch = Batch.offline(
        tokens=np.arange(len(mask), dtype=np.int32),
        seq_lens=np.array([len(m) for m in masks], np.int32),
        loss_mask=mask,
        group_ids=np.array(groups, np.int64),
    )
    batch = Batch(**{**vars(batch), "totals": np.array(totals, np.float32)})
    return batch.annotate(**{k: np.where(mask, v, 0).astype(np.float32) for k, v in tokens.items()})


def preset(name: str, **more: Any) -> AlgorithmConfig:
    return AlgorithmConfig(**{**PRESETS[name], "name": name, **more})


def advantages(batch: Batch, algorithm: AlgorithmConfig, kl_coef: float = 0.0) -> Batch:
    return with_advantages(batch, algorithm, kl_coef=kl_coef, max_new_tokens=8)


def per_sample(batch: Batch) -> list[float]:
    """Each sample's advantage, which is the same on all its trained tokens and 0 elsewhere."""
    values_T = batch.annotations["advantages"]
    assert (values_T[~batch.loss_mask] == 0).all()
    ends = np.cumsum(batch.seq_lens)
    return [float(values_T[end - 1]) for end in ends]


def test_rewards_are_clipped_before_the_baseline_and_the_overlong_penalty_comes_after():
    batch = batch_of([100.0, 1.0, 0.0], [0, 0, 0], [[False] + [True] * n for n in (3, 8, 7)])
    algorithm = preset("dr_grpo", reward_clip=2.0, overlong_penalty=0.5, overlong_fraction=0.25)
    assert shaped_scores(batch, algorithm, max_new_tokens=8).tolist() == [2.0, 0.5, -0.25]
    assert per_sample(advantages(batch, algorithm)) == pytest.approx([1.25, -0.25, -1.0])


def test_rewards_are_whitened_on_the_global_batch():
    batch = batch_of([1.0, 2.0, 3.0, 10.0], [0, 0, 1, 1])
    scores = shaped_scores(batch, preset("ppo", whiten_rewards=True), max_new_tokens=8)
    assert (float(scores.mean()), float(scores.std())) == (pytest.approx(0), pytest.approx(1))


@pytest.mark.parametrize("name", [n for n in PRESETS if preset(n).compares_samples and not preset(n).trains_pairs])
def test_a_group_without_differences_gets_exactly_nothing(name):
    """Also where the others' advantages are scaled, and where responses have different lengths."""
    masks = [[False] + [True] * n for n in (2, 7, 3, 5)]
    batch = batch_of([0.1, 0.1, 1.0, 0.0], [5, 5, 3, 3], masks, old_logp=-1, ref_logp=-1)
    trained = advantages(batch, preset(name, overlong_penalty=0.0), kl_coef=0.0)
    shares = dict(zip(trained.sample_ids.tolist(), per_sample(trained), strict=True))
    assert (shares.get(0, 0.0), shares.get(1, 0.0)) == (0.0, 0.0)
    assert shares[2] > 0


def test_gae_does_not_decay_across_observation_tokens():
    values = [0.3, -0.2, 0.5]
    plain = batch_of([1.0], [0], [[False, True, True, True]], values=np.array([0, *values]))
    split = batch_of([1.0], [0], [[False, True, False, False, True, True]], values=np.array([0, 0.3, 9, 9, -0.2, 0.5]))
    algorithm = preset("ppo", gamma=0.9, lam=0.8, whiten_advantages=False)
    for name in ("advantages", "returns"):
        one, other = (advantages(b, algorithm) for b in (plain, split))
        np.testing.assert_array_equal(one.annotations[name][one.loss_mask], other.annotations[name][other.loss_mask])


def test_the_kl_in_the_reward_is_taken_off_each_token():
    batch = batch_of([1.0], [0], old_logp=-1.0, ref_logp=-3.0)
    algorithm = preset("reinforce_pp", whiten_advantages=False)
    trained = advantages(batch, algorithm, kl_coef=0.1)
    assert trained.annotations["advantages"].tolist() == pytest.approx([0, 0, 0.4, 0.6, 0.8])
    in_loss = preset("reinforce_pp", whiten_advantages=False, kl_in="loss", kl_estimator="k3")
    assert advantages(batch, in_loss, kl_coef=0.1).annotations["advantages"].tolist() == pytest.approx([0, 0, 1, 1, 1])


def test_best_of_n_trains_the_best_alone_and_pairs_put_the_better_first():
    batch = batch_of([0.0, 2.0, 1.0, 5.0, 5.0, 3.0, 3.0], [0, 0, 0, 1, 1, 2, 1])
    best = advantages(batch, preset("rejection_sampling"))
    assert best.sample_ids.tolist() == [1, 3, 4]
    assert per_sample(best) == [1.0, 0.5, 0.5]
    pairs = advantages(batch, preset("online_dpo"))
    assert pairs.sample_ids.tolist() == [1, 0, 3, 6]
    assert len(advantages(batch_of([1.0, 1.0], [0, 0]), preset("online_dpo"))) == 0


@given(totals=st.lists(st.floats(-5, 5, width=32), min_size=4, max_size=4), name=st.sampled_from(list(PRESETS)))
@settings(max_examples=60, deadline=None)
def test_advantages_do_not_depend_on_the_order_of_groups(totals, name):
    batch = batch_of(totals, [7, 7, 2, 2], old_logp=-1.0, ref_logp=-1.5, values=0.1)
    orders = ([0, 1, 2, 3], [2, 3, 0, 1])
    results = [advantages(batch.select(order), preset(name), kl_coef=0.1) for order in orders]
    one, other = ({int(i): part.tolist() for i, part in zip(r.sample_ids, parts_of(r), strict=True)} for r in results)
    assert one.keys() == other.keys()
    for sample in one:
        np.testing.assert_allclose(one[sample], other[sample], atol=1e-5)


def parts_of(batch: Batch) -> list[np.ndarray]:
    values_T = batch.annotations.get("advantages", np.zeros(len(batch.tokens)))
    return np.split(values_T, np.cumsum(batch.seq_lens)[:-1]) if len(batch) else []


OWN = """
import torch
def centred(scores_B): return scores_B - scores_B.mean()
def per_token(rewards_T, seq_lens): return rewards_T * 2
def wrong_size(scores_B): return torch.zeros(1)
def not_finite(scores_B): return scores_B * float("nan")
def unknown(scores_B, weather): return scores_B
"""


def test_an_estimator_of_ones_own_gets_what_it_names(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    batch = batch_of([1.0, 3.0], [0, 0])
    centred = advantages(batch, preset("grpo", advantage=f"{tmp_path}/own.py:centred"))
    assert per_sample(centred) == [-1.0, 1.0]
    tokens = advantages(batch, preset("grpo", advantage=f"{tmp_path}/own.py:per_token"))
    assert tokens.annotations["advantages"].tolist() == [0, 0, 0, 0, 2, 0, 0, 0, 0, 6]
    for name, says in (
        ("wrong_size", r"returned a tensor \[1\]"),
        ("not_finite", "not finite"),
        ("unknown", "weather"),
    ):
        with pytest.raises(UserError, match=says):
            advantages(batch, preset("grpo", advantage=f"{tmp_path}/own.py:{name}"))


class Recorder:
    """What the guard needs of a tracker and of a model: a folder, events, and updates that are skipped on demand."""

    def __init__(self, run_dir: Path, skipped: list[int]) -> None:
        self.run_dir = run_dir
        self.skipped = skipped
        self.events: list[dict[str, Any]] = []

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append({"kind": kind, **fields})

    def note(self, text: str) -> None:
        self.events.append({"kind": "note", "text": text})

    def update(self, minibatches: Any) -> dict[str, float]:
        return {"policy/skipped_updates": float(self.skipped.pop(0))}


def test_updates_that_are_not_finite_leave_evidence_and_stop_the_run_when_they_do_not_cease(tmp_path):
    recorder = Recorder(tmp_path, [1, 1, 0, 1, 1, 1])
    guard: Any = NumericsGuard(recorder, stop_after=3)
    batch = batch_of([1.0, 3.0], [0, 0], old_logp=-1.0)
    for step in range(1, 6):
        guard.update(recorder, [batch], step)
    with pytest.raises(NumericsError, match="3 updates in a row"):
        guard.update(recorder, [batch], 6)
    assert [e["in_a_row"] for e in recorder.events if e["kind"] == "update_skipped"] == [1, 2, 1, 2, 3]
    files = sorted(path.name for path in (tmp_path / "incidents").iterdir())
    assert files == [f"step_{step:06d}.npz" for step in (1, 2, 4, 5, 6)]
    with np.load(tmp_path / "incidents" / files[0]) as kept:
        assert kept["totals"].tolist() == [1.0, 3.0]
        assert (kept["tokens"] == batch.tokens).all()
        assert "old_logp" in kept


def test_log_probs_that_are_not_finite_are_never_trained_on(tmp_path):
    recorder = Recorder(tmp_path, [])
    guard: Any = NumericsGuard(recorder, stop_after=2)
    assert guard.check(batch_of([1.0], [0], old_logp=-1.0), 1)
    broken = batch_of([1.0], [0], old_logp=np.nan)
    assert not guard.check(broken, 2)
    assert recorder.events[0]["not_finite"] == "old_logp"
    with pytest.raises(NumericsError, match="old_logp is not finite"):
        guard.check(broken, 3)


def test_a_step_of_one_token_and_a_reward_too_large_for_a_float_stay_out_of_the_maths():
    one_token = batch_of([1.0], [0], [[False, True]])
    assert per_sample(advantages(one_token, preset("reinforce_pp_baseline"))) == [0.0]
    values = Scores.without_opinion(2).plus("rm", np.array([3e38, 1.0], np.float32), [None, None], [0, 1])
    [scores] = Composition([Component("rm", 2.0)]).compose([values], learn=True)
    assert scores.dropped == {0: "reward_overflow"}
    assert scores.totals[1] == 2.0


def test_a_steered_kl_coefficient_follows_the_measured_kl():
    controller = kl_controller(preset("ppo", kl_coef=0.1, kl_target=2.0, kl_horizon=100.0))
    controller.update(4.0, 50)
    assert controller.value == pytest.approx(0.1 * 1.1)
    fixed = kl_controller(preset("ppo", kl_coef=0.1))
    fixed.update(4.0, 50)
    assert fixed.value == 0.1


@pytest.mark.parametrize("name", PRESETS)
def test_what_the_yaml_gives_wins_over_the_preset_and_the_preset_over_the_defaults(name):
    raw = {"model": {"path": "m"}, "data": {"train": "t"}, "rewards": {"functions": ["a.py:f"]}}
    config = Config.model_validate(raw | {"algorithm": name}).algorithm
    assert config == AlgorithmConfig(**{**PRESETS[name], "name": name})
    changed = Config.model_validate(raw | {"algorithm": {"name": name, "clip_low": 0.125}}).algorithm
    assert (changed.clip_low, changed.clip_high) == (0.125, config.clip_high)


@pytest.mark.parametrize("pushed", [True, False])
def test_the_report_tells_over_optimisation_from_learning(tmp_path, pushed):
    rows = [
        {
            "step": i,
            "reward/mean": i / 10 + i % 2 / 100,
            "reward/gold/mean": (i if i < 20 or not pushed else 40 - i) / 40,
        }
        | {"policy/kl_per_sample": i / 5}
        for i in range(1, 41)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts = reward_parts(tmp_path)
    assert [(part.first, part.last) for part in parts][::9] == [(1, 4), (37, 40)]
    assert set(parts[0].means) == {"total", "gold"}
    assert list(over_optimised(parts)) == (["gold"] if pushed else [])
    with pytest.raises(UserError, match="holds no steps"):
        reward_parts(tmp_path / "elsewhere")


class Learner:
    """A policy as the stage sees it."""

    def __init__(self) -> None:
        self.seen: list[Batch] = []

    def update(self, minibatches: Any) -> dict[str, float]:
        self.seen += minibatches
        return {"policy/updates": 1.0, "policy/skipped_updates": 0.0}


def one_token(request: GenerationRequest, version: int) -> list[Generation]:
    return [Generation((9,), (-1.0,), (version,), "x", "stop") for _ in request.seeds]


def by_row(samples: list[Sample]) -> Scores:
    totals = np.array([i if samples[0].row.differs else 1 for i in range(len(samples))], np.float32)
    return Scores({"r": totals}, totals)


@pytest.mark.parametrize(("good", "accepted", "drawn"), [(4, 4, 4), (1, 1, 16)])
def test_dynamic_sampling_keeps_the_accepted_groups_when_rounds_run_out(tmp_path, good, accepted, drawn):
    raw = {"model": {"path": "m"}, "data": {"train": "t"}, "rewards": {"functions": ["a.py:f"]}, "name": "run"}
    raw |= {"rl": {"steps": 1, "prompts_per_step": 4, "samples_per_prompt": 2}, "output_dir": str(tmp_path)}
    config = Config.model_validate(raw | {"algorithm": {"name": "dapo", "dynamic_sampling_rounds": 3}})
    policy: Any = Learner()
    prompts = [Prompt((1, 2), "p", {"differs": i < good}) for i in range(good if good == 4 else 1000)]
    workers = Workers(policy=policy, sampling=sampling(Engines(one_token), Rewards(by_row)))
    tracker = Tracker(config)
    stage = RLStage(config, workers, tracker, Plan(train_prompts=prompts, components=[Component("r")]))
    if good == 1:
        in_order = iter(range(1000))
        stage.supply.sampler.next = lambda count: [next(in_order) for _ in range(count)]
    stage.begin(0)
    metrics = stage.step(1)
    tracker.close("succeeded")
    assert metrics["rollout/prompts"] == drawn
    [batch] = policy.seen
    assert len(batch) == 2 * accepted
    assert stage.ledger.trained == 2 * accepted
    assert stage.ledger.dropped == ({} if good == 4 else {"group_without_signal": 2 * (drawn - accepted)})
