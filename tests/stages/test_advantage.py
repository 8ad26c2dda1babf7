"""Advantages, estimator by estimator, in numbers worked out by hand; see test_rl_steps for whole steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.algorithms.advantages import whiten
from engine.config import AlgorithmConfig, UserError
from engine.data.batch import Batch
from engine.stages.advantage import shaped_scores, with_advantages

CAN_BE_WHITENED = ["gae", "returns", "group_relative", "leave_one_out"]


def batch_of(totals: list[float], groups: list[int], lens: list[int], **annotations: float | list[float]) -> Batch:
    """Samples of `lens` trained tokens behind a prompt of one; annotations are of the trained tokens."""
    mask = np.concatenate([np.arange(n + 1) > 0 for n in lens])
    total = len(mask)
    batch = Batch.offline(
        np.arange(total, dtype=np.int32), np.array(lens, np.int32) + 1, mask, np.array(groups, np.int64)
    )
    batch = Batch(**{**vars(batch), "totals": np.array(totals, np.float32)})
    spread = {name: np.full(total, 9.0, np.float32) for name in annotations}  # what is not trained must not be read
    for name, values in annotations.items():
        spread[name][mask] = values
    return batch.annotate(**spread)


def trained(batch: Batch, algorithm: dict[str, Any], name: str = "advantages", kl_coef: float = 0.0) -> list[float]:
    """An annotation at the trained tokens; it is 0 everywhere else."""
    config = AlgorithmConfig(**algorithm)
    batch = with_advantages(batch, config, kl_coef=kl_coef, max_new_tokens=8)
    values_T = batch.annotations[name]
    assert values_T.dtype == np.float32
    assert (values_T[~batch.loss_mask] == 0).all()
    return values_T[batch.loss_mask].tolist()


def test_gae_and_its_returns():
    """delta = [0.5 * 0.4 - 0.2, 1 - 0.4] = [0, 0.6]; the first advantage is 0.5 * 0.5 * 0.6."""
    batch = batch_of([1.0, -2.0], [0, 1], [2, 1], values=[0.2, 0.4, 0.5])
    algorithm = {"advantage": "gae", "gamma": 0.5, "lam": 0.5}
    assert trained(batch, algorithm) == pytest.approx([0.15, 0.6, -2.5])
    assert trained(batch, algorithm, "returns") == pytest.approx([0.35, 1.0, -2.0])


def test_returns_are_discounted_and_only_a_critic_is_given_any():
    batch = batch_of([1.0, -2.0], [0, 0], [3, 1])
    assert trained(batch, {"advantage": "returns", "gamma": 0.5}) == [0.25, 0.5, 1.0, -2.0]
    with pytest.raises(KeyError):
        trained(batch, {"advantage": "returns"}, "returns")


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        ({"advantage_scale": "none"}, [-2, 0, 2, 1, -1]),
        ({"advantage_scale": "std"}, [-1, 0, 1, 0.5**0.5, -(0.5**0.5)]),
        ({"advantage_scale": "batch"}, [-2 / 2.5**0.5, 0, 2 / 2.5**0.5, 1 / 2.5**0.5, -1 / 2.5**0.5]),
        ({"advantage": "leave_one_out"}, [-3, 0, 3, 2, -2]),
        ({"advantage": "best_of_n"}, [1, 1]),
    ],
)
def test_comparisons_within_groups(algorithm, expected):
    """Scores 0, 2, 4 and 3, 1: means 2 and 2, standard deviations 2 and sqrt(2), variance of all five 2.5."""
    batch = batch_of([0, 2, 4, 3, 1], [7, 7, 7, 1, 1], [1, 1, 1, 1, 1])
    assert trained(batch, algorithm) == pytest.approx(expected, abs=1e-5)


def test_every_token_of_a_sample_gets_its_samples_advantage():
    batch = batch_of([0, 4], [0, 0], [2, 3])
    assert trained(batch, {"advantage_scale": "none"}) == [-2, -2, 2, 2, 2]


def test_whitening_comes_after_the_penalty_and_the_penalty_after_the_clipping():
    """Clipped 2, 2, 0; responses of 8, 4 and 7 of 8 tokens lose 0.5, 0 and 0.25."""
    batch = batch_of([100.0, 2.0, 0.0], [0, 1, 2], [8, 4, 7])
    algorithm = AlgorithmConfig(reward_clip=2.0, overlong_penalty=0.5, overlong_fraction=0.25, whiten_rewards=True)
    scores_B = shaped_scores(batch, algorithm, max_new_tokens=8)
    torch.testing.assert_close(scores_B, whiten(torch.tensor([1.5, 2.0, -0.25], dtype=torch.float64)))


def test_rewards_are_clipped_on_both_sides():
    scores_B = shaped_scores(batch_of([-9, 9], [0, 0], [1, 1]), AlgorithmConfig(reward_clip=1.5), max_new_tokens=8)
    assert scores_B.tolist() == [-1.5, 1.5]


@pytest.mark.parametrize(("estimator", "kl"), [("k1", 2.0), ("k2", 2.0), ("k3", np.exp(-2) + 1)])
def test_the_kl_in_the_reward_counts_in_comparisons_with_its_estimator(estimator, kl):
    """The second sample is as good as the first, but two tokens away from the reference."""
    batch = batch_of([1, 1], [0, 0], [1, 2], old_logp=[-1, -1, -1], ref_logp=[-1, -3, -3])
    algorithm = {"advantage": "leave_one_out", "kl_in": "reward", "kl_estimator": estimator}
    assert trained(batch, algorithm, kl_coef=0.1) == pytest.approx([0.2 * kl, -0.2 * kl, -0.2 * kl])
    assert trained(batch, algorithm | {"kl_in": "loss"}, kl_coef=0.1) == [0, 0, 0]


def test_pairs_are_chosen_by_rewards_less_their_kl():
    batch = batch_of([1.0, 1.1], [0, 0], [1, 1], old_logp=[-1, -1], ref_logp=[-1, -3])
    algorithm = AlgorithmConfig(advantage="best_vs_worst", kl_in="reward", kl_estimator="k1")
    chosen = with_advantages(batch, algorithm, kl_coef=0.1, max_new_tokens=8)
    assert chosen.sample_ids.tolist() == [0, 1]
    assert "advantages" not in chosen.annotations


@pytest.mark.parametrize("advantage", CAN_BE_WHITENED)
def test_whitened_advantages_have_variance_1_over_tokens(advantage):
    batch = batch_of([1, 0, 3, 5], [0, 0, 1, 1], [3, 1, 2, 2], values=0.1)
    plain = trained(batch, {"advantage": advantage})
    values = trained(batch, {"advantage": advantage, "whiten_advantages": True})
    assert np.var(values, ddof=1) == pytest.approx(1)
    if advantage in ("gae", "returns"):
        assert np.mean(values) == pytest.approx(0, abs=1e-6)
    else:
        assert np.divide(values, plain) == pytest.approx(np.full(8, 1 / np.std(plain, ddof=1))), "scaled, not moved"
        assert abs(np.mean(values)) > 0.1


@pytest.mark.parametrize("whiten_advantages", [False, True])
@pytest.mark.parametrize("advantage", ["group_relative", "leave_one_out"])
def test_a_group_without_differences_gets_exactly_0(advantage, whiten_advantages):
    batch = batch_of([0.1, 0.1, 0.1, 1, 0], [0, 0, 0, 1, 1], [1, 2, 3, 1, 4])
    values = trained(batch, {"advantage": advantage, "whiten_advantages": whiten_advantages})
    assert values[:6] == [0] * 6
    assert values[6] > 0 > values[7]


def test_where_no_group_differs_nothing_is_selected():
    batch = batch_of([1, 1, 2], [0, 0, 1], [1, 2, 3])
    for advantage in ("best_of_n", "best_vs_worst"):
        chosen = with_advantages(batch, AlgorithmConfig(advantage=advantage), kl_coef=0, max_new_tokens=8)
        assert len(chosen) == 0


OWN = """
import torch

def everything(scores_B, group_ids, rewards_T, seq_lens):
    assert (scores_B.dtype, rewards_T.dtype) == (torch.float64, torch.float64)
    assert seq_lens.tolist() == [2, 1]
    assert group_ids.tolist() == [4, 6]
    assert torch.allclose(rewards_T, torch.tensor([-0.2, 0.8, 3.0]).double())
    return scores_B

def per_token(rewards_T): return torch.arange(len(rewards_T))
def a_list(scores_B): return scores_B.tolist()
def nothing(rewards_T): return None
def too_many(scores_B): return torch.zeros(7)
def square(scores_B): return torch.zeros(2, 1)
def infinite(scores_B): return scores_B / 0
def greedy(scores_B, weather, mood): return scores_B
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    (tmp_path / "own.py").write_text(OWN)
    return f"{tmp_path}/own.py:"


OWN_BATCH = batch_of([1, 3], [4, 6], [2, 1], old_logp=[-1, -1, -1], ref_logp=[-3, -3, -1])


def test_an_estimator_of_ones_own_is_given_scores_and_rewards_less_the_kl(own):
    algorithm = {"advantage": f"{own}everything", "kl_in": "reward", "kl_estimator": "k1"}
    assert trained(OWN_BATCH, algorithm, kl_coef=0.1) == pytest.approx([0.6, 0.6, 3.0])


def test_an_estimator_of_ones_own_may_answer_per_token(own):
    assert trained(OWN_BATCH, {"advantage": f"{own}per_token"}) == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("a_list", "returned list; it must return a tensor with one number per sample [2] or per token [3]"),
        ("nothing", "returned NoneType; it must return a tensor with one number per sample [2] or per token [3]"),
        ("too_many", "returned a tensor [7]; it must return a tensor with one number per sample [2] or per token [3]"),
        ("square", "returned a tensor [2, 1]; it must return a tensor with one number per sample [2] or per token [3]"),
        ("infinite", "returned a number that is not finite"),
        ("greedy", "asks for 'weather'; there are scores_B, group_ids, rewards_T, seq_lens"),
    ],
)
def test_what_is_wrong_with_an_estimator_of_ones_own_is_told(own, name, says):
    with pytest.raises(UserError) as caught:
        trained(OWN_BATCH, {"advantage": own + name})
    assert str(caught.value) == f"algorithm.advantage: {own}{name} {says}"


def test_an_estimator_that_is_not_there_is_told(own):
    with pytest.raises(UserError, match=r"algorithm\.advantage '.*:squares': .*did you mean 'square'\?"):
        trained(OWN_BATCH, {"advantage": f"{own}squares"})
