"""Files of one JSON object per line, each line written whole and flushed at once."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import Any


class JsonLines:
    """Appends rows to a file; safe to call from several threads."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = self.path.open("a", encoding="utf-8")
        self._lock = threading.Lock()

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
