"""The benchmarks run, in small, and their accounts are right."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_a_reward_function_that_often_fails_loses_no_sample_and_leaves_no_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    benchmark = load("reward_failures", monkeypatch)
    failures = benchmark.planned(400, benchmark.SHARES)
    outcome = benchmark.run(failures, workers=8, cost=0.02, timeout=0.4, retries=1)
    assert (outcome.trained, outcome.dropped) == (384, {"reward_error": 12, "reward_timeout": 4})
    assert outcome.incidents == {"reward_error": 24, "reward_timeout": 8}
    assert (outcome.wrong, outcome.processes_left) == (0, 0)


def test_the_scenario_of_many_accelerators_gains_from_staleness_in_small(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = load("scale", monkeypatch)
    turns, sync, ahead = benchmark.scaled(benchmark.workload(1.0, 4), [8], shares=[0.25], staleness=[0, 2])
    assert turns.over_turns == 1.0
    assert sync.over_separate == 1.0
    assert ahead.over_separate > 1.0
    assert ahead.result.trained == 4 * 8 * benchmark.RESPONSES_PER_ACCELERATOR
