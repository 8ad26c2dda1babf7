"""How the rewards of a run moved with the KL to the starting policy, which were over-optimised, and what alarms it had.

Optimising one reward (a reward model, the proxy) for long makes another that is only measured (the gold) rise, then
fall: Gao et al. 2022 (arXiv:2210.10760) draw both over the square root of the KL. This is that picture as a table, of
the training samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.table import Table

from engine.config import UserError
from engine.tracking.jsonl import read_rows
from engine.tracking.run_folder import EVENTS, METRICS

PARTS = 10
"""Rows of the table."""
STANDARD_ERRORS = 3.0
"""A fall counts when it is larger than this many of its standard errors."""
TOTAL = "total"


@dataclass(frozen=True)
class Part:
    """Some steps in a row."""

    first: int
    last: int
    kl: float
    """Mean KL of a sample, in nats; NaN where the run did not measure it."""
    means: dict[str, float]
    errors: dict[str, float]
    """Of each reward: mean over the steps, and its standard error."""


def reward_parts(run_dir: Path) -> list[Part]:
    """The steps of an RL run in at most `PARTS` parts.

    Raises:
        UserError: the folder holds no steps of an RL run.
    """
    rows = [row for row in read_rows(run_dir / METRICS) if row.get("reward/mean") is not None]
    if len(rows) < 2:
        raise UserError(f"{run_dir}: holds no steps of a run with rewards; give the folder of an `rl` stage")
    names = {"reward/mean": TOTAL} | {
        key: key.removeprefix("reward/").removesuffix("/mean")
        for key in sorted({key for row in rows for key in row})
        if key.startswith("reward/") and key.endswith("/mean") and key != "reward/mean"
    }
    parts = []
    for chunk in np.array_split(np.arange(len(rows)), min(PARTS, len(rows) // 2)):
        some = [rows[i] for i in chunk]
        values = {name: np.array([r[k] for r in some if r.get(k) is not None]) for k, name in names.items()}
        kls = [row["policy/kl_per_sample"] for row in some if row.get("policy/kl_per_sample") is not None]
        parts.append(
            Part(
                first=some[0]["step"],
                last=some[-1]["step"],
                kl=float(np.mean(kls)) if kls else float("nan"),
                means={name: float(x.mean()) for name, x in values.items() if len(x)},
                errors={name: float(x.std(ddof=1) / len(x) ** 0.5) for name, x in values.items() if len(x) > 1},
            )
        )
    return parts


def over_optimised(parts: list[Part]) -> dict[str, Part]:
    """Rewards that fell while the total rose -> the part in which they were highest."""
    last, found = parts[-1], {}
    for name in last.means:
        best = max((part for part in parts if name in part.means), key=lambda part: part.means[name])
        error = (best.errors.get(name, 0.0) ** 2 + last.errors.get(name, 0.0) ** 2) ** 0.5
        fell = best.means[name] - last.means[name] > STANDARD_ERRORS * error
        if fell and last.means[TOTAL] >= best.means[TOTAL]:
            found[name] = best
    return found


def reward_report(run_dir: Path) -> tuple[Table, list[str]]:
    """The table, and a sentence for each reward that was over-optimised and each alarm."""
    parts = reward_parts(run_dir)
    table = Table("steps", "sqrt(KL)", *parts[-1].means)
    for part in parts:
        cells = [
            f"{part.means[n]:.3f} ± {part.errors.get(n, 0.0):.3f}" if n in part.means else "" for n in parts[-1].means
        ]
        table.add_row(f"{part.first}-{part.last}", _root(part.kl), *cells)
    sentences = [
        f"{name} was over-optimised: highest in steps {best.first}-{best.last} ({best.means[name]:.3f}, sqrt(KL) "
        f"{_root(best.kl)}), at the end {parts[-1].means[name]:.3f} (sqrt(KL) {_root(parts[-1].kl)}), while the total "
        f"rose from {best.means[TOTAL]:.3f} to {parts[-1].means[TOTAL]:.3f}"
        for name, best in over_optimised(parts).items()
    ]
    return table, sentences + _alarms(run_dir)


def _alarms(run_dir: Path) -> list[str]:
    """What the run's alarms said."""
    alarms = [event for event in read_rows(run_dir / EVENTS) if event["kind"] == "alarm"]
    return [f"alarm {alarm['alarm']}, step {alarm['step']}: {alarm['text']}" for alarm in alarms]


def _root(kl: float) -> str:
    """The estimate may be slightly below 0."""
    return "?" if np.isnan(kl) else f"{max(kl, 0.0) ** 0.5:.2f}"
