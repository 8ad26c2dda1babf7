"""Files of one JSON object per line, each line written whole and flushed at once."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any


class JsonLines:
    """Appends rows to a file; safe to call from several threads."""

    def __init__(self, path: str | Path, *, exclusive: bool = False) -> None:
        """Open or make the file. With `exclusive`, no other process can open it so until this one closes it or ends.

        Raises BlockingIOError if another holds it. File systems without locks grant every wish.
        """
        self.path = Path(path)
        self._file = self.path.open("a", encoding="utf-8")
        self._lock = threading.Lock()
        if exclusive:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._file.close()
                raise
            except OSError:
                pass

    def write(self, row: dict[str, Any]) -> None:
        """Append one line and flush it, so that a killed run keeps every row it wrote.

        numpy and torch scalars and arrays become numbers and lists; NaN and infinities, which JSON lacks, become null;
        what JSON cannot hold at all becomes its `str`. Raises ValueError after `close`.
        """
        line = json.dumps(plain(row), ensure_ascii=False, allow_nan=False)
        with self._lock:
            self._file.write(line + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        with self._lock:
            self._file.close()


def end_torn_line(path: Path) -> None:
    """Mend, in place, what a kill in the middle of a write leaves: a last line that is not whole is cut off."""
    with contextlib.suppress(FileNotFoundError), path.open("r+b") as file:
        content = file.read()
        start = content.rfind(b"\n") + 1
        if start == len(content):
            return
        if parse(content[start:]) is None:
            file.truncate(start)
        else:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a file; none of a missing one."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    return [row for line in lines if (row := parse(line)) is not None]


def keep_rows(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> int:
    """Rewrite a file, whole or not at all, with the wanted rows as they were; returns the number of lines dropped.

    Lines that are not whole rows are dropped too. A missing file stays missing.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return 0
    rows = [(line, parse(line)) for line in lines]
    kept = [line + b"\n" for line, row in rows if row is not None and wanted(row)]
    replace_file(path, b"".join(kept))
    return len(lines) - len(kept)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: after a kill or on a full disk the old one is still there."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def parse(line: bytes | str) -> dict[str, Any] | None:
    """The row that a line holds, or None for anything else."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def plain(value: Any) -> Any:
    """The value in JSON's own types: see `JsonLines.write`."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy and torch, without importing either
        return plain(value.tolist())
    return str(value)
