"""The losses of a language model, one class per objective: from a micro-batch's log-probs to its share of the loss.

The maths is in engine/algorithms; here its inputs are gathered and its metrics named.
Legend: R trained tokens of the micro-batch, B its samples, N its pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from actors.packed_row import PackedRow
from actors.trained import Minibatch, Stats
from engine.algorithms import policy_losses, preference
from engine.algorithms.aggregate import aggregate, mean_per_sample, sum_per_sample
from engine.algorithms.kl import kl_estimate
from engine.algorithms.off_policy import importance_weights
from engine.config import AlgorithmConfig, Config, PreferenceConfig, UserError
from engine.data.batch import Batch
from engine.user_code import load_object


@dataclass(frozen=True)
class Outputs:
    """A micro-batch and what the module computed for it."""

    batch: Batch
    row: PackedRow
    values: torch.Tensor
    """[R] log-probs of the trained tokens; for distillation, divergences from the teacher."""
    entropies: torch.Tensor
    """[R] of the distributions that the trained tokens were drawn from."""
    minibatch: Minibatch

    def trained(self, values_T: np.ndarray) -> torch.Tensor:
        """[R] the trained tokens' part of values per token."""
        return torch.from_numpy(values_T[self.batch.loss_mask]).to(self.values)

    def label(self, name: str) -> torch.Tensor:
        """[B] a label of the batch."""
        return torch.from_numpy(self.batch.labels[name]).to(self.values)


class Objective(Protocol):
    """One loss and its metrics."""

    means: tuple[str, ...]
    maxima: tuple[str, ...]

    def loss(self, out: Outputs, stats: Stats) -> torch.Tensor:
        """The micro-batch's share of the global loss."""


def objective_of(config: Config) -> Objective:
    """What a configuration trains a language model on."""
    match config.stage:
        case "rl" if config.algorithm.loss != "preference":
            return PolicyGradient(config.algorithm, config.rollout.max_new_tokens)
        case "rl" | "preference":
            return Preference(config.preference)
        case "distill" if config.distill.mode == "on_policy":
            return Distillation()
        case _:
            return NextToken()


class NextToken:
    """Mean negative log-likelihood over the update's trained tokens."""

    means: tuple[str, ...] = ("train/nll", "train/entropy")
    maxima: tuple[str, ...] = ()

    def loss(self, out: Outputs, stats: Stats) -> torch.Tensor:
        """The sum over this micro-batch, divided by the tokens of the whole update."""
        stats.add({"train/nll": -out.values, "train/entropy": out.entropies})
        return -out.values.sum() / out.minibatch.total_tokens


class Distillation:
    """Mean divergence from the teacher over the update's trained tokens (arXiv:2306.13649)."""

    means: tuple[str, ...] = ("train/divergence", "train/entropy")
    maxima: tuple[str, ...] = ()

    def loss(self, out: Outputs, stats: Stats) -> torch.Tensor:
        """The sum over this micro-batch, divided by the tokens of the whole update."""
        stats.add({"train/divergence": out.values, "train/entropy": out.entropies})
        return out.values.sum() / out.minibatch.total_tokens


class Preference:
    """DPO and its relatives, over samples in the order chosen, rejected, chosen ... (KTO: samples one by one)."""

    maxima: tuple[str, ...] = ()

    def __init__(self, config: PreferenceConfig) -> None:
        self.config = config
        self.nll_coef = config.nll_coef if config.nll_coef is not None else float(config.loss == "orpo")
        self.means: tuple[str, ...] = ("train/reward_desirable", "train/reward_undesirable")
        if config.loss != "kto":
            self.means = tuple(
                f"train/{name}"
                for name in ("accuracy", "margin", "reward_chosen", "reward_rejected", "logp_chosen", "logp_rejected")
            )

    def loss(self, out: Outputs, stats: Stats) -> torch.Tensor:
        """The sum over this micro-batch's pairs (KTO: samples), divided by those of the whole update."""
        lens_B = out.row.response_lens
        logp_B = sum_per_sample(out.values, lens_B)
        if self.config.loss == "kto":
            return self._kto(out, logp_B, stats)
        mean_logp_B = logp_B / lens_B
        reward_B = self._rewards(out, logp_B, mean_logp_B, lens_B)
        chosen_N, rejected_N = reward_B[0::2], reward_B[1::2]
        stats.add(
            {
                "train/accuracy": (chosen_N > rejected_N).double(),
                "train/margin": chosen_N - rejected_N,
                "train/reward_chosen": chosen_N,
                "train/reward_rejected": rejected_N,
                "train/logp_chosen": logp_B[0::2],
                "train/logp_rejected": logp_B[1::2],
            }
        )
        loss = self._pair_losses(out, logp_B, mean_logp_B, lens_B).sum() / out.minibatch.total_groups
        if self.nll_coef > 0:
            chosen_R = torch.repeat_interleave(torch.arange(len(lens_B), device=lens_B.device) % 2 == 0, lens_B)
            loss = loss - self.nll_coef * out.values[chosen_R].sum() / out.minibatch.total_chosen_tokens
        return loss

    def _pair_losses(
        self, out: Outputs, logp_B: torch.Tensor, mean_logp_B: torch.Tensor, lens_B: torch.Tensor
    ) -> torch.Tensor:
        config = self.config
        if config.loss == "orpo":
            return preference.orpo(mean_logp_B[0::2], mean_logp_B[1::2], beta=config.beta)
        if config.loss == "simpo":
            return preference.simpo(mean_logp_B[0::2], mean_logp_B[1::2], beta=config.beta, gamma=config.simpo_gamma)
        assert config.loss != "kto", "takes no pairs"
        policy_B, ref_B = logp_B, out.label("ref_logp")
        if config.loss == "ipo":
            policy_B, ref_B = mean_logp_B, ref_B / lens_B
        return preference.dpo(
            policy_B[0::2],
            policy_B[1::2],
            ref_B[0::2],
            ref_B[1::2],
            beta=config.beta,
            kind=config.loss,
            label_smoothing=config.label_smoothing,
        )

    def _rewards(
        self, out: Outputs, logp_B: torch.Tensor, mean_logp_B: torch.Tensor, lens_B: torch.Tensor
    ) -> torch.Tensor:
        """[B] implicit rewards."""
        with torch.no_grad():
            if self.config.loss in ("orpo", "simpo"):
                return self.config.beta * mean_logp_B
            ratio_B = logp_B - out.label("ref_logp")
            return self.config.beta * (ratio_B / lens_B if self.config.loss == "ipo" else ratio_B)

    def _kto(self, out: Outputs, logp_B: torch.Tensor, stats: Stats) -> torch.Tensor:
        config, ref_B, desirable_B = self.config, out.label("ref_logp"), out.label("desirable") > 0.5
        loss_B = preference.kto(
            logp_B,
            ref_B,
            desirable_B,
            out.label("kl_baseline")[0],
            beta=config.beta,
            desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
        )
        reward_B = config.beta * (logp_B.detach() - ref_B)
        stats.add({"train/reward_desirable": reward_B[desirable_B], "train/reward_undesirable": reward_B[~desirable_B]})
        return loss_B.sum() / out.minibatch.total_sequences


class PolicyGradient:
    """A policy-gradient loss: surrogate, aggregation, KL term, entropy bonus and mismatch correction are chosen."""

    maxima: tuple[str, ...] = ("mismatch/logp_abs_max", "policy/ratio_deviation_max")
    means: tuple[str, ...] = (
        "policy/entropy",
        "policy/ratio",
        "policy/clip_fraction",
        "policy/kl_step",
        "mismatch/logp_abs_mean",
        "mismatch/correction_mean",
    )

    def __init__(self, algorithm: AlgorithmConfig, max_new_tokens: int) -> None:
        self.algorithm = algorithm
        self.max_new_tokens = max_new_tokens
        self.own = load_object(algorithm.loss, what="algorithm.loss") if ":" in algorithm.loss else None

    def loss(self, out: Outputs, stats: Stats) -> torch.Tensor:
        """Aggregated with the denominators of the whole update."""
        algorithm, logp_R = self.algorithm, out.values
        advantages_R = out.trained(out.batch.annotations["advantages"])
        rollout_logp_R = out.trained(out.batch.rollout_logp)
        # Strictly on-policy the weights that sampled are these, so the old log-probs are the new ones.
        old = out.batch.annotations.get("old_logp")
        old_logp_R = logp_R.detach() if old is None else out.trained(old)
        loss_R = self._surrogate(logp_R, old_logp_R, advantages_R, out.row.response_lens)
        weights_R = self._correction(out, old_logp_R, rollout_logp_R)
        loss_R = loss_R * weights_R
        if algorithm.kl_coef > 0 and algorithm.kl_in == "loss":
            ref_logp_R = out.trained(out.batch.annotations["ref_logp"])
            loss_R = loss_R + out.label("kl_coef")[0] * kl_estimate(logp_R, ref_logp_R, algorithm.kl_estimator)
        if algorithm.entropy_coef > 0:
            loss_R = loss_R - algorithm.entropy_coef * out.entropies
        stats.add({"policy/entropy": out.entropies, "mismatch/correction_mean": weights_R})
        self._measure(out, logp_R.detach(), old_logp_R, rollout_logp_R, advantages_R, stats)
        return aggregate(
            loss_R,
            out.row.response_lens,
            algorithm.loss_aggregation,
            max_len=self.max_new_tokens,
            total_tokens=out.minibatch.total_tokens,
            total_sequences=out.minibatch.total_sequences,
        )

    def _surrogate(
        self, logp_R: torch.Tensor, old_logp_R: torch.Tensor, advantages_R: torch.Tensor, lens_B: torch.Tensor
    ) -> torch.Tensor:
        algorithm = self.algorithm
        clips = {"clip_low": algorithm.clip_low, "clip_high": algorithm.clip_high}
        match algorithm.loss:
            case "ppo_clip":
                return policy_losses.ppo_clip(logp_R, old_logp_R, advantages_R, **clips, dual_clip=algorithm.dual_clip)
            case "gspo":
                return policy_losses.gspo(logp_R, old_logp_R, advantages_R, lens_B, **clips)
            case "cispo":
                return policy_losses.cispo(logp_R, old_logp_R, advantages_R, **clips)
            case "reinforce":
                return policy_losses.reinforce(logp_R, advantages_R)
        assert self.own is not None, "the configuration knows its losses"
        return own_result(self.own(logp_R, old_logp_R, advantages_R, lens_B), algorithm.loss, logp_R)

    def _correction(self, out: Outputs, old_logp_R: torch.Tensor, rollout_logp_R: torch.Tensor) -> torch.Tensor:
        correction = self.algorithm.correction
        if correction.mode == "none":
            return torch.ones_like(old_logp_R)
        return importance_weights(
            old_logp_R,
            rollout_logp_R,
            out.row.response_lens,
            level=correction.level,
            mode=correction.mode,
            cap=correction.cap,
            floor=correction.floor,
        )

    def _measure(
        self,
        out: Outputs,
        logp_R: torch.Tensor,
        old_logp_R: torch.Tensor,
        rollout_logp_R: torch.Tensor,
        advantages_R: torch.Tensor,
        stats: Stats,
    ) -> None:
        log_ratio_R = logp_R - old_logp_R
        if self.algorithm.loss == "gspo":
            lens_B = out.row.response_lens
            log_ratio_R = torch.repeat_interleave(mean_per_sample(log_ratio_R, lens_B), lens_B)
        ratio_R = log_ratio_R.clamp(-policy_losses.MAX_LOG_RATIO, policy_losses.MAX_LOG_RATIO).exp()
        low_R, high_R = ratio_R < 1 - self.algorithm.clip_low, ratio_R > 1 + self.algorithm.clip_high
        if self.algorithm.loss in ("ppo_clip", "gspo"):
            stats.add({"policy/clip_fraction": (low_R & (advantages_R < 0)) | (high_R & (advantages_R > 0))})
        elif self.algorithm.loss == "cispo":
            stats.add({"policy/clip_fraction": low_R | high_R})
        mismatch_R = old_logp_R - rollout_logp_R
        stats.add(
            {
                "policy/ratio": ratio_R,
                "policy/kl_step": kl_estimate(old_logp_R, logp_R, "k3"),
                "mismatch/logp_abs_mean": mismatch_R.abs(),
            }
        )
        stats.maximum({"mismatch/logp_abs_max": mismatch_R, "policy/ratio_deviation_max": ratio_R - 1})


def own_result(loss: object, spec: str, like_R: torch.Tensor) -> torch.Tensor:
    """What a user's loss returned, one number per token.

    Raises:
        UserError: it is something else.
    """
    if isinstance(loss, torch.Tensor) and loss.shape == like_R.shape:
        return loss
    shown = f"a tensor {list(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
    raise UserError(f"algorithm.loss: {spec} returned {shown}; it must return a tensor {list(like_R.shape)}, per token")
