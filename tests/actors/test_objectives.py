"""Which objective a stage has, and what the policy-gradient objective measures; its loss is in test_policy_gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from actors.objectives import (
    Distillation,
    NextToken,
    Objective,
    Outputs,
    PolicyGradient,
    Preference,
    objective_of,
    own_result,
)
from actors.packed_row import PackedRow
from actors.trained import Minibatch, Stats
from engine.config import AlgorithmConfig, Config, UserError
from engine.data.batch import Batch

OLD = [-1.0, -1.0, -1.0, -1.0]
LENS = [1, 3]


def outputs(logp: list[float], *, old: list[float] | None = None, advantages: tuple[float, ...] = (1, 1, 1, 1)) -> Any:
    """Samples of one and three trained tokens behind a prompt of one, which the rollout gave a log-prob of -1 each."""
    mask = np.array([False, True, False, True, True, True])

    def spread(values: Any) -> np.ndarray:
        values_T = np.full(6, 9.0, np.float32)  # what is not trained must not be read
        values_T[mask] = values
        return values_T

    batch = Batch.offline(np.arange(6, dtype=np.int32), np.array([2, 4], np.int32), mask, np.array([0, 0], np.int64))
    batch = Batch(**{**vars(batch), "rollout_logp": spread(OLD)}).annotate(advantages=spread(advantages))
    batch = batch if old is None else batch.annotate(old_logp=spread(old))
    row = PackedRow.of(batch, torch.device("cpu"))
    logp_R = torch.tensor(logp, requires_grad=True)
    return Outputs(batch, row, logp_R, torch.tensor([0.5, 1.0, 1.5, 2.0]), Minibatch([batch], 8, 4, 2, 0))


def run(out: Outputs, **algorithm: Any) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss and the metrics."""
    objective = PolicyGradient(AlgorithmConfig(**{"loss_aggregation": "token-mean"} | algorithm), max_new_tokens=8)
    stats = Stats(objective.means, objective.maxima)
    loss = objective.loss(out, stats)
    assert set(stats.sums) <= set(objective.means)
    assert set(stats.tops) <= set(objective.maxima)
    return loss, {name: total / count for name, (total, count) in stats.sums.items()} | stats.tops


@pytest.mark.parametrize(
    ("sections", "kind"),
    [
        ({}, PolicyGradient),
        ({"algorithm": "ppo"}, PolicyGradient),
        ({"algorithm": "online_dpo"}, Preference),
        ({"stage": "preference"}, Preference),
        ({"stage": "distill", "distill": {"teacher": "t"}}, Distillation),
        ({"stage": "distill", "distill": {"teacher": "t", "mode": "sequence"}}, NextToken),
        ({"stage": "sft"}, NextToken),
    ],
)
def test_each_stage_has_its_objective(sections, kind):
    raw: dict[str, Any] = {"model": {"path": "m"}, "data": {"train": "t"}, "rewards": {"functions": ["a.py:f"]}}
    objective: Objective = objective_of(Config.model_validate(raw | sections))
    assert type(objective) is kind


def test_on_policy_the_old_log_probs_are_the_new_ones_and_the_gradient_is_that_of_reinforce():
    out = outputs([-0.5, -0.1, -2.0, -1.0], advantages=(2, -1, 0.5, 3))
    loss, metrics = run(out, correction={"mode": "none"})
    loss.backward()
    torch.testing.assert_close(out.values.grad, -torch.tensor([2, -1, 0.5, 3]) / 8)
    assert loss.item() == pytest.approx(-4.5 / 8)
    assert (metrics["policy/ratio"], metrics["policy/kl_step"], metrics["policy/clip_fraction"]) == (1, 0, 0)
    assert metrics["policy/ratio_deviation_max"] == 0


def test_a_token_counts_as_clipped_only_where_its_advantage_would_push_it_further():
    """Ratios e^0.3 and e^-0.3 lie outside of [0.8, 1.2]: two of the four advantages point back."""
    out = outputs([-0.7, -0.7, -1.3, -1.3], old=OLD, advantages=(1, -1, 1, -1))
    assert run(out)[1]["policy/clip_fraction"] == 0.5
    assert run(out, loss="cispo")[1]["policy/clip_fraction"] == 1.0
    assert run(out, clip_high=0.4)[1]["policy/clip_fraction"] == 0.25
    assert run(out, clip_low=0.3)[1]["policy/clip_fraction"] == 0.25
    assert "policy/clip_fraction" not in run(out, loss="reinforce")[1]


def test_gspo_measures_the_ratio_of_whole_samples():
    """The second sample's log-ratios 0.6, -0.3, -0.3 have the mean 0: its tokens are not clipped."""
    out = outputs([-0.7, -0.4, -1.3, -1.3], old=OLD)
    _, metrics = run(out, loss="gspo")
    assert metrics["policy/clip_fraction"] == 0.25
    assert metrics["policy/ratio"] == pytest.approx((np.exp(0.3) + 3) / 4)
    assert metrics["policy/ratio_deviation_max"] == pytest.approx(np.exp(0.3) - 1)
    assert run(out)[1]["policy/ratio_deviation_max"] == pytest.approx(np.exp(0.6) - 1)


def test_the_kl_of_a_step_is_that_of_the_policy_that_sampled_to_the_one_now():
    out = outputs([-0.5, -1.0, -1.0, -1.0], old=OLD)
    assert run(out)[1]["policy/kl_step"] == pytest.approx((np.exp(0.5) - 1 - 0.5) / 4)


def test_the_mismatch_is_between_the_rollout_and_the_trainers_old_log_probs():
    """Not those of now, which differ because they were trained."""
    out = outputs([-9.0, -9.0, -9.0, -9.0], old=[-1.0, -0.5, -1.0, -3.0])
    _, metrics = run(out)
    assert metrics["mismatch/logp_abs_mean"] == pytest.approx(2.5 / 4)
    assert metrics["mismatch/logp_abs_max"] == 2
    assert metrics["mismatch/correction_mean"] == pytest.approx((1 + np.exp(0.5) + 1 + np.exp(-2)) / 4)
    assert metrics["policy/entropy"] == 1.25


@pytest.mark.parametrize(
    ("correction", "weights"),
    [
        ({"mode": "none"}, [1, 1, 1, 1]),
        ({"mode": "truncate", "cap": 1.5, "floor": 0.5}, [1, 1.5, 1, 0.5]),
        ({"mode": "mask", "cap": 1.5, "floor": 0.5}, [1, 0, 1, 0]),
        ({"mode": "truncate", "level": "sequence", "cap": 1.5, "floor": 0.25}, [1, 0.5, 0.5, 0.5]),
        ({"mode": "truncate", "level": "geometric"}, [1, 0.5 ** (1 / 3), 0.5 ** (1 / 3), 0.5 ** (1 / 3)]),
    ],
)
def test_every_setting_of_the_correction_reaches_the_weights(correction, weights):
    """Ratios of the trainer to the rollout: 1 in the first sample; 2, 1 and 1/4 in the second."""
    old = [-1.0, -1.0 + np.log(2), -1.0, -1.0 - np.log(4)]
    out = outputs(old, old=old, advantages=(1, 2, 3, 4))
    loss, metrics = run(out, correction=correction)
    assert metrics["mismatch/correction_mean"] == pytest.approx(np.mean(weights))
    assert loss.item() == pytest.approx(-np.dot(weights, [1, 2, 3, 4]) / 8)


def test_the_correction_weighs_neither_the_kl_nor_the_entropy():
    old = [-1.0, -1.0 + np.log(2), -1.0, -1.0]
    out = outputs(old, old=old, advantages=(0, 0, 0, 0))
    batch = out.batch.annotate(ref_logp=np.full(6, -2, np.float32)).label(kl_coef=np.full(2, 0.5, np.float32))
    out = Outputs(batch, out.row, out.values, out.entropies, out.minibatch)
    kl = ((out.values - -2) ** 2 / 2).sum().item()
    loss, _ = run(out, kl_coef=0.1, kl_estimator="k2", entropy_coef=0.25)
    assert loss.item() == pytest.approx((0.5 * kl - 0.25 * 5) / 8)


def test_more_entropy_is_a_smaller_loss():
    out = outputs(OLD, old=OLD)
    more = Outputs(out.batch, out.row, out.values, out.entropies + 1, out.minibatch)
    assert run(more, entropy_coef=0.1)[0].item() < run(out, entropy_coef=0.1)[0].item()
    assert run(more)[0].item() == run(out)[0].item()


def test_the_dual_clip_bounds_the_loss_of_negative_advantages():
    out = outputs([3.0, -1, -1, -1], old=OLD, advantages=(-1, 0, 0, 0))
    none = {"mode": "none"}
    assert run(out, correction=none)[0].item() == pytest.approx(np.exp(4) / 8, rel=1e-5)
    assert run(out, correction=none, dual_clip=3.0)[0].item() == pytest.approx(3 / 8)


@pytest.mark.parametrize(
    ("returned", "shown"),
    [
        (torch.zeros(4, 1), r"a tensor [4, 1]"),
        (torch.zeros(3), "a tensor [3]"),
        ([0.0] * 4, "list"),
        (None, "NoneType"),
    ],
)
def test_a_loss_of_ones_own_that_is_not_per_token_is_told(returned, shown):
    with pytest.raises(UserError) as caught:
        own_result(returned, "own.py:loss", torch.zeros(4))
    assert str(caught.value) == (
        f"algorithm.loss: own.py:loss returned {shown}; it must return a tensor [4], per token"
    )
