"""The folder of a run: made for a new one, emptied of records that nobody can miss, taken back to an earlier step."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from engine.config import UserError

METRICS, EVENTS, SAMPLES = "metrics.jsonl", "events.jsonl", "samples"
RECORDS = {"config.yaml", METRICS, EVENTS, "wandb"}
"""What a run's folder holds before its first measurement."""
PREPARED = {"start", "corpus"}
"""Folders that the preflight may have made there: a model with a new tokenizer, a store of tokens."""


def check_free(folder: Path) -> None:
    """Raise UserError if a new run cannot have this folder, because of what it holds; changes nothing."""
    if _ended_unmeasured(folder):
        return
    if (folder / METRICS).exists():
        raise UserError(
            f"{folder} already holds a run; choose another name= or delete it "
            "(resume=auto goes on from a run's checkpoints)"
        )
    if folder.is_dir() and any(path.name not in PREPARED for path in folder.iterdir()):
        raise UserError(f"{folder} is not empty; choose another name= or delete it")


def make_empty(folder: Path) -> list[Path]:
    """Make a folder, or accept one that holds nothing but `PREPARED`; returns the folders made, innermost first.

    Raises:
        UserError: it is not empty, is a file, or cannot be made or written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        check_free(folder)
        if _ended_unmeasured(folder):
            remove_records(folder, [])
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _rmdir(made)
        raise UserError(
            f"{folder}: cannot make the run's folder: {error.strerror}; choose another output_dir= or name="
        ) from None
    return made


def _ended_unmeasured(folder: Path) -> bool:
    """Whether the folder holds nothing but a run that is over and wrote no metrics: nobody can miss it.

    A run that is still starting has no metrics either, so its last event decides.
    """
    if not folder.is_dir() or {path.name for path in folder.iterdir()} - RECORDS - PREPARED:
        return False
    metrics, events = folder / METRICS, folder / EVENTS
    if not metrics.is_file() or metrics.stat().st_size or not events.is_file():
        return False
    last = events.read_text(encoding="utf-8").splitlines()[-1:]
    return bool(last) and '"kind": "run_ended"' in last[0]


def remove_records(folder: Path, made: list[Path]) -> None:
    """Undo `make_empty` and whatever was written since; what the preflight has made stays."""
    for path in folder.iterdir():
        if path.name in PREPARED:
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
    _rmdir(made)


def drop_later_samples(folder: Path, step: int) -> None:
    """Delete the samples of steps after this one."""
    for path in folder.glob("step_*.jsonl"):
        number = re.fullmatch(r"step_(\d+)\.jsonl", path.name)
        if number and int(number[1]) > step:
            path.unlink()


def _rmdir(folders: list[Path]) -> None:
    """Remove these folders, innermost first, up to the first that somebody else has begun to use."""
    for path in folders:
        try:
            path.rmdir()
        except FileNotFoundError:
            continue
        except OSError:
            return
