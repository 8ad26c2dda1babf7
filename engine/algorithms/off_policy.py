"""Importance weights between two log-probs of the same tokens: the trainer's and those that the rollout sampled with.

Legend: T response tokens of all samples, one sample after the other; B samples, `seq_lens [B]` tokens each.
"""

from __future__ import annotations

from typing import Literal

import torch

from engine.algorithms.aggregate import Lengths, checked_lens, mean_per_sample, sum_per_sample


@torch.no_grad()
def importance_weights(
    logp_T: torch.Tensor,
    rollout_logp_T: torch.Tensor,
    seq_lens: Lengths,
    *,
    level: Literal["token", "sequence", "geometric"] = "token",
    mode: Literal["truncate", "mask"] = "truncate",
    cap: float = 2.0,
    floor: float = 0.0,
) -> torch.Tensor:
    """[T] bounded weights for the per-token loss; they carry no gradient.

    Truncated importance sampling is Ionides 2008 (doi:10.1198/106186008X320456); masking is IcePop (arXiv:2510.18855).
    The geometric mean is the sequence ratio of GSPO (arXiv:2507.18071). At the two sample levels every token carries
    its sample's weight, bounded like any other.

    Args:
        logp_T: [T] the trainer's log-probs.
        rollout_logp_T: [T] log-probs under the distribution that the tokens were sampled from.
        seq_lens: [B] tokens of each sample.
        level: the ratio per "token", its product over the sample ("sequence"), or the per-token geometric mean of
            that product ("geometric").
        mode: "truncate" clamps into [floor, cap]; "mask" keeps a weight in [floor, cap], ends included, and makes
            any other 0.
        cap: upper bound.
        floor: lower bound.

    Raises:
        ValueError: for an unknown level or mode, floor > cap, or sizes that do not fit together.
    """
    if level not in ("token", "sequence", "geometric"):
        raise ValueError(f"level must be one of token, sequence, geometric, not {level!r}")
    if mode not in ("truncate", "mask"):
        raise ValueError(f"mode must be one of truncate, mask, not {mode!r}")
    if floor > cap:
        raise ValueError(f"floor must not be above cap: {floor} > {cap}")
    if logp_T.shape != rollout_logp_T.shape:
        raise ValueError(f"one number per token is needed: {list(rollout_logp_T.shape)} for {list(logp_T.shape)}")
    lens_B = checked_lens(seq_lens, logp_T)
    log_ratio_T = logp_T - rollout_logp_T
    if level == "sequence":
        log_ratio_T = torch.repeat_interleave(sum_per_sample(log_ratio_T, lens_B), lens_B)
    elif level == "geometric":
        log_ratio_T = torch.repeat_interleave(mean_per_sample(log_ratio_T, lens_B), lens_B)
    weights_T = log_ratio_T.exp()
    if mode == "truncate":
        return weights_T.clamp(floor, cap)
    return weights_T.masked_fill((weights_T < floor) | (weights_T > cap), 0)
