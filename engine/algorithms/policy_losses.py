"""Policy-gradient losses, per token.

Legend: T response tokens of all samples, one sample after the other; B samples, `seq_lens [B]` tokens each.
Every function returns the loss [T] to be minimised; only `logp_T` receives a gradient. Log-ratios are clamped to
[-20, 20] before exp, so that loss and gradient stay finite; beyond that the ratio has gradient 0. Where the ratio
is 1, the gradient is that of `reinforce`.
"""

from __future__ import annotations

import torch

from engine.algorithms.aggregate import Lengths, checked_lens, mean_per_sample

MAX_LOG_RATIO = 20.0


def ppo_clip(
    logp_T: torch.Tensor,
    old_logp_T: torch.Tensor,
    advantages_T: torch.Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> torch.Tensor:
    """[T] PPO's clipped surrogate (Schulman et al. 2017, arXiv:1707.06347): -min(ratio A, clip(ratio) A).

    Args:
        logp_T: [T] log-probs under the policy in training.
        old_logp_T: [T] log-probs under the policy that the update started from.
        advantages_T: [T].
        clip_low: the ratio is clipped below at 1 - clip_low.
        clip_high: the ratio is clipped above at 1 + clip_high ("clip-higher", DAPO, arXiv:2503.14476).
        dual_clip: where A < 0, the loss is at most dual_clip * |A| (Ye et al. 2019, arXiv:1912.09729); None is off.

    Raises:
        ValueError: for a dual_clip that is not above 1, or inputs of different sizes.
    """
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip must be above 1, not {dual_clip}")
    advantages_T = advantages_T.detach()
    ratio_T = _ratio(logp_T - _same_size(logp_T, old_logp_T, advantages_T).detach())
    loss_T = _clipped_surrogate(ratio_T, advantages_T, clip_low, clip_high)
    if dual_clip is not None:
        loss_T = torch.where(advantages_T < 0, torch.minimum(loss_T, -dual_clip * advantages_T), loss_T)
    return loss_T


def gspo(
    logp_T: torch.Tensor,
    old_logp_T: torch.Tensor,
    advantages_T: torch.Tensor,
    seq_lens: Lengths,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> torch.Tensor:
    """[T] GSPO-token (Zheng et al. 2025, arXiv:2507.18071): PPO's surrogate with one ratio value per sample.

    s = exp(mean over the sample of logp - old_logp); ratio_t = sg[s] * exp(logp_t - sg[logp_t]), so that each token
    keeps its own gradient and advantage. The 1/|y| of the paper belongs to the aggregation ("seq-mean-token-mean").

    Args:
        logp_T: [T] log-probs under the policy in training.
        old_logp_T: [T] log-probs under the policy that the update started from.
        advantages_T: [T].
        seq_lens: [B] tokens of each sample.
        clip_low: the ratio is clipped below at 1 - clip_low.
        clip_high: the ratio is clipped above at 1 + clip_high.

    Raises:
        ValueError: for inputs of different sizes, or lengths that do not add up to T.
    """
    lens_B = checked_lens(seq_lens, logp_T)
    log_ratio_T = logp_T.detach() - _same_size(logp_T, old_logp_T, advantages_T).detach()
    sample_log_ratio_T = torch.repeat_interleave(mean_per_sample(log_ratio_T, lens_B), lens_B)
    ratio_T = _ratio(sample_log_ratio_T + (logp_T - logp_T.detach()))
    return _clipped_surrogate(ratio_T, advantages_T.detach(), clip_low, clip_high)


def cispo(
    logp_T: torch.Tensor,
    old_logp_T: torch.Tensor,
    advantages_T: torch.Tensor,
    *,
    clip_low: float = 1.0,
    clip_high: float = 0.28,
) -> torch.Tensor:
    """[T] CISPO (MiniMax-M1, 2025, arXiv:2506.13585): -sg[clamp(ratio, 1 - clip_low, 1 + clip_high)] A logp.

    The ratio is a bounded weight, so no token loses its gradient to clipping.

    Args:
        logp_T: [T] log-probs under the policy in training.
        old_logp_T: [T] log-probs under the policy that the update started from.
        advantages_T: [T].
        clip_low: the weight is at least 1 - clip_low; 1.0 sets no lower bound.
        clip_high: the weight is at most 1 + clip_high.

    Raises:
        ValueError: for inputs of different sizes.
    """
    ratio_T = _ratio((logp_T - _same_size(logp_T, old_logp_T, advantages_T)).detach())
    return -ratio_T.clamp(1 - clip_low, 1 + clip_high) * advantages_T.detach() * logp_T


def reinforce(logp_T: torch.Tensor, advantages_T: torch.Tensor) -> torch.Tensor:
    """[T] the score-function estimator (Williams 1992, doi:10.1007/BF00992696): -A logp.

    Args:
        logp_T: [T] log-probs under the policy in training, which also made the samples.
        advantages_T: [T].

    Raises:
        ValueError: for inputs of different sizes.
    """
    return -_same_size(logp_T, advantages_T).detach() * logp_T


def _ratio(log_ratio_T: torch.Tensor) -> torch.Tensor:
    return log_ratio_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _clipped_surrogate(
    ratio_T: torch.Tensor, advantages_T: torch.Tensor, clip_low: float, clip_high: float
) -> torch.Tensor:
    return torch.maximum(-advantages_T * ratio_T, -advantages_T * ratio_T.clamp(1 - clip_low, 1 + clip_high))


def _same_size(logp_T: torch.Tensor, first: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """`first`, after a check that nothing would be broadcast."""
    for other in (first, *others):
        if other.shape != logp_T.shape:
            raise ValueError(f"one number per token is needed: {list(other.shape)} for {list(logp_T.shape)}")
    return first
