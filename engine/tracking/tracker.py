"""The records of one run: its folder, configuration, metrics, events, samples and wandb run."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from engine.config import Config, UserError
from engine.tracking.events import EventLog
from engine.tracking.jsonl import JsonLines
from engine.tracking.metrics import MetricsLog
from engine.tracking.redact import redact
from engine.tracking.wandb_run import WandbRun, check_login

EXIT_CODES = {"succeeded": 0, "failed": 1, "interrupted": 130}
"""How a run can end, and the exit code that says so."""
RECORDS = {"config.yaml", "metrics.jsonl", "events.jsonl", "wandb"}
"""What a run's folder holds before its first measurement."""


class Tracker:
    """Everything that a run writes down, under `config.run_dir`."""

    def __init__(self, config: Config) -> None:
        """Make the run's folder and open its records; on any failure nothing is left behind.

        The records of a run of this name that ended before its first measurement (a reward function that always
        failed, a cluster that was too small) are replaced; any other run's are never touched.

        Raises:
            UserError: the folder holds something already or cannot be made, or wandb cannot start.
        """
        self.run_dir = config.run_dir
        check_login(config)
        made = _make_empty(self.run_dir)
        opened: list[Any] = []
        try:
            snapshot = yaml.safe_dump(redact(config.model_dump(mode="json")), sort_keys=False, allow_unicode=True)
            (self.run_dir / "config.yaml").write_text(snapshot, encoding="utf-8")
            self._metrics = MetricsLog(self.run_dir / "metrics.jsonl")
            opened.append(self._metrics)
            self._events = EventLog(self.run_dir / "events.jsonl")
            opened.append(self._events)
            self.wandb = WandbRun(config, self.run_dir)
        except BaseException:
            for log in opened:
                log.close()
            _remove(self.run_dir, made)
            raise
        self._closed = False
        self.event("run_started", name=config.name, seed=config.seed, device=config.device, wandb_id=self.wandb.id)
        if self.wandb.url:
            self.note(f"wandb: {self.wandb.url}")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the numbers of a step in `metrics.jsonl` and wandb."""
        self._metrics.write(step, metrics)
        self.wandb.log(step, metrics)

    def event(self, kind: str, **fields: Any) -> None:
        """Record something that happened in `events.jsonl`; safe to call from several threads."""
        self._events.emit(kind, **fields)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write samples of a step to `samples/step_000012.jsonl`; no rows, no file; further rows are appended."""
        if not rows:
            return
        folder = self.run_dir / "samples"
        folder.mkdir(exist_ok=True)
        lines = JsonLines(folder / f"step_{step:06d}.jsonl")
        try:
            for row in rows:
                lines.write(dict(row))
        finally:
            lines.close()

    def note(self, text: str) -> None:
        """Tell a person something, above a live bar if there is one, and record it as an event; secrets masked."""
        print(redact(text), flush=True)
        self.event("note", text=text)

    def close(self, status: str) -> None:
        """Record how the run ended ('succeeded', 'failed', 'interrupted'), close every file, finish wandb.

        A second call does nothing. Raises ValueError for another status.
        """
        if status not in EXIT_CODES:
            raise ValueError(f"status {status!r} is not one of {', '.join(EXIT_CODES)}")
        if self._closed:
            return
        self._closed = True
        self.event("run_ended", status=status)
        self._metrics.close()
        self._events.close()
        self.wandb.close(EXIT_CODES[status])


def _make_empty(folder: Path) -> list[Path]:
    """Make a folder, or accept an empty one; returns the folders made, innermost first.

    Raises:
        UserError: it is not empty, is a file, or cannot be made or written.
    """
    if _ended_unmeasured(folder):
        _remove(folder, [])
    if (folder / "metrics.jsonl").exists():
        raise UserError(f"{folder} already holds a run; choose another name= or delete it")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        empty = not any(folder.iterdir())
    except OSError as error:
        _rmdir(made)
        raise UserError(
            f"{folder}: cannot make the run's folder: {error.strerror}; choose another output_dir= or name="
        ) from None
    if not empty:
        raise UserError(f"{folder} is not empty; choose another name= or delete it")
    return made


def _ended_unmeasured(folder: Path) -> bool:
    """Whether the folder holds nothing but a run that is over and wrote no metrics: nobody can miss it.

    A run that is still starting has no metrics either, so its last event decides.
    """
    if not folder.is_dir() or {path.name for path in folder.iterdir()} - RECORDS:
        return False
    metrics, events = folder / "metrics.jsonl", folder / "events.jsonl"
    if not metrics.is_file() or metrics.stat().st_size or not events.is_file():
        return False
    last = events.read_text(encoding="utf-8").splitlines()[-1:]
    return bool(last) and '"kind": "run_ended"' in last[0]


def _remove(folder: Path, made: list[Path]) -> None:
    """Undo `_make_empty` and whatever was written since."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
    _rmdir(made)


def _rmdir(folders: list[Path]) -> None:
    """Remove these folders, innermost first, up to the first that somebody else has begun to use."""
    for path in folders:
        try:
            path.rmdir()
        except FileNotFoundError:
            continue
        except OSError:
            return
