"""Numbers that are not finite: what counts, what is kept as evidence, and when the run stops."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config import Config
from engine.data.batch import SAMPLE_FIELDS, TOKEN_FIELDS, Batch
from engine.stages.guard import NumericsError, NumericsGuard
from engine.tracking.tracker import Tracker


class Model:
    """A trained model of which the n-th call skips as many updates as it was told."""

    def __init__(self, *skipped: int, name: str = "policy") -> None:
        self.skipped = list(skipped)
        self.name = name

    def update(self, minibatches: Any) -> dict[str, float]:
        skipped = self.skipped.pop(0)
        return {f"{self.name}/updates": len(minibatches) - skipped, f"{self.name}/skipped_updates": float(skipped)}


@pytest.fixture
def tracker(tmp_path: Path) -> Iterator[Tracker]:
    raw = {"model": {"path": "m"}, "data": {"train": "t"}, "rewards": {"functions": ["a.py:f"]}}
    opened = Tracker(Config.model_validate(raw | {"name": "run", "output_dir": str(tmp_path)}))
    yield opened
    opened.close("failed")


def batch_of(first: int = 0, **annotations: list[float]) -> Batch:
    """Two samples of two tokens; `first` tells one batch from another."""
    batch = Batch.offline(
        np.arange(first, first + 4, dtype=np.int32),
        np.array([2, 2], np.int32),
        np.array([False, True] * 2),
        np.array([3, 3], np.int64),
        annotations={name: np.array(values, np.float32) for name, values in annotations.items()},
        labels={"kl_coef": np.array([0.5, 0.5], np.float32)},
    )
    return Batch(**{**vars(batch), "rewards": {"share": np.array([1, np.nan], np.float32)}})


def events(tracker: Tracker, kind: str = "update_skipped") -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (tracker.run_dir / "events.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def incidents(tracker: Tracker) -> list[str]:
    return sorted(path.name for path in tracker.run_dir.glob("incidents/*"))


def feed(guard: NumericsGuard, minibatches: int, *skipped: int) -> None:
    model: Any = Model(*skipped)
    for step in range(1, len(skipped) + 1):
        guard.update(model, [batch_of() for _ in range(minibatches)], step)


def test_what_was_finite_leaves_no_trace(tracker):
    guard = NumericsGuard(tracker, stop_after=1)
    model: Any = Model(0, name="critic")
    assert guard.update(model, [batch_of()], 1) == {"critic/updates": 1, "critic/skipped_updates": 0.0}
    assert guard.check(batch_of(old_logp=[0, -1, 0, -2]), 1)
    assert (incidents(tracker), events(tracker)) == ([], [])


def test_an_update_that_is_not_skipped_starts_the_count_anew(tracker):
    feed(NumericsGuard(tracker, stop_after=3), 1, 1, 1, 0, 1, 1, 0)
    assert [event["in_a_row"] for event in events(tracker)] == [1, 2, 1, 2]


def test_minibatches_count_one_by_one_and_one_that_trains_starts_the_count_anew(tracker):
    feed(NumericsGuard(tracker, stop_after=6), 3, 2, 3, 1, 3)
    assert [(event["updates"], event["in_a_row"]) for event in events(tracker)] == [(2, 2), (3, 5), (1, 1), (3, 4)]


@pytest.mark.parametrize(("stop_after", "minibatches", "steps"), [(1, 1, 1), (3, 1, 3), (3, 2, 2), (4, 4, 1)])
def test_the_run_stops_after_so_many_in_a_row_and_not_before(tracker, stop_after, minibatches, steps):
    guard = NumericsGuard(tracker, stop_after=stop_after)
    feed(guard, minibatches, *[minibatches] * (steps - 1))
    with pytest.raises(NumericsError) as caught:
        feed(guard, minibatches, minibatches)
    says = str(caught.value)
    assert says.startswith(f"{steps * minibatches} updates in a row were skipped (optimizer.stop_after_skipped)")
    assert "the loss or the gradient is not finite" in says
    assert str(tracker.run_dir / "incidents") in says


def test_batches_that_are_not_finite_and_updates_that_are_not_count_together(tracker):
    guard = NumericsGuard(tracker, stop_after=3)
    broken = batch_of(old_logp=[0, np.nan, 0, 0])
    assert not guard.check(broken, 1)
    feed(guard, 1, 1)
    assert guard.check(batch_of(), 3), "a batch that is finite has not been trained on yet"
    with pytest.raises(NumericsError, match=r"3 updates in a row .*: old_logp is not finite"):
        guard.check(broken, 4)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_every_annotation_is_looked_at_and_named(tracker, value):
    batch = batch_of(old_logp=[0, -1, 0, -1], ref_logp=[0, 0, 0, value], values=[value, 0, 0, 0])
    assert not NumericsGuard(tracker, stop_after=2).check(batch, 12)
    [event] = events(tracker)
    assert (event["step"], event["updates"], event["not_finite"]) == (12, 1, "ref_logp, values")
    [note] = events(tracker, "note")
    assert note["text"].startswith("step 12: ref_logp, values is not finite;")
    assert incidents(tracker) == ["step_000012.npz"]


def test_the_evidence_is_the_whole_batch(tracker):
    batch = batch_of(7, advantages=[0, np.inf, 0, -1])
    NumericsGuard(tracker, stop_after=2).check(batch, 5)
    expected = {name: getattr(batch, name) for name in (*TOKEN_FIELDS, *SAMPLE_FIELDS)}
    expected |= batch.annotations | batch.labels | batch.rewards
    with np.load(tracker.run_dir / "incidents" / "step_000005.npz") as kept:
        assert set(kept) == set(expected)
        for name, values in expected.items():
            np.testing.assert_array_equal(kept[name], values)
            assert kept[name].dtype == values.dtype


def test_each_minibatch_of_a_step_is_kept_and_none_is_written_over(tracker):
    guard = NumericsGuard(tracker, stop_after=9)
    model: Any = Model(2, 1)
    guard.update(model, [batch_of(10), batch_of(20)], 3)
    guard.update(model, [batch_of(30)], 3)
    names = ["step_000003.npz", "step_000003_1.npz", "step_000003_2.npz"]
    assert incidents(tracker) == names
    assert [int(np.load(tracker.run_dir / "incidents" / name)["tokens"][0]) for name in names] == [10, 20, 30]
