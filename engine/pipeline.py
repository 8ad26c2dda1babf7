"""Runs a configuration from preflight to the saved model, and ends it in order whatever happens."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from engine.config import Config
from engine.plan import prepare
from engine.ray_token import use_private_token
from engine.stages.rl import Result, RLStage
from engine.tracking.tracker import Tracker

CLEAN_UP_S = 15.0
"""An interrupted run ends within this time."""


def run(config: Config) -> Result:
    """Check everything, start the workers, train, save. Returns the final model's folder and both ends' evaluations.

    Ctrl-C and SIGTERM end the run as KeyboardInterrupt, with records flushed and every process gone.

    Raises:
        UserError: something that the user can mend.
        ActorError: a worker failed, or missed a deadline.
    """
    plan = prepare(config)
    tracker = Tracker(config)
    status = "failed"
    try:
        with _interruptible():
            for reason in plan.skipped:
                tracker.event("row_skipped", reason=reason)
            if plan.skipped:
                tracker.note(f"{len(plan.skipped)} rows skipped (events.jsonl says why)")
            if config.ray.address is None:
                use_private_token()
            from engine import cluster  # Ray and the actors' libraries, only once the preflight has passed

            with cluster.connected(config), cluster.started_workers(config) as workers:
                result = RLStage(config, workers, tracker, plan.train_prompts, plan.held_out_prompts).run()
        status = "succeeded"
        return result
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    except Exception as error:
        tracker.event("run_failed", error=type(error).__name__, message=str(error))
        raise
    finally:
        tracker.close(status)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM (a job that is stopped) ends the run as Ctrl-C does; a second signal does not cut the clean-up short."""
    ignored_until = 0.0

    def interrupt(signum: int, frame: Any) -> None:
        nonlocal ignored_until
        if time.monotonic() >= ignored_until:
            ignored_until = time.monotonic() + CLEAN_UP_S
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
