"""Events and metrics are whole JSON lines, on disk as soon as they are written."""

from __future__ import annotations

import json
import math
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.tracking.events import EventLog
from engine.tracking.metrics import MetricsLog


def rows(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_an_event_is_on_disk_with_its_time_before_emit_returns(tmp_path: Path) -> None:
    log, before = EventLog(tmp_path / "events.jsonl"), time.time()
    log.emit("sample_dropped", reason="reward timed out", sample=np.int64(7), where=Path("a/b"))
    [row] = rows(tmp_path / "events.jsonl")
    assert before <= row.pop("time") <= time.time()
    assert row == {"kind": "sample_dropped", "reason": "reward timed out", "sample": 7, "where": "a/b"}


def test_events_from_many_threads_are_all_there_and_whole(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")

    def work(thread: int) -> None:
        for i in range(200):
            log.emit("tick", thread=thread, i=i, text="x" * 500)

    threads = [threading.Thread(target=work, args=(t,)) for t in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    seen = [(row["thread"], row["i"]) for row in rows(tmp_path / "events.jsonl")]
    assert sorted(seen) == [(t, i) for t in range(8) for i in range(200)]


def test_secrets_in_events_are_masked(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.emit("failed", error="401 from https://me:hunter22@host.example", api_key="abc-def")
    assert "hunter22" not in (tmp_path / "events.jsonl").read_text()
    assert "abc-def" not in (tmp_path / "events.jsonl").read_text()


def test_a_closed_event_log_refuses_events_and_closes_twice_quietly(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.close()
    log.close()
    with pytest.raises(ValueError, match="closed"):
        log.emit("late")


def test_metrics_take_numpy_and_torch_scalars_and_write_nan_as_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(
        3, {"a": np.float32(0.5), "b": torch.tensor(0.25), "c": np.int64(4), "d": math.nan, "e": np.float64("inf")}
    )
    log.write(4, {"a": torch.tensor([2.0])[0], "f": float("-inf"), "g": torch.tensor(math.nan)})
    assert rows(tmp_path / "metrics.jsonl") == [
        {"step": 3, "a": 0.5, "b": 0.25, "c": 4, "d": None, "e": None},
        {"step": 4, "a": 2.0, "f": None, "g": None},
    ]


def test_a_log_opened_again_goes_on_after_its_last_line(tmp_path: Path) -> None:
    for step in (1, 2):
        log = MetricsLog(tmp_path / "metrics.jsonl")
        log.write(step, {"x": 1.0})
        log.close()
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 2]
