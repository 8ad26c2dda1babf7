"""Costs are found again in the records of runs, and foretell other runs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import UserError
from engine.simulation.calibrate import checks, fit, nonnegative_fit, read_run
from tests.simulation.recorded import write_run
from tests.simulation.scenarios import COSTS


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    sizes = [(100, 2, 4), (600, 2, 4), (300, 3, 8), (1000, 1, 16)]
    return [
        write_run(tmp_path / f"run{i}", COSTS, mean=mean, seed=i, engines=engines, concurrent_samples=slots)
        for i, (mean, engines, slots) in enumerate(sizes)
    ]


def test_known_costs_are_found_again(folders: list[Path]) -> None:
    assert asdict(fit([read_run(folder) for folder in folders])) == pytest.approx(asdict(COSTS), rel=1e-3)


def test_a_run_is_foretold_from_others(folders: list[Path]) -> None:
    for check in checks([read_run(folder) for folder in folders]):
        assert check.predicted == pytest.approx(check.measured, rel=0.25), check.folder


def test_the_first_step_does_not_count(folders: list[Path]) -> None:
    run = read_run(folders[0])
    assert [step.metrics["step"] for step in run.steps] == [2, 3, 4, 5, 6]
    assert run.step_seconds < 30


@given(
    x=st.lists(st.just(0.0) | st.floats(1e-3, 10.0), min_size=3, max_size=3),
    rows=st.integers(6, 12),
    seed=st.integers(0, 1000),
)
def test_the_fit_is_exact_where_a_solution_without_negative_numbers_exists(
    x: list[float], rows: int, seed: int
) -> None:
    features = np.random.default_rng(seed).uniform(0.1, 1.0, (rows, 3))
    seconds = features @ x
    found = nonnegative_fit(list(zip(features.tolist(), seconds.tolist(), strict=True)), 3)
    assert min(found) >= 0
    assert features @ found == pytest.approx(seconds, rel=1e-6)


def test_a_cost_that_would_be_negative_is_zero() -> None:
    rows = [([1.0, 1.0], 2.0), ([1.0, 2.0], 1.9), ([1.0, 3.0], 1.8)]
    found = nonnegative_fit(rows, 2)
    assert found[1] == 0
    assert 1.8 < found[0] < 2.0


def test_a_folder_without_lengths_or_of_another_kind_is_refused(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not the folder of a run"):
        read_run(tmp_path)
    (folders[0] / "events.jsonl").write_text('{"kind": "run_started"}\n')
    with pytest.raises(UserError, match="has no event `consumed`"):
        read_run(folders[0])
    config = folders[1] / "config.yaml"
    config.write_text(config.read_text().replace("samples_per_prompt: 4", "samples_per_prompt: 4\n  max_staleness: 2"))
    with pytest.raises(UserError, match="costs are fitted to synchronous runs"):
        read_run(folders[1])
    metrics = folders[2] / "metrics.jsonl"
    metrics.write_text("\n".join(metrics.read_text().splitlines()[:1]) + "\n")
    with pytest.raises(UserError, match="fewer than two whole steps"):
        read_run(folders[2])
