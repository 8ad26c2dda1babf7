"""The processes that the user's reward functions run in, each call with a deadline.

    submit(call) ----------------------> a worker: call, check --> future        one call at a time; killed when late
    submit(call of an async function) -> actors/awaited_calls.py --> future      many at the same time

Nothing but specs and samples is pickled. Exceptions come back as text, so that one that cannot be unpickled does no
harm.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from concurrent.futures import TimeoutError as DeadlineError
from dataclasses import dataclass
from functools import partial
from typing import Any

from pebble import CONSTS, ProcessPool

from actors.awaited_calls import AwaitedCalls
from actors.fork_server import START_DEADLINE, WorkerContext, become_worker
from engine.config import RewardsConfig, UserError
from engine.rewards.contract import Failure, Outcome, RewardFunction, Sample, resolve_all
from engine.user_code import describe_error

CONSTS.sleep_unit = 0.02
"""Seconds after which pebble looks again for late and dead workers."""


@dataclass(frozen=True)
class Function:
    """What the pool must know of a reward function; the function itself stays in the workers."""

    name: str
    timeout: float
    on_error: str
    batch: bool
    awaited: bool
    """It takes one sample and is async."""


class RewardWorkers:
    """One generation of worker processes. When they have died too often, it is over and another must be made."""

    def __init__(self, rewards: RewardsConfig) -> None:
        """Start the processes."""
        self._config = rewards
        self._environment = dict(os.environ)
        self._lock = threading.Lock()
        self._awaited: dict[int, AwaitedCalls] = {}
        self._context = WorkerContext()
        self._pool = ProcessPool(
            max_workers=rewards.workers,
            initializer=_start_worker,
            initargs=(rewards, self._environment),
            context=self._context,
        )
        assert self._pool.active, "reading `active` starts the workers"

    @property
    def alive(self) -> bool:
        """Whether calls are taken."""
        return self._pool.active

    def functions(self) -> list[Function]:
        """What the configuration names, once a worker has imported it.

        Raises:
            UserError: a reward function cannot be imported or used as it is.
        """
        try:
            call = self._pool.schedule(_describe)
            deadline = time.monotonic() + START_DEADLINE
            while not call.done() and self.alive and time.monotonic() < deadline:
                wait([call], timeout=0.2)  # a pool that breaks forgets a call that has just come
            answer = call.result(timeout=0)
        except (DeadlineError, RuntimeError):  # a RuntimeError: the pool is broken
            raise UserError(
                f"rewards.functions: importing the reward functions took longer than {START_DEADLINE:.0f} s; "
                "move slow work out of the top level of their files"
                if self.alive
                else "rewards.functions: the process that imports the reward functions dies; run "
                "`python -c 'import ...'` on their modules to see why"
            ) from None
        if isinstance(answer, str):
            raise UserError(answer)
        return answer

    def submit(self, number: int, function: Function, samples: Sequence[Sample], *, alone: bool) -> Future[Any]:
        """Call the function of this number; the future gives an outcome for each sample, or one failure of all.

        With `alone` an async function's call gets a process for itself, as any other's does; else the future may give
        `LostCallError`.
        """
        if alone or not function.awaited:
            return self._pool.schedule(_call, args=(number, list(samples)), timeout=function.timeout)
        [sample] = samples
        with self._lock:
            if number not in self._awaited:
                load = partial(_load_one, self._config, self._environment, number)
                self._awaited[number] = AwaitedCalls(load, self._config.workers)
        return self._awaited[number].submit(sample)

    def stop(self) -> None:
        """End all processes. Calls that are running are lost."""
        for calls in self._awaited.values():
            calls.stop()
        self._pool.stop()
        self._pool.join()


# ---- in the worker processes ----

_functions: list[RewardFunction] | str = "not started"
"""The resolved reward functions of this worker, or why there are none."""


def _start_worker(rewards: RewardsConfig, environment: dict[str, str]) -> None:
    """Import the user's functions."""
    global _functions
    become_worker(environment)
    try:
        _functions = resolve_all(rewards)
    except UserError as error:
        _functions = str(error)


def _load_one(rewards: RewardsConfig, environment: dict[str, str], number: int) -> RewardFunction:
    become_worker(environment)
    return resolve_all(rewards)[number]


def _describe() -> list[Function] | str:
    if isinstance(_functions, str):
        return _functions
    return [Function(f.name, f.timeout, f.on_error, f.batch, f.is_async) for f in _functions]


def _call(number: int, samples: list[Sample]) -> list[Outcome] | Failure:
    if isinstance(_functions, str):
        return Failure(_functions)
    try:
        return _functions[number](samples)
    except BaseException as error:  # SystemExit too: whatever the user's code raises is reported, not obeyed
        return Failure(describe_error(error))
