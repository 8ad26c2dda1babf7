"""The records of one run: its folder, configuration, metrics, events, samples and wandb run."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from engine.config import Config, UserError
from engine.tracking.alarms import Alarm
from engine.tracking.events import EventLog, last_wandb_id
from engine.tracking.jsonl import JsonLines, replace_file
from engine.tracking.metrics import MetricsLog, drop_later_metrics
from engine.tracking.redact import redact
from engine.tracking.run_folder import EVENTS, METRICS, SAMPLES, drop_later_samples, make_empty, remove_records
from engine.tracking.wandb_run import WandbRun, check_login

EXIT_CODES = {"succeeded": 0, "failed": 1, "interrupted": 130}
"""How a run can end, and the exit code that says so."""


class Tracker:
    """Everything that a run writes down, under `config.run_dir`."""

    def __init__(self, config: Config, *, resume_step: int | None = None) -> None:
        """Make the run's folder and open its records; on any failure nothing is left behind.

        With `resume_step`, go on in the folder of a run that has ended or was killed: metrics and samples of later
        steps are dropped, those up to that step (an evaluation at it included) and all events stay, and wandb goes on
        with its run. `resume_step=-1` starts the training over: the evaluation at step 0 is dropped too. If that
        fails, the metrics are as they were.

        Without it, the records of a run of this name that ended before its first measurement (a reward function that
        always failed, a cluster that was too small) are replaced; any other run's are never touched. What the
        preflight has put into the folder (`start/`, `corpus/`) stays.

        Raises:
            UserError: the folder holds something already, is in use by a running process, cannot be made or written,
                or wandb cannot start.
            OSError: the disk is full.
        """
        self.run_dir = config.run_dir
        check_login(config)
        with contextlib.ExitStack() as undo:
            made = make_empty(self.run_dir) if resume_step is None else []
            self._events = _open_events(self.run_dir)
            if resume_step is None:
                undo.callback(remove_records, self.run_dir, made)
            undo.callback(self._events.close)
            wandb_id = last_wandb_id(self.run_dir / EVENTS)
            self.wandb = WandbRun(config, self.run_dir, resume_id=wandb_id)
            undo.callback(self.wandb.close, EXIT_CODES["failed"])
            if resume_step is not None:
                drop_later_metrics(self.run_dir / METRICS, resume_step)
                drop_later_samples(self.run_dir / SAMPLES, resume_step)
            snapshot = yaml.safe_dump(redact(config.model_dump(mode="json")), sort_keys=False, allow_unicode=True)
            replace_file(self.run_dir / "config.yaml", snapshot.encode())
            self._metrics = MetricsLog(self.run_dir / METRICS)
            undo.pop_all()
        self._closed = False
        about = {"name": config.name, "seed": config.seed, "device": config.device, "wandb_id": self.wandb.id}
        if resume_step is None:
            self.event("run_started", **about)
        else:
            self.event("run_resumed", step=resume_step, **about)
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
        folder = self.run_dir / SAMPLES
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

    def alarm(self, step: int, alarm: Alarm) -> None:
        """Tell a person that something is wrong with the run: on the console, as an event, as an alert of wandb."""
        print(redact(f"ALARM {alarm.kind}, step {step}: {alarm.message}"), flush=True)
        self.event("alarm", step=step, alarm=alarm.kind, subject=alarm.subject, text=alarm.message)
        if not self.wandb.alert(alarm.kind, f"step {step}: {alarm.message}"):
            self.event("alert_not_sent", step=step, alarm=alarm.kind)

    def go_back(self, step: int) -> None:
        """Drop metrics and samples of later steps, which are to be made again; -1 drops all. Events stay."""
        self._metrics.close()
        drop_later_metrics(self.run_dir / METRICS, step)
        drop_later_samples(self.run_dir / SAMPLES, step)
        self._metrics = MetricsLog(self.run_dir / METRICS)
        self.event("went_back", step=step)

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


def _open_events(run_dir: Path) -> EventLog:
    """The run's events, which no other process can have open."""
    try:
        return EventLog(run_dir / EVENTS)
    except BlockingIOError:
        raise UserError(f"{run_dir} is the folder of a run that is still going; wait for it, or stop it") from None
    except OSError as error:
        raise UserError(
            f"{run_dir / EVENTS}: cannot be opened: {error.strerror}; the run's folder must be there and writable"
        ) from None
