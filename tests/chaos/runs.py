"""A run under observation: a job of its own on a shared cluster, watched through its events, found by its titles."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).parents[2]
LAST_BYTES = 2**15
ACTORS = {
    "policy": "PolicyActor",
    "critic": "CriticActor",
    "reference": "ReferenceActor",
    "reward_model": "RewardScorerActor",
    "rollout": "RolloutActor",
    "rewards": "RewardPool",
    "environments": "EnvironmentActor",
}
"""Role -> the class in the titles of its processes."""


class Observed:
    """`gnomon run` on the cluster of this process, started again after each kill."""

    def __init__(self, folder: Path, raw: dict[str, Any], address: str) -> None:
        self.folder = folder
        self.run_dir = Path(raw["output_dir"]) / raw["name"]
        self.config = folder / f"{raw['name']}.yaml"
        self.config.write_text(yaml.safe_dump(raw))
        self.log = folder / f"{raw['name']}.log"
        self.env = os.environ | {"RAY_ADDRESS": address}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Give the command, for the first time or again."""
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "engine", "run", str(self.config)],
                cwd=ROOT,
                env=self.env,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self) -> None:
        """SIGKILL to the controller and what it has started itself."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(60)

    def wait(self, timeout_s: float) -> int:
        """Exit code."""
        assert self.process is not None
        return self.process.wait(timeout_s)

    def wait_until(self, reached: Callable[[], bool], timeout_s: float, what: str = "") -> None:
        """Poll until something is so; AssertionError when the run ends before, or the time is over."""
        end = time.monotonic() + timeout_s
        while not reached():
            assert self.process is not None
            code = self.process.poll()
            assert code is None, f"the run ended with {code} before {what}:\n{self.tail()}"
            assert time.monotonic() < end, f"not within {timeout_s:.0f} s: {what}\n{self.tail()}"
            time.sleep(0.02)

    def tail(self) -> str:
        """The last it said."""
        return self.log.read_text(errors="replace")[-3000:]

    def rows(self) -> list[dict[str, Any]]:
        """Of the steps in metrics.jsonl, one for each."""
        return [row for row in read(self.run_dir / "metrics.jsonl") if "time/step" in row]

    def furthest(self) -> int:
        """The last step that is recorded; only the end of the file is read."""
        path = self.run_dir / "metrics.jsonl"
        if not path.is_file():
            return 0
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LAST_BYTES))
            rows = parsed(file.read())
        return max((row["step"] for row in rows if "time/step" in row), default=0)

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Of one kind."""
        return [event for event in read(self.run_dir / "events.jsonl") if event["kind"] == kind]


def read(path: Path) -> list[dict[str, Any]]:
    """Whole JSON lines of a file that may be growing."""
    if not path.is_file():
        return []
    return parsed(path.read_bytes())


def parsed(content: bytes) -> list[dict[str, Any]]:
    """The whole JSON objects among some lines."""
    found = []
    for line in content.splitlines():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            found += [row] if isinstance(row, dict) else []
    return found


class Tail:
    """The events of a run as they are written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = path.stat().st_size if path.is_file() else 0

    def new(self) -> Iterator[dict[str, Any]]:
        """Those since the last call."""
        if not self._path.is_file():
            return
        with self._path.open("rb") as file:
            file.seek(self._position)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._position += len(line)
                with contextlib.suppress(ValueError):
                    yield json.loads(line)


def actors(role: str) -> list[psutil.Process]:
    """The live processes of a role, on any cluster below this process."""
    return [process for process in _descendants() if _title(process).startswith(f"ray::{ACTORS[role]}")]


def orphans() -> list[str]:
    """Titles of the actors that are there."""
    return [_title(p) for p in _descendants() if any(_title(p).startswith(f"ray::{name}") for name in ACTORS.values())]


def _descendants() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()) if process.status() != psutil.STATUS_ZOMBIE else ""
    except psutil.Error:
        return ""
