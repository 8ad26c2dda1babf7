"""What happened in a run, one JSON line each: started, resumed, row skipped, reward failed, note, failed, ended."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from engine.tracking.jsonl import JsonLines, end_torn_line, parse
from engine.tracking.redact import redact


class EventLog:
    """Writes `events.jsonl`, which marks a run as alive: only one at a time can be open. Safe to call from threads."""

    def __init__(self, path: str | Path) -> None:
        """Open or make the file; a line that a kill has torn is cut off. BlockingIOError if another process has it."""
        self._lines = JsonLines(path, exclusive=True)
        end_torn_line(self._lines.path)

    def emit(self, kind: str, **fields: Any) -> None:
        """Append `{"time": unix seconds, "kind": kind, **fields}`, secrets masked, and flush it."""
        self._lines.write({"time": time.time(), "kind": kind, **redact(fields)})

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


def last_wandb_id(path: Path) -> str | None:
    """wandb's id of the run whose events these are, as its last start with wandb recorded it."""
    if not path.is_file():
        return None
    for line in reversed(path.read_bytes().splitlines()):
        row = parse(line) if b'"wandb_id"' in line else None
        if row and row.get("kind") in ("run_started", "run_resumed") and row["wandb_id"]:
            return str(row["wandb_id"])
    return None
