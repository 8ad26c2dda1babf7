"""From the components of the rewards to one number per sample, over all groups of a step at once.

    raw --clip--> --gate--> --normalise--> --weight--> sum over the components that have an opinion

A closed gate makes 0 of every other component of its sample before anything is normalised. Normalising each component
in its group and summing then is GDPO (arXiv:2601.05242); summing and leaving the rest to the advantage is GRPO.
Legend: B samples of all groups, one group after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from engine.config import Config, Normalization
from engine.rewards.contract import FLOAT32_MAX, NO_REWARD, Scores, resolve_all

GROUP_EPS = 1e-6
"""Keeps the divisor away from 0, as in `group_relative`."""
ENVIRONMENT = "environment"
"""Name of the component that an environment's own rewards are."""


@dataclass(frozen=True)
class Component:
    """How one component enters the reward."""

    name: str
    weight: float = 1.0
    """0 measures only."""
    gate: bool = False
    """Where it is 0 or less, the sample's other components count 0."""
    clip: tuple[float, float] | None = None
    """Bounds of each value (of each step, where there are several)."""
    normalize: Normalization = "none"
    """By the mean and standard deviation of all that was seen so far (running), or of the group."""


def components_of(config: Config) -> list[Component]:
    """Every component of the reward, as configured.

    Raises:
        UserError: a reward function cannot be used as it is.
    """
    rewards = config.rewards
    components = [
        Component(f.name, f.weight, f.gate, entry.clip, entry.normalize or rewards.normalize)
        for f, entry in zip(resolve_all(rewards), rewards.functions, strict=True)
    ]
    components += [Component(m.name, m.weight, clip=m.clip, normalize=rewards.normalize) for m in rewards.models]
    if config.environment is not None:
        components.append(Component(ENVIRONMENT, config.environment.weight, normalize=rewards.normalize))
    return components


class Composition:
    """Composes rewards and keeps the running statistics."""

    def __init__(self, components: Sequence[Component]) -> None:
        self.components = list(components)
        self._seen: dict[str, list[float]] = {}

    def compose(self, groups: Sequence[Scores], *, learn: bool) -> list[Scores]:
        """The groups with `totals`, `raw_totals` and `step_rewards`.

        Without `learn` nothing is normalised and no statistic moves, so that evaluations can be compared.
        A sample that nobody has an opinion on is dropped as "no_reward", one whose sum is no 32-bit float as
        "reward_overflow".
        """
        sizes = [scores.size for scores in groups]
        group_ids = np.repeat(np.arange(len(groups)), sizes)
        cuts = np.cumsum(sizes)[:-1]
        dropped_B = np.concatenate([np.isin(np.arange(s.size), list(s.dropped)) for s in groups])
        clipped = {c.name: [_clipped(s, c) for s in groups] for c in self.components}
        by_name = {name: np.concatenate([values for values, _ in parts]) for name, parts in clipped.items()}
        closed_B = np.zeros(len(group_ids), bool)
        for component in self.components:
            if component.gate:
                closed_B |= by_name[component.name] <= 0
        totals_B, raw_B = np.zeros(len(group_ids)), np.zeros(len(group_ids))
        opinions_B = np.zeros(len(group_ids), bool)
        steps: list[list[np.ndarray | None]] = [[None] * size for size in sizes]
        for component in self.components:
            values_B = by_name[component.name]
            shut_B = closed_B & ~np.isnan(values_B) & (not component.gate)
            values_B = np.where(shut_B, 0.0, values_B)
            usable_B = ~np.isnan(values_B) & ~dropped_B
            scaled_B, scale_B = self._normalized(component, values_B, usable_B, group_ids, learn)
            opinions_B |= ~np.isnan(values_B)
            totals_B += component.weight * np.nan_to_num(scaled_B)
            raw_B += component.weight * np.nan_to_num(values_B)
            factors_B = np.where(shut_B, 0.0, component.weight / scale_B)
            parts = [held for _, held in clipped[component.name]]
            for collected, held, factors in zip(steps, parts, np.split(factors_B, cuts), strict=True):
                _add_steps(collected, held, factors)
        per_group = [np.split(values_B, cuts) for values_B in (totals_B, raw_B, opinions_B)]
        return [_finished(*held) for held in zip(groups, *per_group, steps, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Running statistics: name -> [count, mean, sum of squared differences]."""
        return {name: list(moments) for name, moments in self._seen.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self._seen = {name: list(moments) for name, moments in state.items()}

    def _normalized(
        self, component: Component, values_B: np.ndarray, usable_B: np.ndarray, group_ids: np.ndarray, learn: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """The values normalised, and what each was divided by."""
        ones_B = np.ones(len(values_B))
        if not learn or component.normalize == "none" or not usable_B.any():
            return values_B, ones_B
        if component.normalize == "group":
            scaled_B, scale_B = values_B.copy(), ones_B
            for group in np.unique(group_ids[usable_B]):
                members = usable_B & (group_ids == group)
                held = values_B[members]
                if np.ptp(held) > 0:
                    scale_B[members] = held.std(ddof=1) + GROUP_EPS
                    scaled_B[members] = (held - held.mean()) / scale_B[members]
                else:
                    scaled_B[members] = 0.0
            return scaled_B, scale_B
        count, mean, squares = self._seen.get(component.name, [0.0, 0.0, 0.0])
        for value in values_B[usable_B]:
            count += 1
            step = value - mean
            mean += step / count
            squares += step * (value - mean)
        self._seen[component.name] = [float(count), float(mean), float(squares)]
        deviation = float(np.sqrt(squares / (count - 1))) if count > 1 else 0.0
        return (values_B - mean) / (deviation or 1.0), ones_B * (deviation or 1.0)


def _clipped(scores: Scores, component: Component) -> tuple[np.ndarray, list[np.ndarray | None]]:
    """[B] float64 values and the steps behind them (None where there are none), within the component's bounds."""
    missing = np.full(scores.size, np.nan)
    values_B = scores.components.get(component.name, missing).astype(np.float64)
    steps = scores.steps.get(component.name, [None] * scores.size)
    if component.clip is None:
        return values_B, steps
    steps = [None if held is None else np.clip(held, *component.clip) for held in steps]
    sums = [np.nan if held is None else held.sum() for held in steps]
    return np.where(np.isnan(sums), np.clip(values_B, *component.clip), sums), steps


def _add_steps(collected: list[np.ndarray | None], held: list[np.ndarray | None], factors: np.ndarray) -> None:
    for i, (steps, factor) in enumerate(zip(held, factors, strict=True)):
        if steps is not None:
            before = collected[i]
            collected[i] = factor * steps + (0.0 if before is None else before)


def _finished(
    scores: Scores, totals: np.ndarray, raw: np.ndarray, opinions: np.ndarray, steps: list[np.ndarray | None]
) -> Scores:
    dropped = dict(scores.dropped)
    for position in range(scores.size):
        if not opinions[position]:
            dropped.setdefault(position, NO_REWARD)
        elif not max(abs(totals[position]), abs(raw[position])) <= FLOAT32_MAX:
            dropped.setdefault(position, "reward_overflow")
    missing_B = np.isin(np.arange(scores.size), list(dropped))
    totals_B, raw_B = (np.where(missing_B, np.nan, values).astype(np.float32) for values in (totals, raw))
    return replace(scores, totals=totals_B, raw_totals=raw_B, dropped=dict(sorted(dropped.items())), step_rewards=steps)
