"""A simulated run: nothing is lost, the bound holds, and times are what arithmetic says they are."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.simulation.lengths import Fixed, LogNormal
from engine.simulation.loop import simulate
from engine.simulation.scenario import Failures, Result, Setting
from tests.conftest import thorough
from tests.simulation.scenarios import COSTS, FREE, workload

OFTEN = Failures(per_hour=2.0, restart_s=60.0, budget=10_000)
VERY_OFTEN = Failures(per_hour=30.0, restart_s=5.0, budget=10_000)

small_runs = st.fixed_dictionaries(
    {
        "engines": st.integers(1, 5),
        "trainers": st.integers(1, 3),
        "max_staleness": st.integers(0, 3),
        "prompts_per_step": st.integers(1, 5),
        "samples_per_prompt": st.integers(1, 3),
        "checkpoint_every": st.integers(0, 3),
        "failing": st.booleans(),
        "seed": st.integers(0, 10**6),
    }
)


@settings(max_examples=60, deadline=None)
@given(run=small_runs)
def test_every_sample_is_accounted_for_and_no_token_is_too_old(run: dict) -> None:
    setting = Setting(run["engines"], run["trainers"], run["max_staleness"])
    sizes = {key: run[key] for key in ("prompts_per_step", "samples_per_prompt", "checkpoint_every")}
    failures = VERY_OFTEN if run["failing"] else None
    result = simulate(workload(steps=5, **sizes), setting, COSTS, failures=failures, seed=run["seed"])
    assert result.steps == 5
    assert result.admitted == result.trained + sum(result.dropped.values()) + result.in_flight
    assert result.in_flight == 0, "no group starts that no step would take"
    steps = 5 + result.lost_steps
    assert (
        steps * setting_samples(sizes) <= result.trained <= (steps + result.trainer_failures) * setting_samples(sizes)
    )
    assert sum(result.staleness.values()) == pytest.approx(1.0)
    assert max(result.staleness) <= run["max_staleness"]
    assert 0 <= result.engines_idle < 1
    assert 0 <= result.trainers_idle < 1


def setting_samples(sizes: dict) -> int:
    return sizes["prompts_per_step"] * sizes["samples_per_prompt"]


@pytest.mark.parametrize("failures", [None, OFTEN])
def test_the_same_seed_gives_the_same_run(failures: Failures | None) -> None:
    setting = Setting(6, 2, max_staleness=2)
    first, again = (simulate(workload(), setting, COSTS, failures=failures, seed=5) for _ in range(2))
    assert first == again
    assert first != simulate(workload(), setting, COSTS, failures=failures, seed=6)


def fixed_step(engines: int, trainers: int) -> tuple[float, float]:
    """(generation and scoring, scoring passes and update) of 8 groups of 4 samples of 100 tokens, prompts of 52."""
    samples = 8 * 4 // engines
    reading = 8 // engines * 52 * COSTS.prefill_token_s
    per_step = COSTS.decode_step_s + samples * COSTS.decode_sample_s + samples * 52 * COSTS.decode_context_s
    growing = COSTS.decode_context_s * samples * 100 * 99 / 2
    tokens = 8 * (52 + 4 * 100) / trainers
    training = COSTS.update_s + tokens * (COSTS.forward_token_s + COSTS.train_token_s)
    return reading + 100 * per_step + growing + COSTS.reward_s, training


FIXED = workload(lengths=Fixed(100), prompt_tokens=52, scoring_passes=1, concurrent_samples=32, steps=20)


@pytest.mark.parametrize("setting", [Setting(4, 2), Setting(4, 4, turns=True)])
def test_a_synchronous_run_of_equal_lengths_takes_what_a_formula_says(setting: Setting) -> None:
    generate, train = fixed_step(setting.engines, setting.trainers)
    result = simulate(FIXED, setting, COSTS)
    assert result.seconds == pytest.approx(COSTS.publish_s + 20 * (generate + train + COSTS.publish_s))
    assert result.staleness == {0: 1.0}


def test_idle_shares_follow_from_the_same_formula() -> None:
    generate, train = fixed_step(4, 2)
    result = simulate(FIXED, Setting(4, 2), COSTS)
    both = COSTS.publish_s * 21
    assert result.engines_idle == pytest.approx(1 - (20 * (generate - COSTS.reward_s) + both) / result.seconds)
    assert result.trainers_idle == pytest.approx(1 - (20 * train + both) / result.seconds)


@pytest.mark.parametrize("train_token_s", [1e-5, 1e-4, 3e-3])
def test_an_asynchronous_step_takes_as_long_as_the_slower_of_the_two_roles(train_token_s: float) -> None:
    costs = replace(COSTS, train_token_s=train_token_s, forward_token_s=0.0, publish_s=0.0, reward_s=0.0)
    fixed = replace(FIXED, steps=60, concurrent_samples=8, recompute=False)
    generate = simulate(fixed, Setting(4, 2), replace(costs, train_token_s=0.0, update_s=0.0)).step_seconds
    train = costs.update_s + 8 * (52 + 4 * 100) / 2 * train_token_s
    result = simulate(fixed, Setting(4, 2, max_staleness=2), costs)
    assert result.seconds >= 60 * max(generate, train)
    assert result.step_seconds <= 1.05 * max(generate, train)


def mean_seconds(setting: Setting, seeds: int = 6, **changes: object) -> float:
    return float(np.mean([simulate(workload(**changes), setting, COSTS, seed=seed).seconds for seed in range(seeds)]))


@pytest.mark.parametrize(("engines", "trainers"), [(6, 2), (2, 6)])
def test_more_staleness_is_not_slower_on_average(engines: int, trainers: int) -> None:
    seconds = [mean_seconds(Setting(engines, trainers, k), recompute=False, steps=12) for k in (0, 1, 2, 4)]
    assert seconds == sorted(seconds, reverse=True)


def test_asynchronous_runs_gain_more_when_lengths_are_skewed() -> None:
    def gain(sigma: float) -> float:
        skewed = workload(lengths=LogNormal(800, sigma), steps=20)
        sync, ahead = (simulate(skewed, Setting(6, 2, k), COSTS).seconds for k in (0, 4))
        return sync / ahead

    assert gain(1.2) > gain(0.3) > 1.0


@pytest.mark.parametrize("setting", [Setting(4, 2), Setting(4, 2, max_staleness=2), Setting(4, 4, turns=True)])
def test_failures_cost_time_and_nothing_else(setting: Setting) -> None:
    steady = workload(lengths=Fixed(400), checkpoint_every=2, steps=12)
    whole = simulate(steady, setting, COSTS)
    broken = [simulate(steady, setting, COSTS, failures=VERY_OFTEN, seed=seed) for seed in range(12)]
    assert {(run.steps, run.trained_tokens) for run in broken} == {(whole.steps, whole.trained_tokens)}
    assert all(run.seconds >= whole.seconds for run in broken)
    assert all(run.seconds > whole.seconds for run in broken if run.trainer_failures)
    assert sum(run.trainer_failures for run in broken) > 2
    assert (sum(run.engine_failures for run in broken) > 2) == (not setting.turns)


def test_a_trainer_that_fails_costs_the_steps_since_the_checkpoint() -> None:
    def lost(every: int) -> int:
        runs = [
            simulate(workload(checkpoint_every=every, steps=20), Setting(1, 4), COSTS, failures=OFTEN, seed=seed)
            for seed in range(8)
        ]
        assert sum(run.trainer_failures for run in runs) > 4
        return sum(run.lost_steps for run in runs)

    assert lost(every=1) == 0
    assert lost(every=5) < lost(every=0)


def test_a_run_ends_where_more_fails_than_it_bears() -> None:
    result = simulate(workload(steps=100), Setting(6, 2), COSTS, failures=replace(OFTEN, budget=3))
    assert result.stopped
    assert result.engine_failures + result.trainer_failures == 4
    assert result.steps < 100
    assert result.admitted == result.trained + sum(result.dropped.values()) + result.in_flight


def test_a_run_without_costs_takes_no_time_and_still_trains_everything() -> None:
    result = simulate(workload(), Setting(2, 2, max_staleness=1), FREE)
    assert (result.seconds, result.steps, result.trained) == (0.0, 8, 8 * 8 * 4)


def test_turns_are_synchronous() -> None:
    with pytest.raises(ValueError, match="max_staleness must be 0"):
        Setting(4, 4, max_staleness=1, turns=True)


def of_size(accelerators: int, steps: int) -> Result:
    large = workload(
        lengths=LogNormal(8000, 1.0), max_new_tokens=31_000, concurrent_samples=64, samples_per_prompt=16, steps=steps
    )
    engines = accelerators * 3 // 4
    setting = Setting(engines, accelerators - engines, max_staleness=4)
    return simulate(replace(large, prompts_per_step=accelerators), setting, COSTS)


@pytest.mark.parametrize(("accelerators", "steps", "limit_s"), [(500, 5, 5.0), *thorough((10_000, 10, 60.0))])
def test_many_accelerators_are_simulated_in_little_time(accelerators: int, steps: int, limit_s: float) -> None:
    start = time.process_time()
    result = of_size(accelerators, steps)
    assert time.process_time() - start < limit_s
    assert result.trained == steps * accelerators * 16
    assert set(result.decisions.calls) >= {"Admission", "Fleet", "SampleLedger", "Staleness", "plan_microbatches"}
