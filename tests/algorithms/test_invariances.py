"""What holds across functions: no result depends on the rest of the batch, on order, on padding or on the split.

An objective here is what a policy update minimises: a policy loss, weighted by importance weights, plus a KL term,
aggregated. Legend as in the modules: T tokens of all samples, B samples, N rows, L tokens of the longest sample.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.algorithms.advantages import best_of_n, discounted_returns, gae, group_relative, leave_one_out, whiten
from engine.algorithms.aggregate import MODES, aggregate, mean_per_sample, sum_per_sample
from engine.algorithms.distillation import chunked_generalized_jsd, generalized_jsd
from engine.algorithms.kl import kl_estimate
from engine.algorithms.logprobs import greedy_hits, token_logprobs
from engine.algorithms.off_policy import importance_weights
from engine.algorithms.policy_losses import cispo, gspo, ppo_clip, reinforce
from engine.algorithms.preference import DPO_KINDS, dpo, kto, orpo, simpo
from engine.algorithms.reward_model import bradley_terry, process_bce
from engine.algorithms.reward_shaping import overlong_penalty, token_rewards
from engine.algorithms.values import clipped_value_loss

LENS = st.lists(st.integers(0, 5), min_size=1, max_size=6)
SEEDS = st.integers(0, 9999)
SHUFFLES = st.randoms(use_true_random=False)
MAX_LEN = 7


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def positions(lens: list[int], samples: list[int]) -> torch.Tensor:
    """[T'] where the tokens of the chosen samples are, sample after sample."""
    spans = torch.arange(sum(lens)).split(lens)
    return torch.cat([spans[i] for i in samples]) if samples else torch.arange(0)


# ---- functions one by one: what they say of a sample or a row does not depend on the others

PerSample = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, list[int]], torch.Tensor]
PER_SAMPLE: dict[str, PerSample] = {
    "gae advantages": lambda x, y, z, s, lens: gae(x, y, lens, gamma=0.9, lam=0.8, bootstrap=s)[0],
    "gae returns": lambda x, y, z, s, lens: gae(x, y, lens, gamma=0.9, lam=0.8, bootstrap=s)[1],
    "discounted_returns": lambda x, y, z, s, lens: discounted_returns(x, lens, gamma=0.9),
    "token_rewards": lambda x, y, z, s, lens: token_rewards(s, lens, x, kl_coef=0.3),
    "ppo_clip": lambda x, y, z, s, lens: ppo_clip(x, y, z),
    "ppo_clip with dual_clip": lambda x, y, z, s, lens: ppo_clip(x, y, z, dual_clip=3.0),
    "gspo": lambda x, y, z, s, lens: gspo(x, y, z, lens),
    "cispo": lambda x, y, z, s, lens: cispo(x, y, z),
    "reinforce": lambda x, y, z, s, lens: reinforce(x, z),
    "clipped_value_loss": lambda x, y, z, s, lens: clipped_value_loss(x, y, z),
    **{f"kl_estimate {k}": lambda x, y, z, s, lens, k=k: kl_estimate(x, y, k) for k in ("k1", "k2", "k3")},
    **{
        f"importance_weights {level} {mode}": lambda x, y, z, s, lens, level=level, mode=mode: importance_weights(
            x, y, lens, level=level, mode=mode
        )
        for level in ("token", "sequence", "geometric")
        for mode in ("truncate", "mask")
    },
}

H, V = 3, 7
WEIGHT, TEACHER_WEIGHT = random(V, H, seed=1), random(V, H, seed=2)


def target_ids(x_N: torch.Tensor) -> torch.Tensor:
    return (3 * x_N.detach().abs()).long() % V


PerRow = Callable[[torch.Tensor], torch.Tensor]
PER_ROW: dict[str, PerRow] = {  # of rows with eight numbers
    "overlong_penalty": lambda x: overlong_penalty((20 * x[:, 0].detach().abs()).long(), max_len=30, fraction=0.9),
    "bradley_terry": lambda x: bradley_terry(x[:, 0], x[:, 1], margin=x[:, 2]),
    "process_bce": lambda x: process_bce(x[:, 0], x[:, 1] > 0),
    **{f"dpo {k}": lambda x, k=k: dpo(*x[:, :4].unbind(1), kind=k) for k in DPO_KINDS},
    "kto": lambda x: kto(x[:, 0], x[:, 1], x[:, 2] > 0, 0.5),
    "orpo": lambda x: orpo(-x[:, 0].abs(), -x[:, 1].abs()),
    "simpo": lambda x: simpo(x[:, 0], x[:, 1]),
    "generalized_jsd": lambda x: generalized_jsd(x[:, :4], x[:, 4:], beta=0.3),
    "token_logprobs": lambda x: token_logprobs(x[:, :H], WEIGHT.to(x.dtype), target_ids(x[:, 3]), chunk_tokens=2)[0],
    "entropy": lambda x: token_logprobs(x[:, :H], WEIGHT.to(x.dtype), target_ids(x[:, 3]), chunk_tokens=2)[1],
    "greedy_hits": lambda x: greedy_hits(x[:, :H], WEIGHT.to(x.dtype), target_ids(x[:, 3]), chunk_tokens=2),
    "chunked_generalized_jsd": lambda x: chunked_generalized_jsd(
        x[:, :H], WEIGHT.to(x.dtype), x[:, H : 2 * H], TEACHER_WEIGHT.to(x.dtype), beta=0.3, chunk_tokens=2
    ),
}


@pytest.mark.parametrize("function", PER_SAMPLE.values(), ids=PER_SAMPLE.keys())
@given(lens=LENS, seed=SEEDS, data=st.data())
@settings(max_examples=15, deadline=None)
def test_any_samples_in_any_order_get_what_they_get_in_the_whole_batch(function, lens, seed, data):
    tokens, score_B = random(3, sum(lens), seed=seed), random(len(lens), seed=seed + 1)
    chosen = data.draw(st.lists(st.sampled_from(range(len(lens))), unique=True))
    index_T = positions(lens, chosen)
    alone = function(*tokens[:, index_T], score_B[chosen], [lens[i] for i in chosen])
    torch.testing.assert_close(alone, function(*tokens, score_B, lens)[index_T])


@pytest.mark.parametrize("function", PER_ROW.values(), ids=PER_ROW.keys())
@given(rows=st.integers(1, 6), seed=SEEDS, data=st.data())
@settings(max_examples=15, deadline=None)
def test_any_rows_in_any_order_get_what_they_get_in_the_whole_batch(function, rows, seed, data):
    x = random(rows, 8, seed=seed)
    chosen = data.draw(st.lists(st.sampled_from(range(rows)), unique=True))
    torch.testing.assert_close(function(x[chosen]), function(x)[chosen])


ESTIMATORS = {
    "group_relative std": lambda s, ids: group_relative(s, ids),
    "group_relative none": lambda s, ids: group_relative(s, ids, scale="none"),
    "leave_one_out": leave_one_out,
    "best_of_n": best_of_n,
}


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS.keys())
@given(
    groups=st.lists(st.lists(st.sampled_from([0.0, 0.1, 1 / 3, 1.0, -2.5]), min_size=1, max_size=4), min_size=1),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_any_groups_in_any_order_and_under_any_ids_get_what_they_get_in_the_whole_batch(estimator, groups, data):
    rows = [(score, group) for group, scores in enumerate(groups) for score in scores]
    whole = estimator(torch.tensor([s for s, _ in rows], dtype=torch.float64), [g for _, g in rows])
    kept = data.draw(st.sets(st.sampled_from(range(len(groups))), min_size=1))
    chosen = data.draw(st.permutations([i for i, (_, g) in enumerate(rows) if g in kept]))
    alone = estimator(
        torch.tensor([rows[i][0] for i in chosen], dtype=torch.float64), [11 - 3 * rows[i][1] for i in chosen]
    )
    torch.testing.assert_close(alone, whole[chosen])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [*PER_SAMPLE, *PER_ROW])
@given(lens=LENS, seed=SEEDS, spread=st.floats(0, 100), data=st.data())
@settings(max_examples=6, deadline=None)
def test_values_and_gradients_stay_finite_for_log_ratios_up_to_200(name, dtype, lens, seed, spread, data):
    if name in PER_SAMPLE:
        x = (spread * random(3, sum(lens), seed=seed)).clamp(-100, 100).to(dtype).requires_grad_()
        result = PER_SAMPLE[name](*x, random(len(lens), seed=seed, dtype=dtype), lens)
    else:
        x = (spread * random(len(lens), 8, seed=seed)).clamp(-100, 100).to(dtype).requires_grad_()
        result = PER_ROW[name](x)
    assert result.isfinite().all()
    if result.requires_grad:
        (grad,) = torch.autograd.grad(result, x, torch.ones_like(result))
        assert grad.isfinite().all()


HEADS = {
    "token_logprobs": lambda h, w: token_logprobs(h, w, target_ids(h[:, 0]))[0],
    "entropy": lambda h, w: token_logprobs(h, w, target_ids(h[:, 0]))[1],
    "chunked_generalized_jsd": lambda h, w: chunked_generalized_jsd(h, w, h.detach().flip(1), TEACHER_WEIGHT, beta=0.3),
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
@given(owners=st.lists(st.integers(0, 2), min_size=1, max_size=9), seed=SEEDS)
@settings(max_examples=15, deadline=None)
def test_the_output_layers_gradients_of_micro_batches_add_up_to_that_of_the_whole(head, owners, seed):
    hidden_T, weight = random(len(owners), H, seed=seed), WEIGHT.clone().requires_grad_()
    (whole,) = torch.autograd.grad(head(hidden_T, weight).sum(), weight)
    parts = [[t for t, owner in enumerate(owners) if owner == part] for part in range(3)]
    grads = [torch.autograd.grad(head(hidden_T[part], weight).sum(), weight)[0] for part in parts]
    torch.testing.assert_close(sum(grads), whole)


# ---- whole objectives

LOSSES = {
    "ppo_clip": lambda logp, old, adv, lens: ppo_clip(logp, old, adv, clip_low=0.2, clip_high=0.28),
    "dual_clip": lambda logp, old, adv, lens: ppo_clip(logp, old, adv, dual_clip=3.0),
    "gspo": lambda logp, old, adv, lens: gspo(logp, old, adv, lens, clip_low=0.1, clip_high=0.2),
    "cispo": lambda logp, old, adv, lens: cispo(logp, old, adv),
    "reinforce": lambda logp, old, adv, lens: reinforce(logp, adv),
}
CORRECTIONS = st.tuples(st.sampled_from(["token", "sequence", "geometric"]), st.sampled_from(["truncate", "mask"]))
every_objective = [
    pytest.mark.parametrize("mode", MODES),
    pytest.mark.parametrize("loss", LOSSES.keys()),
    given(lens=LENS, seed=SEEDS, correction=CORRECTIONS, data=st.data()),
    settings(max_examples=8, deadline=None),
]


def for_every_objective(test):
    for mark in reversed(every_objective):
        test = mark(test)
    return test


class Rollouts:
    """Random samples; `objective` is that of some of them, in the order given, as a trainer gets them."""

    def __init__(self, lens: list[int], seed: int, correction: tuple[str, str], *, spread: float = 0.5) -> None:
        self.lens, self.correction = lens, correction
        self.old_T, self.advantages_T, *changes = random(5, sum(lens), seed=seed)
        self.logp_T, self.rollout_logp_T, self.ref_logp_T = (self.old_T + spread * change for change in changes)
        self.logp_T.requires_grad_()
        self.totals = {"total_tokens": sum(lens), "total_sequences": sum(n > 0 for n in lens)}

    def objective(self, loss: str, mode: str, samples: list[int] | None = None, **totals: int) -> torch.Tensor:
        samples = list(range(len(self.lens))) if samples is None else samples
        lens, index_T = [self.lens[i] for i in samples], positions(self.lens, samples)
        logp_T, old_T, advantages_T, rollout_logp_T, ref_logp_T = (
            x[index_T] for x in (self.logp_T, self.old_T, self.advantages_T, self.rollout_logp_T, self.ref_logp_T)
        )
        level, bound = self.correction
        weights_T = importance_weights(old_T, rollout_logp_T, lens, level=level, mode=bound)
        loss_T = LOSSES[loss](logp_T, old_T, advantages_T, lens) * weights_T
        loss_T = loss_T + 0.1 * kl_estimate(logp_T, ref_logp_T, "k3")
        return aggregate(loss_T, lens, mode, max_len=MAX_LEN, **totals)

    def gradient(self, loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, self.logp_T)[0]


@for_every_objective
def test_micro_batches_and_ranks_with_global_denominators_are_the_whole(mode, loss, lens, seed, correction, data):
    rollouts = Rollouts(lens, seed, correction)
    whole = rollouts.objective(loss, mode)
    ranks = data.draw(st.integers(1, 3), label="ranks")
    owners = [data.draw(st.tuples(st.integers(0, ranks - 1), st.integers(0, 1)), label="owner") for _ in lens]
    losses, gradients = [], []
    for rank in range(ranks):  # each adds up its micro-batches; then the ranks' gradients are averaged
        parts = [[i for i, owner in enumerate(owners) if owner == (rank, part)] for part in range(2)]
        own = ranks * sum(rollouts.objective(loss, mode, part, **rollouts.totals) for part in parts)
        losses.append(own.detach())
        gradients.append(rollouts.gradient(own))
    torch.testing.assert_close(torch.stack(losses).mean(), whole.detach())
    torch.testing.assert_close(torch.stack(gradients).mean(0), rollouts.gradient(whole))


@for_every_objective
def test_the_order_of_samples_and_groups_does_not_matter(mode, loss, lens, seed, correction, data):
    rollouts = Rollouts(lens, seed, correction)
    scores_B = random(len(lens), seed=seed)
    ids = data.draw(st.lists(st.integers(-2, 2), min_size=len(lens), max_size=len(lens)))

    def result(order: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        advantages_B = torch.empty_like(scores_B)
        advantages_B[order] = group_relative(scores_B[order], [ids[i] for i in order], scale="batch")
        rollouts.advantages_T = torch.repeat_interleave(advantages_B, torch.tensor(lens))
        value = rollouts.objective(loss, mode, order)
        return value.detach(), rollouts.gradient(value)

    order = data.draw(st.permutations(range(len(lens))))
    torch.testing.assert_close(result(order), result(list(range(len(lens)))))


def padded_objective(rollouts: Rollouts, loss: str, mode: str) -> torch.Tensor:
    """The objective written down for padded rows and a mask; the padding holds rubbish."""
    lens_B = torch.tensor(rollouts.lens)
    mask_BL = torch.arange(max(rollouts.lens)) < lens_B[:, None]

    def rows(x_T: torch.Tensor, rubbish: float) -> torch.Tensor:
        return torch.full(mask_BL.shape, rubbish).double().masked_scatter(mask_BL, x_T)

    def sums(x_BL: torch.Tensor) -> torch.Tensor:
        return (x_BL * mask_BL).sum(1)

    logp, old, adv = rows(rollouts.logp_T, -3.0), rows(rollouts.old_T, 2.0), rows(rollouts.advantages_T, 9.0)
    n_B = lens_B.clamp(min=1)
    ratio = (logp - old).exp()
    if loss == "gspo":
        mean_BL = (sums(logp - old) / n_B)[:, None].detach()
        ratio = (mean_BL + logp - logp.detach()).exp()
    low, high = {"ppo_clip": (0.2, 0.28), "dual_clip": (0.2, 0.2), "gspo": (0.1, 0.2), "cispo": (1.0, 0.28)}.get(
        loss, (0.0, 0.0)
    )
    clipped = ratio.clamp(1 - low, 1 + high)
    surrogate = torch.minimum(ratio * adv, clipped * adv)
    if loss == "dual_clip":
        surrogate = torch.where(adv < 0, torch.maximum(surrogate, 3.0 * adv), surrogate)
    elif loss == "cispo":
        surrogate = clipped.detach() * adv * logp
    elif loss == "reinforce":
        surrogate = adv * logp

    mismatch = old - rows(rollouts.rollout_logp_T, 5.0)
    level, bound = rollouts.correction
    if level != "token":
        sums_B = sums(mismatch)
        mismatch = (sums_B if level == "sequence" else sums_B / n_B)[:, None].expand_as(logp)
    weight = mismatch.exp()
    weight = weight.clamp(max=2.0) if bound == "truncate" else weight * (weight <= 2.0)

    r = rows(rollouts.ref_logp_T, 1.0) - logp
    loss_BL = -surrogate * weight + 0.1 * (r.exp() - 1 - r)
    if mode == "token-mean":
        return sums(loss_BL).sum() / max(int(lens_B.sum()), 1)
    per_sample_B = sums(loss_BL) / (n_B if mode == "seq-mean-token-mean" else 1)
    mean = per_sample_B.sum() / max(int((lens_B > 0).sum()), 1)
    return mean / MAX_LEN if mode == "seq-mean-token-sum-norm" else mean


@for_every_objective
def test_packed_samples_are_padded_ones(mode, loss, lens, seed, correction, data):
    rollouts = Rollouts(lens, seed, correction)
    packed, padded = rollouts.objective(loss, mode), padded_objective(rollouts, loss, mode)
    torch.testing.assert_close(packed, padded)
    torch.testing.assert_close(rollouts.gradient(packed), rollouts.gradient(padded))


@for_every_objective
def test_at_ratio_one_every_objective_has_the_gradient_of_reinforce(mode, loss, lens, seed, correction, data):
    rollouts = Rollouts(lens, seed, correction)
    rollouts.old_T = rollouts.logp_T.detach()
    ours, plain = (rollouts.gradient(rollouts.objective(name, mode)) for name in (loss, "reinforce"))
    torch.testing.assert_close(ours, plain)


@for_every_objective
def test_groups_without_a_difference_teach_exactly_nothing(mode, loss, lens, seed, correction, data):
    rollouts = Rollouts(lens, seed, correction, spread=data.draw(st.floats(0, 50)))
    rollouts.ref_logp_T = rollouts.logp_T.detach()
    score = data.draw(st.sampled_from([0.1, 0.3, 1 / 3, -0.7, 1.0]))
    advantages_B = group_relative(
        torch.full((len(lens),), score, dtype=torch.float64), [i // 3 for i in range(len(lens))]
    )
    rollouts.advantages_T = torch.repeat_interleave(advantages_B, torch.tensor(lens))
    value = rollouts.objective(loss, mode)
    assert value.item() == 0.0
    assert (rollouts.gradient(value) == 0).all()


@for_every_objective
def test_gradients_of_every_objective_stay_finite_for_log_ratios_up_to_200(mode, loss, lens, seed, correction, data):
    rollouts = Rollouts(lens, seed, correction)
    extremes = st.sampled_from([-200.0, -100.0, -20.0, 0.0, 20.0, 100.0, 200.0])
    for name in ("logp_T", "rollout_logp_T", "ref_logp_T"):
        change_T = torch.tensor([data.draw(extremes) for _ in range(sum(lens))])
        setattr(rollouts, name, rollouts.old_T.float() + change_T)
    rollouts.old_T, rollouts.advantages_T = rollouts.old_T.float(), rollouts.advantages_T.float()
    rollouts.logp_T.requires_grad_()
    assert rollouts.gradient(rollouts.objective(loss, mode)).isfinite().all()


@given(lens=st.lists(st.integers(1, 5), min_size=2, max_size=6), seed=SEEDS)
@settings(max_examples=40, deadline=None)
def test_a_loss_on_whole_answers_is_the_same_of_packed_and_of_padded_ones(lens, seed):
    lens = lens[: len(lens) // 2 * 2]  # chosen and rejected in turn
    lens_B = torch.tensor(lens)
    mask_BL = torch.arange(max(lens)) < lens_B[:, None]
    policy_T, ref_T = -random(2, sum(lens), seed=seed).abs()
    policy_BL, ref_BL = (torch.full(mask_BL.shape, -9.0).double().masked_scatter(mask_BL, x) for x in (policy_T, ref_T))
    packed = [sum_per_sample(x, lens_B) for x in (policy_T, ref_T)]
    padded = [torch.where(mask_BL, x, 0).sum(1) for x in (policy_BL, ref_BL)]
    for kind in DPO_KINDS:
        ours, theirs = (dpo(p[::2], p[1::2], r[::2], r[1::2], kind=kind) for p, r in (packed, padded))
        torch.testing.assert_close(ours, theirs)
    means = mean_per_sample(policy_T, lens_B)
    torch.testing.assert_close(orpo(means[::2], means[1::2]), orpo(*(padded[0] / lens_B).view(-1, 2).T))


def test_statistics_belong_to_the_global_batch_not_to_a_micro_batch():
    """Advantages whitened once give the same update however it is split; whitened per micro-batch they would not."""
    rollouts = Rollouts([3, 2, 4], seed=0, correction=("token", "truncate"))
    raw_T, halves = 5 * rollouts.advantages_T + 3, [[0, 1], [2]]

    def split_gradient() -> torch.Tensor:
        parts = [rollouts.objective("ppo_clip", "token-mean", part, **rollouts.totals) for part in halves]
        return rollouts.gradient(sum(parts))

    rollouts.advantages_T = whiten(raw_T)
    whole = rollouts.gradient(rollouts.objective("ppo_clip", "token-mean"))
    torch.testing.assert_close(split_gradient(), whole)
    rollouts.advantages_T = torch.cat([whiten(raw_T[positions(rollouts.lens, part)]) for part in halves])
    assert not torch.allclose(split_gradient(), whole, rtol=0.1)


def test_token_mean_is_one_mean_over_all_tokens_of_the_update_not_a_mean_of_means():
    """Micro-batches of 1 and of 9 tokens: own denominators would give the single token nine times its weight."""
    x_T = torch.tensor([10.0] + [0.0] * 9)
    parts = [
        aggregate(x_T[:1], [1], "token-mean", total_tokens=10),
        aggregate(x_T[1:], [9], "token-mean", total_tokens=10),
    ]
    assert float(sum(parts)) == float(aggregate(x_T, [1, 9], "token-mean")) == 1.0
