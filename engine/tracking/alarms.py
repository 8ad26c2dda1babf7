"""Alarms of reward hacking: the reward goes up for the wrong reasons, or teaches nothing any more.

    metrics of each step --> blocks of `WINDOW` steps --> compared with the first, or the best, block --> alarms
    metrics of each evaluation ----------------------> compared with the best evaluation -----------^

A change counts when Welch's t between the steps of two blocks is at least `SURE`, so that noise alone raises next to
nothing; but for saturation, two changes are needed at once: the reward rose while something else went wrong. More of
every component is taken to be better, less where its weight is negative. An alarm is raised once, and again only
after it has cleared in between. Pure: numbers in, alarms out.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

WINDOW = 10
"""Steps of a block."""
SURE = 5.0
"""Welch's t that a change must have: high enough for the best of many blocks to be compared with the last."""
SURE_HELD_OUT = 3.0
"""Standard errors that a held-out measure must have lost."""
SATURATED = 0.8
"""Share of groups without signal."""
LONGER = 1.5
"""Factor by which the mean response has grown, or shrunk."""
REPEATS = 0.1
"""What the repeated share of responses has gained."""
_REWARD = "reward/mean"
_LENGTH = "rollout/response_length"
_REPETITION = "rollout/repetition"
_SILENT = "reward/groups_without_signal"
_HELD_OUT = "held_out_falls"

Block = dict[str, list[float]]
"""Metric -> its values at the steps of the block that have it."""


@dataclass(frozen=True)
class Alarm:
    """Something that a person should look at."""

    kind: str
    """saturated_groups, held_out_falls, check_falls, length_drift, repetition_drift, dominating_component or
    judge_disagreement."""
    subject: str
    """The metric, or metrics, that it is about."""
    message: str
    """What happened, since when, and what to do."""


class RewardAlarms:
    """Watches a run of reinforcement learning."""

    def __init__(self, weights: Mapping[str, float], judges: Collection[str]) -> None:
        """`weights` of all components by name; `judges` are those that a model gives."""
        self._weights = {f"reward/{name}/mean": weight for name, weight in weights.items()}
        self._judges = {f"reward/{name}/mean" for name in judges}
        self._steps = 0
        self._open: Block = {}
        self._blocks: list[Block] = []
        self._evaluations: list[dict[str, Any]] = []
        self._active: set[str] = set()

    def step(self, metrics: Mapping[str, float]) -> list[Alarm]:
        """Take in the metrics of a step; what they raise, at the end of each block."""
        for name in (_REWARD, _LENGTH, _REPETITION, _SILENT, *self._weights):
            if name in metrics:
                self._open.setdefault(name, []).append(float(metrics[name]))
        self._steps += 1
        if self._steps % WINDOW:
            return []
        self._blocks.append(self._open)
        self._open = {}
        return self._new(list(self._judge_block()), held_out=False)

    def evaluation(self, metrics: Mapping[str, float]) -> list[Alarm]:
        """Take in held-out measures; those without a standard error (`..._se`) are left out."""
        measures = {name: [value, metrics[f"{name}_se"]] for name, value in metrics.items() if f"{name}_se" in metrics}
        self._evaluations.append({"measures": measures, "block": len(self._blocks)})
        return self._new(list(self._judge_evaluation()), held_out=True)

    def state_dict(self) -> dict[str, Any]:
        """All that it has seen and raised, as plain JSON."""
        return {
            "steps": self._steps,
            "open": self._open,
            "blocks": self._blocks,
            "evaluations": self._evaluations,
            "active": sorted(self._active),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self._steps = state["steps"]
        self._open = {name: list(values) for name, values in state["open"].items()}
        self._blocks = list(state["blocks"])
        self._evaluations = list(state["evaluations"])
        self._active = set(state["active"])

    def _new(self, alarms: Sequence[Alarm], *, held_out: bool) -> list[Alarm]:
        """Those that were not active; of the same source, those that are not there any more have cleared."""
        now = {f"{alarm.kind} {alarm.subject}": alarm for alarm in alarms}
        others = {name for name in self._active if name.startswith(f"{_HELD_OUT} ") != held_out}
        new = [alarm for name, alarm in now.items() if name not in self._active]
        self._active = others | set(now)
        return new

    def _judge_block(self) -> Iterator[Alarm]:
        silent = self._blocks[-1].get(_SILENT)
        if silent and np.mean(silent) >= SATURATED:
            yield Alarm(
                "saturated_groups",
                _SILENT,
                f"{np.mean(silent):.0%} of the groups of the last {WINDOW} steps have equal rewards and teach "
                "nothing; take harder (or easier) prompts, dynamic sampling, or a finer reward",
            )
        if len(self._blocks) > 1:
            yield from self._drifts()
            yield from self._falls()
            yield from self._disagreements()

    def _drifts(self) -> Iterator[Alarm]:
        """Length and repetition against the first block, while the reward has risen."""
        first, last = self._blocks[0], self._blocks[-1]
        if _change(first, last, _REWARD) < SURE:
            return
        before, after = _mean(first, _LENGTH), _mean(last, _LENGTH)
        factor = max(before, after) / max(min(before, after), 1.0)
        if factor >= LONGER and abs(_change(first, last, _LENGTH)) >= SURE:
            yield Alarm(
                "length_drift",
                _LENGTH,
                f"as the reward rose, responses went from {before:.0f} to {after:.0f} tokens; see "
                "reward/*/length_correlation, read samples, and consider a `length` reward or an aggregation of the "
                "loss without length bias",
            )
        before, after = _mean(first, _REPETITION), _mean(last, _REPETITION)
        if after - before >= REPEATS and _change(first, last, _REPETITION) >= SURE:
            yield Alarm(
                "repetition_drift",
                _REPETITION,
                f"as the reward rose, the repeated share of responses went from {before:.2f} to {after:.2f}; read "
                "samples, and consider a `repetition` reward or a larger KL",
            )

    def _falls(self) -> Iterator[Alarm]:
        """Components that fell from their best block on, while the reward rose."""
        last = self._blocks[-1]
        for name, weight in self._weights.items():
            sign = -1.0 if weight < 0 else 1.0
            having = [block for block in self._blocks if name in block]
            if name not in last:
                continue
            best = max(having, key=lambda block: sign * _mean(block, name))
            if sign * _change(best, last, name) > -SURE or _change(best, last, _REWARD) < SURE:
                continue
            change = f"{name} went from {_mean(best, name):.3g} to {_mean(last, name):.3g}"
            if weight == 0:
                yield Alarm(
                    "check_falls",
                    name,
                    f"the reward rose while {change}, which is measured and not rewarded; the policy may be gaming the "
                    "reward: read samples, and give the check a weight or make it a gate",
                )
                continue
            gains = {
                other: factor * (_mean(last, other) - _mean(best, other))
                for other, factor in self._weights.items()
                if other != name and other in last and other in best
            }
            if not gains:
                continue
            winner = max(gains, key=lambda other: gains[other])
            yield Alarm(
                "dominating_component",
                winner,
                f"{winner} makes the reward rise while {change}: it pays better; lower its weight, clip it, normalise "
                "(rewards.normalize: group), or make the other a gate",
            )

    def _disagreements(self) -> Iterator[Alarm]:
        """A model's opinion that rose while a rule's verdict fell, since the first block."""
        first, last = self._blocks[0], self._blocks[-1]
        changes = {name: _change(first, last, name) for name in self._weights}
        for judge in sorted(self._judges):
            for rule in sorted(changes.keys() - self._judges):
                if changes[judge] >= SURE and changes[rule] <= -SURE:
                    yield Alarm(
                        "judge_disagreement",
                        f"{judge} and {rule}",
                        f"since the start {judge} rose and {rule} fell: the policy has learned to please the model and "
                        "not the rule; read samples, make the rule a gate, or ask a stronger judge",
                    )

    def _judge_evaluation(self) -> Iterator[Alarm]:
        """Held-out measures that fell from their best evaluation on, while the training reward rose."""
        if not self._blocks:
            return
        last = self._evaluations[-1]
        for name, (value, error) in last["measures"].items():
            weight = self._weights.get(f"{name.removeprefix('eval/')}/mean", 1.0)
            sign = -1.0 if weight < 0 else 1.0
            seen = [evaluation for evaluation in self._evaluations[:-1] if name in evaluation["measures"]]
            if not seen:
                continue
            best = max(seen, key=lambda evaluation: sign * evaluation["measures"][name][0])
            best_value, best_error = best["measures"][name]
            lost = sign * (best_value - value)
            then = self._blocks[max(0, best["block"] - 1)]
            if (
                lost > SURE_HELD_OUT * math.hypot(error, best_error)
                and _change(then, self._blocks[-1], _REWARD) >= SURE
            ):
                yield Alarm(
                    _HELD_OUT,
                    name,
                    f"the training reward rose while held-out {name.removeprefix('eval/')} went from {best_value:.3g} "
                    f"to {value:.3g} (standard error {error:.2g}): over-fitting or reward hacking; read samples, stop "
                    "earlier, or raise the KL",
                )


def _mean(block: Block, name: str) -> float:
    return float(np.mean(block[name])) if name in block else math.nan


def _change(before: Block, after: Block, name: str) -> float:
    """Welch's t of the change of a metric's mean; infinite for a change without any spread.

    0 where a block has fewer than two values of it.
    """
    old, new = before.get(name, []), after.get(name, [])
    if min(len(old), len(new)) < 2:
        return 0.0
    change = float(np.mean(new) - np.mean(old))
    error = math.sqrt(np.var(old, ddof=1) / len(old) + np.var(new, ddof=1) / len(new))
    if error < 1e-12 * max(1.0, abs(change)):
        return 0.0 if abs(change) < 1e-9 else math.copysign(math.inf, change)
    return change / error
