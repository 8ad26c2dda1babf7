"""Runs a finished run again, in a folder beside it, and compares: the same decisions, the same metrics, bit for bit.

A decision is which rows a step drew, and what became of each sample; `events.jsonl` holds them
all. Steps that were thrown away after a machine was lost do not count; which engine served whom may differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from engine import pipeline
from engine.config import Config, UserError
from engine.config_file import STAGE_PREFIX
from engine.tracking.jsonl import read_rows
from engine.tracking.redact import MASK
from engine.tracking.run_folder import EVENTS, METRICS

DECISIONS = ("admitted", "settled")
NOT_COMPARED = ("time/", "rollout/engine_restarts")
"""Metrics that tell of machines."""


@dataclass(frozen=True)
class Comparison:
    """What came of it."""

    folder: Path
    """The new run."""
    steps: int
    decisions: int
    differences: list[str]
    """Step, name and both values; empty where all is the same."""


def replay(run_dir: Path, name: str | None = None) -> Comparison:
    """Run it again, as `name` (by default with `-replay` behind its own).

    Raises:
        UserError: the folder holds no finished run, or a secret that its configuration held is needed again.
    """
    again = _configuration(run_dir, name or f"{run_dir.name}-replay")
    pipeline.run(again)
    return compare(run_dir, again.run_dir)


def compare(run_dir: Path, again: Path) -> Comparison:
    """Decisions and metrics of two runs."""
    old, new = list(_decisions(run_dir)), list(_decisions(again))
    differences = [f"decision {a} became {b}" for a, b in zip(old, new, strict=False) if a != b]
    if len(old) != len(new):
        differences.append(f"{len(old)} decisions became {len(new)}")
    before, after = read_rows(run_dir / METRICS), read_rows(again / METRICS)
    differences += _different_metrics(before, after)
    return Comparison(again, sum("time/step" in row for row in before), len(old), differences)


def _configuration(run_dir: Path, name: str) -> Config:
    record = run_dir / "config.yaml"
    if not (run_dir / "result.json").is_file() or not record.is_file():
        raise UserError(f"{run_dir}: holds no finished run; give the folder of one, runs/<name>")
    text = record.read_text(encoding="utf-8")
    if MASK in text:
        raise UserError(f"{record}: a secret was masked in it; keep secrets in environment variables to replay a run")
    config = Config.model_validate(yaml.safe_load(text))
    if config.stage == "rl" and config.rl.max_staleness > 0:
        raise UserError(
            f"{run_dir}: which weights made which token of an asynchronous run depends on time, so running it again "
            "gives another run; replay one with rl.max_staleness: 0"
        )
    folder = run_dir.absolute().parent

    def path(given: str) -> str:
        earlier = given.removeprefix(STAGE_PREFIX)
        return given if earlier == given else str(folder / earlier / "model")

    return config.with_model_paths(path).model_copy(update={"output_dir": folder, "name": name, "resume": "never"})


def _decisions(run_dir: Path) -> Iterator[dict[str, Any]]:
    """Those that stand, in order: a step that was made again has its last ones.

    The rows that a step draws are one decision; in how many parts they are drawn depends on what finishes first.
    """
    by_step: dict[int, dict[str, dict[str, Any]]] = {}
    for event in read_rows(run_dir / EVENTS):
        if event["kind"] in ("went_back", "run_resumed"):
            by_step = {step: held for step, held in by_step.items() if step <= event["step"]}
        if event["kind"] in DECISIONS:
            held = by_step.setdefault(event["step"], {})
            decision = {key: value for key, value in event.items() if key not in ("time", "sample_ids")}
            if earlier := held.get(event["kind"]):
                decision["rows"] = [*earlier["rows"], *decision["rows"]]
            held[event["kind"]] = decision
    for _, held in sorted(by_step.items()):
        yield from held.values()


def _different_metrics(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> Iterator[str]:
    if len(old) != len(new):
        yield f"{len(old)} lines of metrics became {len(new)}"
    for ours, theirs in zip(old, new, strict=False):
        for key in sorted({*ours, *theirs}):
            if not key.startswith(NOT_COMPARED) and ours.get(key) != theirs.get(key):
                yield f"step {ours['step']}, {key}: {ours.get(key)} became {theirs.get(key)}"
