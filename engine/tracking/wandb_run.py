"""Weights & Biases: the same metrics, online or offline, and nothing that could hold a secret.

wandb collects the command line, environment, git remote, code and console of a process unless told otherwise; all of
that is switched off here, and the configuration is redacted. It is imported only when it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.config import Config, UserError
from engine.tracking.jsonl import plain
from engine.tracking.redact import redact

FINISH_SECONDS = 10.0
"""Longest wait for uploads at the end; what is left stays on disk for `wandb sync`. Ctrl-C must end a run in 15 s."""


def check_login(config: Config) -> None:
    """Raise UserError when `tracking.wandb` is online and there is no key that the server accepts."""
    if config.tracking.wandb != "online":
        return
    import wandb

    try:
        found, why = wandb.login(prompt=False, verify=True, timeout=30), "no API key was found"
    except (wandb.Error, OSError, ValueError) as error:
        found, why = False, str(redact(str(error)))
    if not found:
        raise UserError(
            f"tracking.wandb: online, but {why}; run `wandb login` or set WANDB_API_KEY, "
            "or use tracking.wandb=offline and upload later with `wandb sync`"
        )


class WandbRun:
    """One wandb run in the mode that `config.tracking` names; every method does nothing when that is disabled."""

    def __init__(self, config: Config, run_dir: Path, *, resume_id: str | None = None) -> None:
        """Start the run, or go on with that of an id; its files go to `run_dir/wandb`. Call `check_login` first.

        wandb ignores steps below the last one it has, so those that a run repeats after a kill are there once.

        Raises:
            UserError: the server refuses the run (project or entity unknown, no connection).
        """
        self._run: Any = None
        if config.tracking.wandb == "disabled":
            return
        import wandb

        settings = wandb.Settings(
            console="off",
            quiet=True,
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            save_code=False,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
            finish_timeout=FINISH_SECONDS,
        )
        tracking = redact(config.tracking.model_dump())
        try:
            self._run = wandb.init(
                mode=config.tracking.wandb,
                dir=str(run_dir),
                id=resume_id,
                resume="allow" if resume_id else None,
                name=redact(config.name),
                project=tracking["project"],
                config=redact(config.model_dump(mode="json")),
                settings=settings,
            )
        except wandb.Error as error:
            raise UserError(
                f"tracking: wandb cannot start: {redact(str(error))}; check tracking.project and WANDB_ENTITY, "
                "or use tracking.wandb=offline"
            ) from None

    @property
    def id(self) -> str | None:
        """wandb's id of this run, for resuming it; None when disabled."""
        return self._run.id if self._run else None

    @property
    def url(self) -> str | None:
        """Page of this run; None unless online."""
        return self._run.url if self._run else None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log numbers at a step; steps never decrease. NaN and infinities are left out."""
        if self._run:
            self._run.log({key: value for key, value in plain(dict(metrics)).items() if value is not None}, step=step)

    def alert(self, title: str, text: str) -> bool:
        """Send an alert (to mail or Slack, as the user has chosen there); False where wandb could not."""
        if self._run is None:
            return True
        try:
            self._run.alert(redact(title), redact(text), level="WARN")
        except Exception:  # a run does not end because nobody could be told
            return False
        return True

    def close(self, exit_code: int) -> None:
        """Finish the run: exit code 0 marks it finished, any other failed. A second call does nothing."""
        run, self._run = self._run, None
        if run:
            run.finish(exit_code=exit_code)
