"""Measurement on held-out rows: rewards of answers (mean, pass@1, pass@k) and perplexity, with standard errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from engine.algorithms.evaluation import mean_and_standard_error, pass_at_k
from engine.config import Config
from engine.data.batch import Batch
from engine.data.examples import Example, to_batch
from engine.data.prompts import Prompt
from engine.roles import Policy, SamplingSettings
from engine.stages.experience import Experience, no_reward_error, sample_seeds

EXAMPLES_PER_PASS = 256
"""Held-out rows are measured this many at a time."""
SEED_STREAM = 2**31
"""Keeps evaluation seeds apart from those of training steps; every evaluation uses the same ones."""


def evaluate_answers(config: Config, experience: Experience, prompts: Sequence[Prompt]) -> dict[str, float]:
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
    groups = experience.collect(
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
    names = sorted({name for group in groups for name in group.scores.components})
    for name in names if len(names) > 1 else []:
        values = [group.scores.components[name] for group in groups if name in group.scores.components]
        held = [float(np.nanmean(v)) for v in values if not np.isnan(v).all()]
        if held:
            metrics[f"eval/reward/{name}"], metrics[f"eval/reward/{name}_se"] = mean_and_standard_error(held)
    for size in sorted({1, k}):
        enough = counts >= size
        if enough.any():
            mean, error = pass_at_k(counts[enough], passed[enough], size)
            metrics |= {f"eval/pass@{size}": mean, f"eval/pass@{size}_se": error}
    return metrics


def evaluate_text(policy: Policy, examples: Sequence[Example], *, prefix: str) -> dict[str, float]:
    """Perplexity, mean negative log-likelihood (with its standard error across examples) and accuracy per token."""
    nll, hits, tokens = [], [], []
    for batch in passes(examples):
        logp_T, hits_T = policy.predictions(batch)
        nll.append(-batch.sum_per_sample(logp_T))
        hits.append(batch.sum_per_sample(hits_T))
        tokens.append(batch.response_lens)
    nll_B, tokens_B = np.concatenate(nll), np.concatenate(tokens)
    mean = nll_B.sum() / tokens_B.sum()
    residual_B = nll_B - mean * tokens_B  # of a ratio of sums
    error = float(np.sqrt((residual_B**2).sum() * len(nll_B) / max(1, len(nll_B) - 1)) / tokens_B.sum())
    return {
        f"{prefix}perplexity": float(np.exp(mean)),
        f"{prefix}nll": float(mean),
        f"{prefix}nll_se": error,
        f"{prefix}token_accuracy": float(np.concatenate(hits).sum() / tokens_B.sum()),
    }


def passes(examples: Sequence[Example]) -> Iterator[Batch]:
    """Examples as batches of moderate size, in order."""
    for start in range(0, len(examples), EXAMPLES_PER_PASS):
        yield to_batch([examples[i] for i in range(start, min(start + EXAMPLES_PER_PASS, len(examples)))])
