"""Alarms of reward hacking: each planted case raises its own, once; noise and honest learning raise none."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from engine.tracking.alarms import WINDOW, Alarm, RewardAlarms

STEPS = 60
RISING = np.linspace(0.2, 0.8, STEPS)
FALLING = RISING[::-1]
FLAT = np.full(STEPS, 0.5)


def steps(noise: float = 0.03, seed: int = 0, **metrics: Any) -> list[dict[str, float]]:
    """One row of metrics per step; `reward=...`, `length=...` and the like by short names, components by theirs."""
    names = {
        "reward": "reward/mean",
        "length": "rollout/response_length",
        "repetition": "rollout/repetition",
        "silent": "reward/groups_without_signal",
    }
    given = {"length": np.full(STEPS, 50.0), "repetition": np.full(STEPS, 0.1), "silent": np.full(STEPS, 0.2)} | metrics
    random = np.random.default_rng(seed)
    rows: list[dict[str, float]] = [{} for _ in range(STEPS)]
    for name, values in given.items():
        around = random.normal(size=STEPS) * noise * max(1.0, float(np.mean(values)))
        for row, value in zip(rows, np.asarray(values) + around, strict=True):
            row[names.get(name, f"reward/{name}/mean")] = float(value)
    return rows


def watch(rows: list[dict[str, float]], weights: dict[str, float], judges: tuple[str, ...] = ()) -> list[Alarm]:
    alarms = RewardAlarms(weights, judges)
    return [alarm for row in rows for alarm in alarms.step(row)]


def kinds(alarms: list[Alarm]) -> list[tuple[str, str]]:
    return [(alarm.kind, alarm.subject) for alarm in alarms]


ONE = {"right": 1.0}
PLANTED: dict[str, tuple[dict[str, Any], dict[str, float], tuple[str, ...], tuple[str, str]]] = {
    "groups whose rewards do not differ": (
        {"reward": FLAT, "silent": np.where(np.arange(STEPS) < 30, 0.3, 0.95)},
        ONE,
        (),
        ("saturated_groups", "reward/groups_without_signal"),
    ),
    "responses that grow with the reward": (
        {"reward": RISING, "right": RISING, "length": RISING * 100},
        ONE,
        (),
        ("length_drift", "rollout/response_length"),
    ),
    "responses that shrink with the reward": (
        {"reward": RISING, "right": RISING, "length": FALLING * 100},
        ONE,
        (),
        ("length_drift", "rollout/response_length"),
    ),
    "responses that repeat themselves": (
        {"reward": RISING, "right": RISING, "repetition": RISING},
        ONE,
        (),
        ("repetition_drift", "rollout/repetition"),
    ),
    "a check that is not rewarded falls": (
        {"reward": RISING, "right": RISING, "gold": FALLING},
        ONE | {"gold": 0.0},
        (),
        ("check_falls", "reward/gold/mean"),
    ),
    "a component that is given up for another": (
        {"reward": RISING, "style": RISING * 2, "right": FALLING},
        ONE | {"style": 1.0},
        (),
        ("dominating_component", "reward/style/mean"),
    ),
    "a penalty that is taken for the sake of another component": (
        {"reward": RISING, "right": RISING * 2, "filler": RISING},
        ONE | {"filler": -1.0},
        (),
        ("dominating_component", "reward/right/mean"),
    ),
    "a judge that is talked round": (
        {"reward": RISING, "judge": RISING, "right": FALLING},
        {"judge": 1.0, "right": 0.0},
        ("judge",),
        ("judge_disagreement", "reward/judge/mean and reward/right/mean"),
    ),
}


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_case_raises_its_alarm_once(case: str) -> None:
    metrics, weights, judges, expected = PLANTED[case]
    raised = kinds(watch(steps(**metrics), weights, judges))
    assert raised.count(expected) == 1
    beside = {("check_falls", "reward/right/mean")} if judges else set()  # the rule beside a judge is a check too
    assert set(raised) == {expected} | beside


def test_a_case_that_starts_late_is_seen_within_two_blocks() -> None:
    gold = np.concatenate([np.linspace(0.2, 0.8, STEPS // 2), np.linspace(0.8, 0.2, STEPS // 2)])
    alarms = RewardAlarms(ONE | {"gold": 0.0}, ())
    rows = steps(reward=RISING, right=RISING, gold=gold)
    at = [i + 1 for i, row in enumerate(rows) if alarms.step(row)]
    assert at == [50]


CLEAN: dict[str, dict[str, Any]] = {
    "nothing is learned": {"reward": FLAT, "right": FLAT, "gold": FLAT},
    "everything gets better": {"reward": RISING, "right": RISING, "gold": RISING, "length": 50 + 10 * RISING},
    "the reward falls, and all else with it": {"reward": FALLING, "right": FALLING, "gold": FALLING},
    "responses grow and bring nothing": {"reward": FLAT, "right": FLAT, "length": RISING * 100},
    "responses are of any length, at the end longer": {
        "reward": RISING,
        "right": RISING,
        "length": np.where(np.arange(STEPS) % 10 < 5, 1.0, np.where(np.arange(STEPS) < 50, 199.0, 400.0)),
    },
    "responses repeat themselves a little more": {"reward": RISING, "right": RISING, "repetition": 0.1 + RISING / 8},
    "a component nobody has an opinion on": {"reward": RISING, "right": RISING},
}


@pytest.mark.parametrize("case", CLEAN)
def test_a_clean_run_raises_none(case: str) -> None:
    assert watch(steps(**CLEAN[case]), ONE | {"gold": 0.0}, ("gold",)) == []


@pytest.mark.parametrize("noise", [0.01, 0.1, 0.5])
def test_noise_around_honest_learning_raises_one_in_hundreds_of_runs(noise: float) -> None:
    weights = {"right": 1.0, "style": 0.5, "gold": 0.0}
    runs = (steps(noise, seed, reward=RISING, right=RISING, style=FLAT, gold=FLAT) for seed in range(200))
    assert sum(bool(watch(rows, weights, ("style",))) for rows in runs) <= 1


def test_an_alarm_that_has_cleared_can_be_raised_again() -> None:
    silent = np.repeat([0.9, 0.9, 0.1, 0.9, 0.9, 0.1], WINDOW)
    raised = watch(steps(noise=0.001, reward=FLAT, silent=silent), ONE)
    assert kinds(raised) == [("saturated_groups", "reward/groups_without_signal")] * 2
    assert "90% of the groups of the last 10 steps" in raised[0].message


def held_out(value: float, error: float = 0.01, name: str = "right") -> dict[str, float]:
    return {"eval/reward": 0.5, "eval/response_length": 9.0} | {
        f"eval/reward/{name}": value,
        f"eval/reward/{name}_se": error,
    }


def evaluated(values: list[float], rewards: np.ndarray, error: float = 0.01, weight: float = 1.0) -> list[Alarm]:
    """An evaluation after every block of the run, the first before any step."""
    alarms = RewardAlarms({"right": weight}, ())
    raised = alarms.evaluation(held_out(values[0], error))
    for number, value in enumerate(values[1:]):
        for row in steps(reward=rewards, seed=number)[number * WINDOW : (number + 1) * WINDOW]:
            raised += alarms.step(row)
        raised += alarms.evaluation(held_out(value, error))
    return raised


def test_a_held_out_measure_that_falls_while_the_reward_rises_raises_an_alarm_once() -> None:
    values = [0.4, 0.5, 0.6, 0.5, 0.4, 0.3]
    assert kinds(evaluated(values, RISING)) == [("held_out_falls", "eval/reward/right")]
    assert evaluated(values, FLAT) == [], "the reward has not risen"
    assert evaluated(values, RISING, error=0.2) == [], "within the standard errors"
    assert evaluated([0.4, 0.5, 0.6, 0.62, 0.61, 0.6], RISING) == []


def test_of_a_penalty_less_is_better() -> None:
    rising, falling = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    assert evaluated(falling, RISING, weight=-1.0) == []
    assert kinds(evaluated(rising, RISING, weight=-1.0)) == [("held_out_falls", "eval/reward/right")]


def test_the_end_of_a_block_leaves_the_alarms_of_evaluations_active() -> None:
    alarms = RewardAlarms({"right": 1.0}, ())
    rows = steps(reward=RISING)
    raised = alarms.evaluation(held_out(0.6))
    for i, row in enumerate(rows):
        raised += alarms.step(row)
        if i in (20, 21, 40, 41):
            raised += alarms.evaluation(held_out(0.3))
    assert kinds(raised) == [("held_out_falls", "eval/reward/right")]


@pytest.mark.parametrize("case", PLANTED)
def test_a_resumed_run_raises_what_the_unbroken_one_does(case: str) -> None:
    metrics, weights, judges, _ = PLANTED[case]
    rows = steps(**metrics)
    for cut in (3, 20, 37):
        first, second = (RewardAlarms(weights, judges) for _ in range(2))
        raised = [alarm for row in rows[:cut] for alarm in first.step(row)]
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        raised += [alarm for row in rows[cut:] for alarm in second.step(row)]
        assert raised == watch(rows, weights, judges)
