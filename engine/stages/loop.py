"""What all stages share: steps with progress, evaluation at both ends and between, checkpoints, the final model.

    restore -> begin -> evaluate -> [ step -> log -> evaluate? -> checkpoint? ] x steps -> save -> evaluate

A checkpoint is taken after a step's evaluation, so a run that goes on from it repeats nothing that it has recorded.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from engine.checkpoint import Checkpoint, Checkpoints
from engine.config import Config
from engine.roles import Trained
from engine.tracking.console import Progress
from engine.tracking.tracker import Tracker


@dataclass(frozen=True)
class Result:
    """What a stage ends with."""

    model: Path
    """Final model, in Hugging Face format."""
    before: dict[str, float]
    """`eval/...` metrics before the first step; empty without held-out rows."""
    after: dict[str, float]
    """The same after the last."""

    def summary(self) -> str:
        """Held-out results before and after, for a person."""
        lines = [f"model saved in {self.model}"]
        for name, value in self.after.items():
            if name.endswith("_se"):
                continue
            error = self.after.get(f"{name}_se")
            after = _shown(value, error)
            start = self.before.get(name, value)
            if start == value:
                lines.append(f"held-out {name.removeprefix('eval/')}: {after}")
                continue
            start_error = self.before.get(f"{name}_se")
            line = f"held-out {name.removeprefix('eval/')}: {_shown(start, start_error)} -> {after}"
            if error is not None and start_error is not None and error + start_error > 0:
                line += f" ({(value - start) / (error**2 + start_error**2) ** 0.5:+.1f} standard errors)"
            lines.append(line)
        return "\n".join(lines)

    def record(self) -> dict[str, Any]:
        """As plain JSON."""
        return {"model": str(self.model), "before": self.before, "after": self.after}


def _shown(value: float, error: float | None) -> str:
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"


class Stage(Protocol):
    """What a stage does between the loop's lines."""

    @property
    def name(self) -> str:
        """Shown to people."""

    @property
    def total_steps(self) -> int:
        """How many steps there are."""

    @property
    def models(self) -> Mapping[str, Trained]:
        """The models in training, by the folders of their checkpoints."""

    def begin(self, step: int) -> None:
        """Before the first step, or the first after a restart from the checkpoint of this step."""

    def step(self, step: int) -> dict[str, float]:
        """One step; returns its metrics."""

    def evaluate(self, step: int) -> dict[str, float]:
        """`eval/...` metrics of the current weights on held-out rows; empty without any."""

    def save(self, folder: Path) -> None:
        """Write the final model."""

    def state(self) -> dict[str, Any]:
        """What the stage goes on from, beside the trained model: plain JSON."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from it."""


class Loop:
    """Drives one stage from its start, or from a checkpoint, to its end."""

    def __init__(self, config: Config, stage: Stage, tracker: Tracker, checkpoints: Checkpoints) -> None:
        self.config = config
        self.stage = stage
        self.tracker = tracker
        self.checkpoints = checkpoints

    def run(self, resumed: Checkpoint | None = None) -> Result:
        """Train to the last step and save the model."""
        stage, total = self.stage, self.stage.total_steps
        first = resumed.step if resumed else 0
        if resumed:
            for name, trained in stage.models.items():
                trained.load_state(resumed.folder / name)
            stage.load_state(resumed.state["stage"])
        stage.begin(first)
        before = resumed.state["before"] if resumed else self._evaluate(0)
        with Progress(stage.name, total, start=first) as progress:
            for step in range(first + 1, total + 1):
                start = time.monotonic()
                metrics = stage.step(step)
                metrics["time/step"] = time.monotonic() - start
                if "rollout/tokens" in metrics:
                    metrics["time/tokens_per_second"] = metrics["rollout/tokens"] / metrics["time/step"]
                progress.step(step, metrics)
                self.tracker.log(step, metrics)
                if step < total and _falls_on(step, self.config.evaluation.every):
                    self._evaluate(step)
                if step < total and _falls_on(step, self.config.checkpoint.every):
                    self._checkpoint(step, before)
        model = self.config.run_dir.absolute() / "model"
        after = self._evaluate(total)
        stage.save(model)
        return Result(model, before, after)

    def _evaluate(self, step: int) -> dict[str, float]:
        metrics = self.stage.evaluate(step)
        if metrics:
            self.tracker.log(step, metrics)
            self.tracker.event("evaluated", step=step, **metrics)
            shown = ", ".join(
                f"{name.removeprefix('eval/')} {_shown(value, metrics.get(f'{name}_se'))}"
                for name, value in metrics.items()
                if not name.endswith("_se")
            )
            self.tracker.note(f"held-out, step {step}: {shown}")
        return metrics

    def _checkpoint(self, step: int, before: dict[str, float]) -> None:
        state = {"stage": self.stage.state(), "before": before}
        with self.checkpoints.writing(step, state) as folder:
            for name, trained in self.stage.models.items():
                trained.save_state(folder.absolute() / name)


def _falls_on(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


class Stopwatch:
    """Seconds of the named parts of a step."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Take the time of a block."""
        start = time.monotonic()
        yield
        self._seconds[name] = time.monotonic() - start

    def lap(self) -> dict[str, float]:
        """`time/<name>` of the parts since the last lap."""
        seconds, self._seconds = self._seconds, {}
        return {f"time/{name}": value for name, value in seconds.items()}
