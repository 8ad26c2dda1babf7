"""From a step's rewards to what its samples are trained on: advantages, or the samples chosen by comparison.

    totals --clip, overlong penalty, whiten--> scores --steps, KL in the reward--> token rewards --estimator-->
    advantages

Everything is computed once, on the whole batch, in float64: never per micro-batch or rank.
Legend: B samples; T their trained tokens, one sample after the other.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from engine.algorithms.advantages import (
    best_and_worst,
    best_of_n,
    discounted_returns,
    gae,
    group_relative,
    leave_one_out,
    step_relative,
    whiten,
)
from engine.algorithms.aggregate import sum_per_sample
from engine.algorithms.kl import kl_estimate
from engine.algorithms.reward_shaping import overlong_penalty, token_rewards
from engine.config import AlgorithmConfig, UserError
from engine.data.batch import Batch
from engine.user_code import load_object

WHITEN_EPS = 1e-8


def with_advantages(batch: Batch, algorithm: AlgorithmConfig, *, kl_coef: float, max_new_tokens: int) -> Batch:
    """The samples that are to be trained, annotated with `advantages` (and `returns`, where there is a critic).

    Raises:
        UserError: the user's own estimator returned something that is not an advantage.
    """
    scores_B = shaped_scores(batch, algorithm, max_new_tokens=max_new_tokens)
    rewards_T = _token_rewards(batch, algorithm, scores_B, kl_coef)
    lens_B = torch.from_numpy(batch.response_lens)
    returns_B = sum_per_sample(rewards_T, lens_B)
    group_ids = torch.from_numpy(batch.group_ids)
    returns_T = None
    match algorithm.advantage:
        case "gae":
            values_T = _trained(batch, "values")
            advantages_T, returns_T = gae(rewards_T, values_T, lens_B, gamma=algorithm.gamma, lam=algorithm.lam)
        case "returns":
            advantages_T = discounted_returns(rewards_T, lens_B, gamma=algorithm.gamma)
        case "group_relative":
            advantages_T = _per_token(group_relative(returns_B, group_ids, scale=algorithm.advantage_scale), lens_B)
        case "step_relative":
            ends_T = _trained(batch, "step_ends") if "step_ends" in batch.annotations else torch.zeros_like(rewards_T)
            advantages_T = step_relative(rewards_T, ends_T > 0, lens_B, group_ids)
        case "leave_one_out":
            advantages_T = _per_token(leave_one_out(returns_B, group_ids), lens_B)
        case "best_of_n":
            advantages_T = _per_token(best_of_n(returns_B, group_ids), lens_B)
        case "best_vs_worst":
            return batch.select(best_and_worst(returns_B, group_ids).flatten().numpy())
        case spec:
            given = {"scores_B": returns_B, "group_ids": group_ids, "rewards_T": rewards_T, "seq_lens": lens_B}
            advantages_T = _own_advantages(spec, given)
    if algorithm.whiten_advantages and algorithm.compares_samples:
        # Groups have centred them. Centring again, on tokens, would give a group without differences an advantage.
        advantages_T = advantages_T / (advantages_T.var(correction=min(1, len(advantages_T) - 1)) + WHITEN_EPS).sqrt()
    elif algorithm.whiten_advantages:
        advantages_T = whiten(advantages_T, eps=WHITEN_EPS)
    annotations = {"advantages": advantages_T} | ({} if returns_T is None else {"returns": returns_T})
    batch = batch.annotate(**{name: _on_all_tokens(batch, values_T) for name, values_T in annotations.items()})
    if algorithm.advantage == "best_of_n":
        return batch.select(np.flatnonzero(batch.sum_per_sample(batch.annotations["advantages"]) > 0))
    return batch


def shaped_scores(batch: Batch, algorithm: AlgorithmConfig, *, max_new_tokens: int) -> torch.Tensor:
    """[B] float64: the samples' rewards, clipped, less the penalty for length, whitened, as far as is configured."""
    scores_B = torch.from_numpy(batch.totals).double()
    if algorithm.reward_clip is not None:
        scores_B = scores_B.clamp(-algorithm.reward_clip, algorithm.reward_clip)
    if algorithm.overlong_penalty > 0:
        fraction = algorithm.overlong_fraction
        penalty_B = overlong_penalty(batch.response_lens, max_len=max_new_tokens, fraction=fraction)
        scores_B = scores_B - algorithm.overlong_penalty * penalty_B
    return whiten(scores_B) if algorithm.whiten_rewards else scores_B


def _token_rewards(batch: Batch, algorithm: AlgorithmConfig, scores_B: torch.Tensor, kl_coef: float) -> torch.Tensor:
    """[T] float64: each step's reward where it ends, the rest of the score at the last token, the KL term at each."""
    if "step_rewards" in batch.annotations:
        steps_T = _trained(batch, "step_rewards")
        rest_B = scores_B - sum_per_sample(steps_T, torch.from_numpy(batch.response_lens))
        whole = replace(batch, annotations={n: v for n, v in batch.annotations.items() if n != "step_rewards"})
        return steps_T + _token_rewards(whole, algorithm, rest_B, kl_coef)
    if kl_coef == 0 or algorithm.kl_in == "loss":
        return token_rewards(scores_B, batch.response_lens)
    kl_T = kl_estimate(_trained(batch, "old_logp"), _trained(batch, "ref_logp"), algorithm.kl_estimator)
    return token_rewards(scores_B, batch.response_lens, kl_T, kl_coef=kl_coef)


def _own_advantages(spec: str, given: dict[str, Any]) -> torch.Tensor:
    """[T] of the user's estimator, which is given what its parameters name and returns [B] or [T]."""
    function = load_object(spec, what="algorithm.advantage")
    names = inspect.signature(function).parameters
    if unknown := [name for name in names if name not in given]:
        raise UserError(f"algorithm.advantage: {spec} asks for {unknown[0]!r}; there are {', '.join(given)}")
    result = function(**{name: given[name] for name in names})
    tokens, samples = len(given["rewards_T"]), len(given["scores_B"])
    if not isinstance(result, torch.Tensor) or result.shape not in ((samples,), (tokens,)):
        shown = f"a tensor {list(result.shape)}" if isinstance(result, torch.Tensor) else type(result).__name__
        raise UserError(
            f"algorithm.advantage: {spec} returned {shown}; it must return a tensor with one number per sample "
            f"[{samples}] or per token [{tokens}]"
        )
    if not bool(result.isfinite().all()):
        raise UserError(f"algorithm.advantage: {spec} returned a number that is not finite")
    result = result.detach()
    return _per_token(result, given["seq_lens"]) if result.shape == (samples,) else result


def _per_token(values_B: torch.Tensor, lens_B: torch.Tensor) -> torch.Tensor:
    return torch.repeat_interleave(values_B, lens_B)


def _trained(batch: Batch, name: str) -> torch.Tensor:
    """[T] float64: an annotation at the trained tokens."""
    return torch.from_numpy(batch.annotations[name][batch.loss_mask]).double()


def _on_all_tokens(batch: Batch, values_T: torch.Tensor) -> np.ndarray:
    """float32, 0 on the tokens that are not trained."""
    spread = np.zeros(len(batch.tokens), np.float32)
    spread[batch.loss_mask] = values_T.numpy()
    return spread
