"""Measurement on held-out rows: mean reward, pass@1 and pass@k, each with its standard error across prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.algorithms.evaluation import mean_and_standard_error, pass_at_k
from engine.config import Config
from engine.data.prompts import Prompt
from engine.roles import SamplingSettings, Workers
from engine.stages.experience import collect_groups, no_reward_error, sample_seeds
from engine.tracking.tracker import Tracker

SEED_STREAM = 2**31
"""Keeps evaluation seeds apart from those of training steps; every evaluation uses the same ones."""


def evaluate(
    config: Config, workers: Workers, tracker: Tracker, prompts: Sequence[Prompt], step: int
) -> dict[str, float]:
    """Answer held-out prompts with the current weights and score the answers.

    A sample whose reward failed counts in no estimate (`eval/dropped` counts them), and its prompt not in pass@k.
    Returns `eval/...` metrics; standard errors end in `_se`.

    Raises:
        UserError: no sample has a reward.
    """
    k = config.evaluation.samples_per_prompt
    settings = SamplingSettings(
        config.evaluation.temperature, config.rollout.max_new_tokens, tuple(config.rollout.stop)
    )
    groups = collect_groups(
        workers,
        tracker,
        prompts,
        [range(i * k, (i + 1) * k) for i in range(len(prompts))],
        [sample_seeds(config.seed, SEED_STREAM, i, count=k) for i in range(len(prompts))],
        settings,
    )
    scored = [group.scores.totals[group.kept()] for group in groups]
    counts = np.array([len(totals) for totals in scored])
    passed = np.array([int((totals >= config.evaluation.pass_threshold).sum()) for totals in scored])
    answered = counts > 0
    if not answered.any():
        raise no_reward_error(groups)
    reward, reward_se = mean_and_standard_error([float(totals.mean()) for totals in scored if len(totals)])
    metrics = {
        "eval/reward": reward,
        "eval/reward_se": reward_se,
        "eval/dropped": float(k * len(prompts) - counts.sum()),
        "eval/prompts": float(answered.sum()),
        "eval/response_length": float(np.mean([len(g.token_ids) for group in groups for g in group.generations])),
    }
    for size in sorted({1, k}):
        enough = counts >= size
        if enough.any():
            mean, error = pass_at_k(counts[enough], passed[enough], size)
            metrics |= {f"eval/pass@{size}": mean, f"eval/pass@{size}_se": error}
    tracker.event("evaluated", step=step, **metrics)
    return metrics
