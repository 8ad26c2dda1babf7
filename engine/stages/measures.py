"""What a step's samples are like: rewards and their components, lengths, turns, repetition."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.algorithms.evaluation import length_correlation
from engine.algorithms.repetition import repeated_fraction
from engine.roles import Generation
from engine.stages.experience import Group


def measures(groups: Sequence[Group]) -> dict[str, float]:
    """`reward/...` and `rollout/...` of all groups that a step has drawn; rewards before any normalisation."""
    generations = [g for group in groups for g in group.generations]
    totals = np.concatenate([group.scores.raw_totals[group.kept()] for group in groups])
    lengths_B = said_tokens(generations)
    metrics = {
        "reward/groups_without_signal": float(np.mean([not group.differs() for group in groups])),
        "rollout/prompts": float(len(groups)),
        "rollout/response_length": float(lengths_B.mean()),
        "rollout/truncated_fraction": float(np.mean([g.finish_reason == "length" for g in generations])),
        "rollout/repetition": float(np.mean(repetitions(generations))),
        "rollout/tokens": float(
            sum(len(group.prompt.token_ids) + len(g.token_ids) for group in groups for g in group.generations)
        ),
    }
    if any(g.messages for g in generations):
        metrics["rollout/turns"] = float(np.mean([len(g.turn_ends) for g in generations]))
        metrics["rollout/observed_fraction"] = 1 - lengths_B.sum() / sum(len(g.token_ids) for g in generations)
    if len(totals):
        metrics |= {"reward/mean": float(totals.mean()), "reward/std": float(totals.std())}
    for name, values_B in components(groups).items():
        if not np.isnan(values_B).all():
            metrics |= {
                f"reward/{name}/mean": float(np.nanmean(values_B)),
                f"reward/{name}/std": float(np.nanstd(values_B)),
                f"reward/{name}/length_correlation": length_correlation(values_B, lengths_B),
            }
    return metrics


def components(groups: Sequence[Group]) -> dict[str, np.ndarray]:
    """name -> [B] values of every component over all samples, group after group; NaN where it has none."""
    names = sorted({name for group in groups for name in group.scores.components})
    return {
        name: np.concatenate(
            [group.scores.components.get(name, np.full(group.scores.size, np.nan)) for group in groups]
        )
        for name in names
    }


def said_tokens(generations: Sequence[Generation]) -> np.ndarray:
    """[B] tokens of each response that the policy said itself."""
    return np.array([len(g.token_ids) - sum(g.observed) for g in generations])


def repetitions(generations: Sequence[Generation]) -> np.ndarray:
    """[B] share of each response that repeats itself (see `repeated_fraction`)."""
    return np.array([repeated_fraction(g.token_ids) for g in generations])
