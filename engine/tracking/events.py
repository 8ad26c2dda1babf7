"""What happened in a run, one JSON line each: started, row skipped, reward failed, evaluated, note, failed, ended."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from engine.tracking.jsonl import JsonLines
from engine.tracking.redact import redact


class EventLog:
    """Writes `events.jsonl`; safe to call from several threads."""

    def __init__(self, path: str | Path) -> None:
        self._lines = JsonLines(path)

    def emit(self, kind: str, **fields: Any) -> None:
        """Append `{"time": unix seconds, "kind": kind, **fields}`, secrets masked, and flush it."""
        self._lines.write({"time": time.time(), "kind": kind, **redact(fields)})

    def close(self) -> None:
        """Close the file."""
        self._lines.close()
