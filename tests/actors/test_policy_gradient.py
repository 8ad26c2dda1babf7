"""The policy-gradient objective: each name is its formula, and every term has its weight and its denominator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from actors.objectives import Outputs, PolicyGradient
from actors.packed_row import PackedRow
from actors.trained import Minibatch, Stats
from engine.algorithms import policy_losses
from engine.algorithms.aggregate import aggregate
from engine.algorithms.kl import kl_estimate
from engine.config import AlgorithmConfig, UserError
from engine.data.batch import Batch
from engine.presets import PRESETS

LENS = [3, 5, 2]


def outputs(seed: int = 0) -> Outputs:
    """Three samples with log-probs, advantages and annotations of their own."""
    random = np.random.default_rng(seed)
    mask = np.concatenate([np.repeat([False, True], [2, n]) for n in LENS])
    total = len(mask)

    def annotation(scale: float) -> np.ndarray:
        return np.where(mask, random.normal(size=total) * scale - 2, 0).astype(np.float32)

    batch = Batch.offline(
        random.integers(0, 9, total).astype(np.int32), np.array(LENS, np.int32) + 2, mask, np.arange(3)
    )
    batch = Batch(**{**vars(batch), "rollout_logp": annotation(0.3)}).label(kl_coef=np.full(3, 0.7, np.float32))
    batch = batch.annotate(advantages=annotation(1), old_logp=annotation(0.3), ref_logp=annotation(0.3))
    logp_R = torch.tensor(annotation(0.3)[mask], requires_grad=True)
    entropy_R = torch.rand(sum(LENS), generator=torch.Generator().manual_seed(seed)).requires_grad_()
    row = PackedRow.of(batch, torch.device("cpu"))
    return Outputs(batch, row, logp_R, entropy_R, Minibatch([batch], 20, 6, 6, 0))


def loss_of(out: Outputs, **algorithm: Any) -> torch.Tensor:
    config = AlgorithmConfig(**{"correction": {"mode": "none"}, "loss_aggregation": "token-mean"} | algorithm)
    objective = PolicyGradient(config, max_new_tokens=8)
    stats = Stats(objective.means, objective.maxima)
    loss = objective.loss(out, stats)
    assert set(stats.sums) <= set(objective.means)
    return loss


def inputs(out: Outputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return out.values, out.trained(out.batch.annotations["old_logp"]), out.trained(out.batch.annotations["advantages"])


FORMULAS = {
    "ppo_clip": lambda p, o, a: policy_losses.ppo_clip(p, o, a, clip_low=0.1, clip_high=0.3, dual_clip=3.0),
    "gspo": lambda p, o, a: policy_losses.gspo(p, o, a, LENS, clip_low=0.1, clip_high=0.3),
    "cispo": lambda p, o, a: policy_losses.cispo(p, o, a, clip_low=0.1, clip_high=0.3),
    "reinforce": lambda p, o, a: policy_losses.reinforce(p, a),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_loss_is_its_formula_over_the_tokens_of_the_whole_update(name):
    out = outputs()
    loss = loss_of(out, loss=name, clip_low=0.1, clip_high=0.3, dual_clip=3.0)
    torch.testing.assert_close(loss, FORMULAS[name](*inputs(out)).sum() / 20)


def test_every_preset_of_a_policy_gradient_gives_a_gradient():
    for name, preset in PRESETS.items():
        if preset.get("loss") != "preference":
            out = outputs()
            loss_of(out, **{**preset, "name": name}).backward()
            assert out.values.grad is not None
            assert float(out.values.grad.abs().sum()) > 0, name


def test_the_kl_in_the_loss_has_the_weight_that_came_with_the_batch():
    out = outputs()
    plain, with_kl = loss_of(out), loss_of(out, kl_coef=0.1, kl_estimator="k2")
    kl_R = kl_estimate(out.values, out.trained(out.batch.annotations["ref_logp"]), "k2")
    torch.testing.assert_close(with_kl - plain, 0.7 * kl_R.sum() / 20)
    torch.testing.assert_close(loss_of(out, kl_coef=0.1, kl_in="reward"), plain)


def test_the_entropy_bonus_rewards_entropy_per_token():
    out = outputs()
    loss_of(out, entropy_coef=0.5).backward()
    torch.testing.assert_close(out.entropies.grad, torch.full((sum(LENS),), -0.5 / 20))


def test_the_correction_weighs_tokens_by_what_the_trainer_says_of_the_rollouts():
    out = outputs()
    old_R, rollout_R = inputs(out)[1], out.trained(out.batch.rollout_logp)
    weights_R = (old_R - rollout_R).exp().clamp(0, 1.5)
    got = loss_of(out, correction={"mode": "truncate", "cap": 1.5})
    torch.testing.assert_close(got, (policy_losses.ppo_clip(*inputs(out)) * weights_R).sum() / 20)


def test_dr_grpo_divides_by_the_longest_response_and_the_samples_of_the_whole_update():
    out = outputs()
    got = loss_of(out, loss_aggregation="seq-mean-token-sum-norm")
    expected = aggregate(
        policy_losses.ppo_clip(*inputs(out)), LENS, "seq-mean-token-sum-norm", max_len=8, total_sequences=6
    )
    torch.testing.assert_close(got, expected)


def test_a_loss_of_ones_own_is_called_and_must_be_per_token(tmp_path):
    (tmp_path / "own.py").write_text(
        "def mine(logp_T, old_logp_T, advantages_T, seq_lens):\n    return -advantages_T * logp_T * len(seq_lens)\n\n\n"
        "def summed(logp_T, old_logp_T, advantages_T, seq_lens):\n    return logp_T.sum()\n"
    )
    out = outputs()
    logp_R, _, advantages_R = inputs(out)
    torch.testing.assert_close(loss_of(out, loss=f"{tmp_path}/own.py:mine"), -(logp_R * advantages_R).sum() * 3 / 20)
    with pytest.raises(UserError, match=r"returned a tensor \[\]; it must return a tensor \[10\], per token"):
        loss_of(out, loss=f"{tmp_path}/own.py:summed")
