"""The numbers of a run, one JSON line per step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from engine.tracking.jsonl import JsonLines, keep_rows


class MetricsLog:
    """Writes `metrics.jsonl`."""

    def __init__(self, path: str | Path) -> None:
        self._lines = JsonLines(path)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append `{"step": step, **metrics}` and flush it. numpy and torch scalars are numbers; NaN is null."""
        self._lines.write({"step": step, **metrics})

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


def drop_later_metrics(path: Path, step: int) -> int:
    """Drop the rows of steps after this one, and lines that a kill has torn; returns how many lines went."""
    return keep_rows(path, lambda row: isinstance(row.get("step"), int) and row["step"] <= step)
