"""Losses that train a policy on preferences directly, without a reward model.

Legend: N pairs (for `kto`: single answers). A log-prob of an answer is the sum over its tokens of the log-prob of
each, or, where the argument says `mean`, that sum divided by the number of its tokens. Every function returns the
loss [N] to be minimised; log-probs of the reference receive no gradient. Loss and gradient stay finite for extreme
finite inputs (the square of `ipo` as far as the dtype can hold it).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch.nn.functional import logsigmoid

DPOKind = Literal["sigmoid", "ipo", "hinge", "robust"]
DPO_KINDS = ("sigmoid", "ipo", "hinge", "robust")


def dpo(
    policy_chosen: torch.Tensor,
    policy_rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    *,
    beta: float = 0.1,
    kind: DPOKind = "sigmoid",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """[N] direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290) and its relatives.

    With m = (policy_chosen - policy_rejected) - (ref_chosen - ref_rejected) and e = label_smoothing:

    - "sigmoid": -(1 - e) logsigmoid(beta m) - e logsigmoid(-beta m); e > 0 is conservative DPO (Mitchell 2023,
      ericmitchell.ai/cdpo.pdf).
    - "robust": (-(1 - e) logsigmoid(beta m) + e logsigmoid(-beta m)) / (1 - 2 e), whose mean over labels that are
      flipped with probability e is the loss of the true labels (Chowdhury et al. 2024, arXiv:2403.00409).
    - "hinge": relu(1 - beta m) (SLiC-HF, Zhao et al. 2023, arXiv:2305.10425; RSO, Liu et al. 2023, arXiv:2309.06657).
    - "ipo": (m - 1 / (2 beta))^2 (Azar et al. 2023, arXiv:2310.12036); give it mean log-probs.

    Args:
        policy_chosen: [N] log-probs of the preferred answers under the policy in training.
        policy_rejected: [N] the same of the other answers.
        ref_chosen: [N] log-probs of the preferred answers under the reference.
        ref_rejected: [N] the same of the other answers.
        beta: strength of the pull to the reference, above 0.
        kind: "sigmoid", "ipo", "hinge" or "robust".
        label_smoothing: chance that a label is wrong, in [0, 0.5); for "sigmoid" and "robust" only.

    Raises:
        ValueError: for an unknown kind, a beta that is not positive, a label_smoothing out of range or where it does
            nothing, or inputs of different sizes.
    """
    if kind not in DPO_KINDS:
        raise ValueError(f"kind must be one of {', '.join(DPO_KINDS)}, not {kind!r}")
    _check_positive(beta=beta)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), not {label_smoothing}")
    if label_smoothing and kind not in ("sigmoid", "robust"):
        raise ValueError(f"label_smoothing has no meaning for kind {kind!r}: leave it at 0")
    _check_same_size(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    margin_N = (policy_chosen - policy_rejected) - (ref_chosen - ref_rejected).detach()
    if kind == "ipo":
        return (margin_N - 1 / (2 * beta)).square()
    if kind == "hinge":
        return torch.relu(1 - beta * margin_N)
    right_N, wrong_N = -logsigmoid(beta * margin_N), -logsigmoid(-beta * margin_N)
    if kind == "robust":
        return ((1 - label_smoothing) * right_N - label_smoothing * wrong_N) / (1 - 2 * label_smoothing)
    return (1 - label_smoothing) * right_N + label_smoothing * wrong_N


def kto(
    policy_logp: torch.Tensor,
    ref_logp: torch.Tensor,
    desirable: torch.Tensor,
    kl_baseline: torch.Tensor | float,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> torch.Tensor:
    """[N] Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv:2402.01306): single answers, good or bad.

    With m = policy_logp - ref_logp - kl_baseline: desirable_weight (1 - sigmoid(beta m)) of a desirable answer,
    undesirable_weight (1 - sigmoid(-beta m)) of another.

    Args:
        policy_logp: [N] log-probs of the answers under the policy in training.
        ref_logp: [N] the same under the reference.
        desirable: [N] bool.
        kl_baseline: one number, at least 0: the estimate of KL(policy || reference) that the caller made, of the
            whole batch and from answers paired with other prompts. It receives no gradient.
        beta: strength of the pull to the reference, above 0.
        desirable_weight: weight of the desirable answers, at least 0.
        undesirable_weight: weight of the others, at least 0.

    Raises:
        ValueError: for a beta that is not positive, a negative weight, a kl_baseline that is not one number of at
            least 0, labels that are not bool, or inputs of different sizes.
    """
    _check_positive(beta=beta)
    if not (desirable_weight >= 0 and undesirable_weight >= 0):
        raise ValueError(f"weights must be at least 0, not {desirable_weight} and {undesirable_weight}")
    if desirable.dtype != torch.bool:
        raise ValueError(f"desirable must be bool, not {desirable.dtype}: a label of -1 would count as true")
    _check_same_size(policy_logp, ref_logp, desirable)
    baseline = _one_number(kl_baseline)
    if not 0 <= baseline < math.inf:
        raise ValueError(f"kl_baseline must be finite and at least 0, not {baseline}: clamp the estimate")
    margin_N = policy_logp - ref_logp.detach() - baseline
    shortfall_N = torch.sigmoid(beta * torch.where(desirable, -margin_N, margin_N))  # 1 - sigmoid(x) = sigmoid(-x)
    return torch.where(desirable, desirable_weight * shortfall_N, undesirable_weight * shortfall_N)


def orpo(chosen_mean_logp: torch.Tensor, rejected_mean_logp: torch.Tensor, *, beta: float = 0.1) -> torch.Tensor:
    """[N] the odds-ratio term of ORPO (Hong et al. 2024, arXiv:2403.07691); the likelihood term is the caller's.

    -beta logsigmoid(log-odds(chosen) - log-odds(rejected)), log-odds(x) = x - log(1 - exp(x)).

    Odds grow without bound as x nears 0, faster than the dtype resolves. An x above -eps (the dtype's machine
    epsilon, 1.2e-7 in float32), 0 and rounding errors above 0 included, has the log-odds, and their derivative, of
    -eps: 15.9 and 8.4e6 in float32. So a rejected answer whose every token is certain is still pushed down.

    Args:
        chosen_mean_logp: [N] mean log-probs per token of the preferred answers under the policy in training.
        rejected_mean_logp: [N] the same of the other answers.
        beta: weight of the term, above 0.

    Raises:
        ValueError: for a beta that is not positive, or inputs of different sizes.
    """
    _check_positive(beta=beta)
    _check_same_size(chosen_mean_logp, rejected_mean_logp)
    return -beta * logsigmoid(_log_odds(chosen_mean_logp) - _log_odds(rejected_mean_logp))


def simpo(
    chosen_mean_logp: torch.Tensor, rejected_mean_logp: torch.Tensor, *, beta: float = 2.0, gamma: float = 0.5
) -> torch.Tensor:
    """[N] SimPO (Meng et al. 2024, arXiv:2405.14734): -logsigmoid(beta (chosen - rejected) - gamma).

    Args:
        chosen_mean_logp: [N] mean log-probs per token of the preferred answers under the policy in training.
        rejected_mean_logp: [N] the same of the other answers.
        beta: scale of the reward, above 0.
        gamma: target margin, in units of the reward beta * log-prob (not as a multiple of beta).

    Raises:
        ValueError: for a beta that is not positive, or inputs of different sizes.
    """
    _check_positive(beta=beta)
    _check_same_size(chosen_mean_logp, rejected_mean_logp)
    return -logsigmoid(beta * (chosen_mean_logp - rejected_mean_logp) - gamma)


def _log_odds(logp_N: torch.Tensor) -> torch.Tensor:
    """x - log(1 - exp(x)) of min(x, -eps), with the gradient of the bound beyond it."""
    bounded_N = logp_N.detach().clamp(max=-torch.finfo(logp_N.dtype).eps)
    x_N = bounded_N + (logp_N - logp_N.detach())  # adds exactly 0; clamp itself would have gradient 0
    # Far from 0 this logarithm loses its relative precision, where it no longer counts beside x.
    return x_N - torch.log(-torch.expm1(x_N))


def _one_number(x: torch.Tensor | float) -> float:
    if not isinstance(x, torch.Tensor):
        return float(x)
    if x.numel() != 1:
        raise ValueError(f"kl_baseline must be one number for all answers, not {list(x.shape)}")
    return float(x.detach())


def _check_positive(*, beta: float) -> None:
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be positive and finite, not {beta}")


def _check_same_size(first: torch.Tensor, *others: torch.Tensor) -> None:
    for other in others:
        if other.shape != first.shape:
            raise ValueError(f"one number per answer is needed: {list(other.shape)} for {list(first.shape)}")
