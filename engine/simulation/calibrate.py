"""Costs from the records of synchronous runs, and how well they foretell runs that they were not made from.

Every phase's time is linear in `Costs` once it is known who ran what together, and in a synchronous step that follows
from the lengths alone: an engine's samples begin in order as slots come free, a token per engine step each.

    time/rollout  =  decode_step * engine steps  +  decode_sample * tokens  +  decode_context * sum of contexts
                     +  prefill_token * tokens of prompts  +  reward                       (of the slowest engine)
    time/update, time/critic_update  =  update * updates  +  train_token * tokens of the fullest rank * epochs
    time/reference, time/old_logp, time/values  =  forward_token * tokens of the fullest rank
    time/publish  =  publish

Each is fitted by non-negative least squares of the relative errors. A run's first step is left out: caches are cold.
Costs that always appear together (every step has as many tokens as the last) cannot be told apart: give runs that
differ in lengths, in samples per step and in engines.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from engine.config import Config, UserError
from engine.config_file import load_config
from engine.schedule.balancing import plan_microbatches
from engine.schedule.costs import Costs
from engine.simulation.lengths import Recorded, recorded_steps
from engine.simulation.loop import simulate
from engine.simulation.scenario import Setting, Workload, computed_tokens, scoring_passes
from engine.tracking.jsonl import read_rows
from engine.tracking.run_folder import METRICS

ROUNDS = 5
"""Times that the slowest engine of each step is chosen anew under the last fit."""


@dataclass(frozen=True)
class Step:
    """A step of a run: its metrics, and the lengths of its samples, group after group."""

    metrics: dict[str, Any]
    lengths: list[int]
    prompts: list[int]


@dataclass(frozen=True)
class RecordedRun:
    """What a synchronous run left."""

    folder: Path
    config: Config
    steps: list[Step]

    @property
    def step_seconds(self) -> float:
        """Measured."""
        return float(np.mean([step.metrics["time/step"] for step in self.steps]))


def read_run(folder: Path) -> RecordedRun:
    """The steps of a run but the first.

    Raises:
        UserError: it is no `rl` run, was not synchronous, or recorded too little.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder}: is not the folder of a run: it has no {path.name}")
    raw = yaml.safe_load(path.read_text())
    if raw.get("stage", "rl") != "rl" or raw.get("rl", {}).get("max_staleness", 0) > 0:
        raise UserError(f"{folder}: costs are fitted to synchronous runs: stage: rl with rl.max_staleness: 0")
    config = load_config(path)
    assert isinstance(config, Config), "a run's folder holds one stage"
    lengths = recorded_steps(folder)
    rows = [row for row in read_rows(folder / METRICS) if "time/step" in row and row["step"] in lengths]
    if len(rows) < 2:
        raise UserError(f"{folder}: holds fewer than two whole steps; the first is never measured")
    return RecordedRun(folder, config, [Step(row, *lengths[row["step"]]) for row in rows[1:]])


def fit(runs: Sequence[RecordedRun]) -> Costs:
    """The costs under which the phases of these runs take what they took."""
    steps = [(run.config, step) for run in runs for step in run.steps]
    decode = _fit_rollouts(steps)
    updates, passes = [], []
    for config, step in steps:
        for key in ("time/update", "time/critic_update"):
            if key in step.metrics:
                tokens = _fullest(step, config, config.policy.ranks) * config.rl.epochs_per_step
                updates.append(([config.updates_per_step, tokens], step.metrics[key]))
        passes += [
            ([_fullest(step, config, ranks)], step.metrics[f"time/{name}"])
            for name, ranks in scoring_passes(config).items()
            if f"time/{name}" in step.metrics
        ]
    update_s, train_token_s = nonnegative_fit(updates, 2)
    publish = [step.metrics["time/publish"] for _, step in steps if "time/publish" in step.metrics]
    return Costs(
        decode_step_s=decode[0],
        decode_sample_s=decode[1],
        decode_context_s=decode[2],
        prefill_token_s=decode[3],
        forward_token_s=nonnegative_fit(passes, 1)[0],
        train_token_s=train_token_s,
        update_s=update_s,
        publish_s=float(np.mean(publish)) if publish else 0.0,
        reward_s=decode[4],
    )


def predict(run: RecordedRun, costs: Costs) -> float:
    """Seconds of a step of this run, from its configuration and the lengths that it drew."""
    prompts = [n for step in run.steps for n in step.prompts]
    workload = Workload.of(
        run.config,
        Recorded(tuple(n for step in run.steps for n in step.lengths)),
        prompt_tokens=round(float(np.mean(prompts))),
        steps=max(20, len(run.steps)),
    )
    return simulate(workload, setting_of(run.config), costs).step_seconds


def setting_of(config: Config) -> Setting:
    """How a configuration uses accelerators: one for each engine and each rank of the policy."""
    return Setting(config.rollout.engines, config.policy.ranks, turns=config.placement.mode == "turns")


@dataclass(frozen=True)
class Check:
    """A run's step as measured, and as predicted from the other runs (from itself, where it is the only one)."""

    folder: str
    measured: float
    predicted: float


def checks(runs: Sequence[RecordedRun]) -> list[Check]:
    """Each run against the costs that the others give."""
    found = []
    for run in runs:
        others = [other for other in runs if other is not run] or [run]
        found.append(Check(str(run.folder), run.step_seconds, predict(run, fit(others))))
    return found


def nonnegative_fit(rows: Sequence[tuple[Sequence[float], float]], unknowns: int) -> list[float]:
    """argmin over x >= 0 of the sum of ((features @ x - seconds) / seconds)^2; without rows, zeros.

    Exact: the best of the ordinary least squares over all sets of unknowns whose solution is not negative.
    """
    best = np.zeros(unknowns)
    rows = [(features, seconds) for features, seconds in rows if seconds > 0]
    if not rows:
        return best.tolist()
    features_RU = np.array([np.array(features) / seconds for features, seconds in rows])
    scale_U = np.maximum(np.linalg.norm(features_RU, axis=0), 1e-300)
    error = float(len(rows))
    for count in range(1, unknowns + 1):
        for chosen in map(list, itertools.combinations(range(unknowns), count)):
            x, *_ = np.linalg.lstsq(features_RU[:, chosen] / scale_U[chosen], np.ones(len(rows)), rcond=1e-9)
            squares = float(((features_RU[:, chosen] / scale_U[chosen] @ x - 1) ** 2).sum())
            if (x >= 0).all() and squares < error * (1 - 1e-9):
                best, error = np.zeros(unknowns), squares
                best[chosen] = x / scale_U[chosen]
    return best.tolist()


def _fit_rollouts(steps: Sequence[tuple[Config, Step]]) -> list[float]:
    """Of the features of `_engine_features`; which engine was the slowest depends on the result, so it is repeated."""
    shares = [_engine_features(config, step) for config, step in steps]
    costs = [1.0, 0.0, 0.0, 0.0, 0.0]
    for _ in range(ROUNDS):
        slowest = [max(engines, key=_seconds_under(costs)) for engines in shares]
        rows = [(own, step.metrics["time/rollout"]) for own, (_, step) in zip(slowest, steps, strict=True)]
        costs = nonnegative_fit(rows, len(costs))
    return costs


def _seconds_under(costs: Sequence[float]) -> Callable[[Sequence[float]], float]:
    return lambda features: float(np.dot(costs, features))


def _engine_features(config: Config, step: Step) -> list[list[float]]:
    """For each engine that had samples: engine steps, tokens, sum over steps of the context, tokens of prompts, 1."""
    size = config.rl.samples_per_prompt
    groups = [slice(i, i + size) for i in range(0, len(step.lengths), size)]
    shares: list[list[slice]] = [[] for _ in range(config.rollout.engines)]
    least = [(0, engine) for engine in range(len(shares))]  # most tokens that each may have to make: see rollout_group
    for group in groups:
        tokens, engine = least[0]
        heapreplace(least, (tokens + size * config.rollout.max_new_tokens + step.prompts[group][0], engine))
        shares[engine].append(group)
    found = []
    for share in filter(None, shares):
        lengths = [n for group in share for n in step.lengths[group]]
        prompts = [n for group in share for n in step.prompts[group]]
        contexts = sum(prompt * n + n * (n - 1) / 2 for prompt, n in zip(prompts, lengths, strict=True))
        read = sum(step.prompts[group][0] for group in share)  # the others of a group find it in the prefix cache
        found.append([_engine_steps(lengths, config.rollout.concurrent_samples), sum(lengths), contexts, read, 1.0])
    return found


def _engine_steps(lengths: Sequence[int], slots: int) -> float:
    """Until the last sample ends, when each begins in order as a slot comes free."""
    ends = [0] * slots
    heapify(ends)
    for length in lengths:
        heapreplace(ends, ends[0] + length)
    return float(max(ends))


def _fullest(step: Step, config: Config, ranks: int) -> int:
    """Tokens of the rank that has most."""
    samples = config.rl.samples_per_prompt
    lens = [computed_tokens(prompt, n, samples) for prompt, n in zip(step.prompts, step.lengths, strict=True)]
    plan = plan_microbatches(lens, ranks=ranks, token_budget=sum(lens))
    return max(sum(lens[i] for micro in share for i in micro) for share in plan)
