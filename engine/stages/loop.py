"""What all stages share: steps with progress, evaluation at both ends and between, checkpoints, the final model.

    restore -> begin -> evaluate -> [ step -> log -> evaluate? -> checkpoint? ] x steps -> save -> evaluate
       ^                                 |
       +--- newest checkpoint <----------+   a worker with state is lost: its group is started anew, inside the run

A checkpoint is taken after a step's evaluation, so a run that goes on from it repeats nothing that it has recorded.
Interrupted before a step's updates have begun, a run saves the step before on its way out.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from engine.checkpoint import Checkpoint, Checkpoints
from engine.config import Config, UserError
from engine.remote_checkpoints import RemoteCheckpoints
from engine.roles import Trained, WorkerLostError, Workers
from engine.stages.saving import Saver
from engine.stop_signals import StopSignals
from engine.tracking.console import Progress
from engine.tracking.incidents import IncidentLog
from engine.tracking.jsonl import replace_file
from engine.tracking.timeline import CONTROLLER
from engine.tracking.tracker import Tracker

BEST = "best"
"""Folder of the best model, beside that of the last, and the file that says how good it is."""
LAST_SAVE_S = 8.0
"""An interrupted run waits so long for its last checkpoint."""


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

    def __init__(
        self,
        config: Config,
        workers: Workers,
        make_stage: Callable[[], Stage],
        tracker: Tracker,
        checkpoints: Checkpoints | RemoteCheckpoints,
        incidents: IncidentLog,
        signals: StopSignals,
    ) -> None:
        """`make_stage` makes the stage as it is before its first step."""
        self.config = config
        self.workers = workers
        self.make_stage = make_stage
        self.tracker = tracker
        self.incidents = incidents
        self.signals = signals
        self.saver = Saver(checkpoints, incidents.report, timeout_s=2 * config.timeouts.publish)
        self.stage = make_stage()
        self._best: float | None = None
        self._whole: tuple[int, dict[str, Any]] | None = None
        """The last step that was finished, and the controller's part of its state."""
        self._changes: list[int] = []

    def run(self, resumed: Checkpoint | None = None) -> Result:
        """Train to the last step and save the model.

        Raises:
            TooManyIncidentsError: workers were lost again and again.
        """
        self.signals.worth_waiting = lambda: self.config.checkpoint.every > 0 and self._changes != self._changes_now()
        lost: WorkerLostError | None = None
        try:
            while True:
                try:
                    if lost is not None:
                        resumed = self._go_back(lost)
                    return self._train(resumed)
                except WorkerLostError as error:
                    lost = error
        except KeyboardInterrupt:
            self._save_last()
            raise

    def _train(self, resumed: Checkpoint | None) -> Result:
        stage, total = self.stage, self.stage.total_steps
        first = resumed.step if resumed else 0
        self._whole = None
        if resumed:
            for name, trained in stage.models.items():
                trained.load_state(f"{resumed.folder}/{name}")
            stage.load_state(resumed.state["stage"])
        self._best = resumed.state["best"] if resumed else None
        self._changes = self._changes_now()
        self.tracker.event("training", step=first, total=total)
        stage.begin(first)
        before = resumed.state["before"] if resumed else self._evaluate(0)
        with Progress(stage.name, total, start=first) as progress:
            for step in range(first + 1, total + 1):
                start = time.monotonic()
                metrics = stage.step(step)
                metrics["time/step"] = time.monotonic() - start
                record_span(self.tracker, "step", step, metrics["time/step"])
                if "rollout/tokens" in metrics:
                    metrics["time/tokens_per_second"] = metrics["rollout/tokens"] / metrics["time/step"]
                progress.step(step, metrics)
                self.tracker.log(step, metrics)
                if step < total and _falls_on(step, self.config.evaluation.every):
                    self._evaluate(step)
                self._after(step, before)
        model = self.config.run_dir.absolute() / "model"
        after = self._evaluate(total)
        stage.save(model)
        self.saver.settle()
        return Result(model, before, after)

    def _after(self, step: int, before: dict[str, float]) -> None:
        """The step is over: it can be saved, now or at a signal."""
        state = {"stage": self.stage.state(), "before": before, "best": self._best}
        self._whole, self._changes = (step, state), self._changes_now()
        self.incidents.finished(step)
        self.saver.poll()
        self.signals.step_is_over()
        if step < self.stage.total_steps and _falls_on(step, self.config.checkpoint.every):
            self.tracker.event("phase", step=step, phase="checkpoint")
            self.saver.save(step, state, self.stage.models)

    def _go_back(self, lost: WorkerLostError) -> Checkpoint | None:
        """Start the lost worker's group anew; returns the checkpoint to go on from, None for the start."""
        self.incidents.report(lost.incident("its group is started anew, the run goes back to its newest checkpoint"))
        self.saver.settle()
        newest = self.saver.checkpoints.newest()
        self.workers.rebuild(lost.group, newest is None)
        self.tracker.go_back(newest.step if newest else -1)
        self.stage = self.make_stage()
        return newest

    def _changes_now(self) -> list[int]:
        return [model.changes for model in self.stage.models.values()]

    def _save_last(self) -> None:
        """Save the last whole step, on the way out."""
        with suppress(Exception):  # the older checkpoints are there, and the run is ending
            self.saver.settle(LAST_SAVE_S)
            if self.config.checkpoint.every == 0 or self._whole is None or self._changes != self._changes_now():
                return
            step, state = self._whole
            if step != self.saver.saved:
                self.saver.save(step, state, self.stage.models)
                self.saver.settle(LAST_SAVE_S)
            if step == self.saver.saved:
                self.tracker.note(f"step {step} is saved; the same command goes on from there")

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
        self._keep_best(step, metrics)
        return metrics

    def _keep_best(self, step: int, metrics: Mapping[str, float]) -> None:
        """Export the model if it is the best so far.

        Raises:
            UserError: the metric that decides is not measured.
        """
        name = self.config.checkpoint.best.removeprefix("-")
        if not name:
            return
        if name not in metrics:
            known = ", ".join(sorted(metrics)) or "none; give data.evaluation"
            raise UserError(f"checkpoint.best: {name} is not measured; held-out metrics of this run: {known}")
        value = metrics[name]
        if self._best is None or (value < self._best if self.config.checkpoint.best[0] == "-" else value > self._best):
            self._best = value
            folder = self.config.run_dir.absolute()
            self.stage.save(folder / BEST)
            record = {"step": step, "metric": name, "value": value}
            replace_file(folder / f"{BEST}.json", (json.dumps(record) + "\n").encode())
            self.tracker.event("best", **record)


def _falls_on(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def record_span(tracker: Tracker, phase: str, step: int, seconds: float) -> None:
    """Take down what the controller did or waited for in the last `seconds`."""
    tracker.event("span", actor=CONTROLLER, phase=phase, step=step, start=time.time() - seconds, seconds=seconds)


class Stopwatch:
    """Seconds of the named parts of a step."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str, step: int) -> Iterator[None]:
        """Take the time of a block, and record that it begins."""
        self._tracker.event("phase", step=step, phase=name)
        start = time.monotonic()
        yield
        seconds = self._seconds[name] = time.monotonic() - start
        record_span(self._tracker, name, step, seconds)

    def lap(self) -> dict[str, float]:
        """`time/<name>` of the parts since the last lap."""
        seconds, self._seconds = self._seconds, {}
        return {f"time/{name}": value for name, value in seconds.items()}
