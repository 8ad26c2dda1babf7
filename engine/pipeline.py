"""Runs a configuration from preflight to the saved model, and ends it in order whatever happens."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
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
        with _interruptible() as catch_signals:
            for reason in plan.skipped:
                tracker.event("row_skipped", reason=reason)
            if plan.skipped:
                tracker.note(f"{len(plan.skipped)} rows skipped (events.jsonl says why)")
            if config.ray.address is None:
                use_private_token()
            # Ray and the actors' libraries, only once the preflight has passed
            from engine.cluster import connected, started_workers

            with connected(config):
                catch_signals()  # Ray has put its own handler in, which aborts at SIGTERM
                with started_workers(config) as workers:
                    result = RLStage(config, workers, tracker, plan.train_prompts, plan.held_out_prompts).run()
        status = "succeeded"
        return result
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    except Exception as error:
        trace = "".join(traceback.format_exception(error))
        tracker.event("run_failed", error=type(error).__name__, message=str(error), traceback=trace)
        raise
    finally:
        tracker.close(status)


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], None]]:
    """SIGTERM (a job that is stopped) ends the run as Ctrl-C does; a second signal does not cut the clean-up short.

    Yields what puts the handlers in again, should a library have replaced them.
    """
    ignored_until = 0.0

    def interrupt(signum: int, frame: Any) -> None:
        nonlocal ignored_until
        if time.monotonic() >= ignored_until:
            ignored_until = time.monotonic() + CLEAN_UP_S
            raise KeyboardInterrupt

    def catch_signals() -> None:
        if threading.current_thread() is threading.main_thread():
            for number in previous:
                signal.signal(number, interrupt)

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    catch_signals()
    try:
        yield catch_signals
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in previous.items():
                signal.signal(number, handler or signal.SIG_DFL)
