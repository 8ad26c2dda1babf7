"""The processes that the user's reward functions run in, each call with a deadline.

    submit(call) ------------------------------> a worker: call, check --> future
    submit(call of an async function) --joined--> a worker: await them all at once --> a future for each

Workers are forked from a server process that has imported all but the user's code, so that one that was killed for
being late is replaced at once. Nothing but specs and samples is pickled. Exceptions come back as text, so that one that
cannot be unpickled does no harm.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as DeadlineError
from dataclasses import dataclass
from functools import partial
from importlib.machinery import ModuleSpec
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

from pebble import ProcessPool

from engine.config import RewardsConfig, UserError
from engine.rewards.contract import Failure, Outcome, RewardFunction, Sample, resolve_all
from engine.user_code import describe_error

START_DEADLINE = 120.0
"""Seconds in which a worker must have imported the user's functions."""
JOINED = 16
"""Most samples of an async function that one worker awaits at once."""
_GRACE = 2.0
"""Seconds that joined samples, each with a deadline of its own, have beyond it."""
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Function:
    """What the pool must know of a reward function; the function itself stays in the workers."""

    name: str
    timeout: float
    on_error: str
    batch: bool
    awaited: bool
    """It takes one sample and is async: a worker awaits several at once."""


class JoinedCallError(Exception):
    """A call of several samples was lost with all of them; each must be asked alone."""


class RewardWorkers:
    """One generation of worker processes. When they have died too often, it is over and another must be made."""

    def __init__(self, rewards: RewardsConfig) -> None:
        """Start the processes."""
        _start_fork_server()
        self._config = rewards
        self._lock = threading.RLock()
        self._waiting: dict[int, deque[tuple[Sample, Future[Any]]]] = {}
        self._running: dict[int, int] = {}
        self._context = _WorkerContext()
        self._pool = ProcessPool(
            max_workers=rewards.workers,
            initializer=_start_worker,
            initargs=(rewards, dict(os.environ)),
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
            answer = self._pool.schedule(_describe).result(timeout=START_DEADLINE)
        except DeadlineError:
            raise UserError(
                f"rewards.functions: importing the reward functions took longer than {START_DEADLINE:.0f} s; "
                "move slow work out of the top level of their files"
            ) from None
        except RuntimeError:  # the pool is broken
            raise UserError(
                "rewards.functions: the process that imports the reward functions dies; run "
                "`python -c 'import ...'` on their modules to see why"
            ) from None
        if isinstance(answer, str):
            raise UserError(answer)
        return answer

    def submit(self, number: int, function: Function, samples: Sequence[Sample], *, alone: bool) -> Future[Any]:
        """Call the function of this number; the future gives an outcome for each sample, or one failure of all.

        With `alone` an async function's sample is not joined with others.
        """
        if alone or not function.awaited:
            return self._pool.schedule(_call, args=(number, list(samples)), timeout=function.timeout)
        [sample] = samples
        answer: Future[Any] = Future()
        with self._lock:
            self._waiting.setdefault(number, deque()).append((sample, answer))
            self._join(number, function)
        return answer

    def _join(self, number: int, function: Function) -> None:
        """Give waiting samples to the workers, as many at once as there are when a worker is free."""
        waiting = self._waiting[number]
        while waiting and self._running.get(number, 0) < self._config.workers and self._pool.active:
            part = [waiting.popleft() for _ in range(min(JOINED, len(waiting)))]
            self._running[number] = self._running.get(number, 0) + 1
            samples = [sample for sample, _ in part]
            task = self._pool.schedule(_call_joined, args=(number, samples), timeout=function.timeout + _GRACE)
            task.add_done_callback(partial(self._part, number, function, [answer for _, answer in part]))

    def _part(self, number: int, function: Function, answers: list[Future[Any]], task: Future[Any]) -> None:
        """Take joined samples apart again."""
        lost = task.cancelled() or task.exception() is not None
        outcomes = [] if lost else task.result()
        with self._lock:
            self._running[number] -= 1
            self._join(number, function)
        for i, answer in enumerate(answers):
            with contextlib.suppress(InvalidStateError):  # nobody waits for it any more
                if lost:
                    answer.set_exception(JoinedCallError())
                else:
                    answer.set_result([outcomes[i]])

    def stop(self) -> None:
        """End all processes. Calls that are running are lost."""
        self._pool.stop()
        self._pool.join()


# ---- in the worker processes ----

_functions: list[RewardFunction] | str = "not started"
"""The resolved reward functions of this worker, or why there are none."""


def _start_worker(rewards: RewardsConfig, environment: dict[str, str]) -> None:
    """Make the process end with its parent and at the first signal, then import the user's functions."""
    global _functions
    os.setpgid(0, 0)  # with it end the processes that the user's code has started
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = os.getppid()  # the fork server, which ends when nobody holds this pipe any more: not us, then
    os.close(forkserver._forkserver._forkserver_alive_fd)  # type: ignore[attr-defined]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    os.environ.clear()
    os.environ.update(environment | {"OMP_NUM_THREADS": "1"})
    try:
        _functions = resolve_all(rewards)
    except UserError as error:
        _functions = str(error)


def _describe() -> list[Function] | str:
    if isinstance(_functions, str):
        return _functions
    return [Function(f.name, f.timeout, f.on_error, f.batch, f.awaited) for f in _functions]


def _call(number: int, samples: list[Sample]) -> list[Outcome] | Failure:
    if isinstance(_functions, str):
        return Failure(_functions)
    try:
        return _functions[number](samples)
    except BaseException as error:  # SystemExit too: whatever the user's code raises is reported, not obeyed
        return Failure(describe_error(error))


def _call_joined(number: int, samples: list[Sample]) -> list[Outcome]:
    if isinstance(_functions, str):
        return [Failure(_functions)] * len(samples)
    return _functions[number].await_all(samples)


# ---- how the worker processes are started ----

_starting = threading.Lock()


class _WorkerProcess(ForkServerProcess):
    """A forked process that leaves the parent's `__main__` alone and takes its own children with it."""

    def start(self) -> None:
        """Start without importing the parent's main script again (Ray's worker script, or an unguarded one)."""
        main = sys.modules["__main__"]
        with _starting:
            spec = main.__spec__
            main.__spec__ = ModuleSpec("reward_worker.__main__", None)  # multiprocessing imports no `*.__main__`
            try:
                super().start()
            finally:
                main.__spec__ = spec

    def terminate(self) -> None:
        """Kill the worker and every process in its group."""
        assert self.pid is not None
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has not made its group yet, or is gone
            self.kill()


class _WorkerContext(ForkServerContext):
    """Pebble's processes are ours, and their locks live as long as the context: a worker may just be starting."""

    Process = _WorkerProcess

    def __init__(self) -> None:
        super().__init__()
        self._locks: list[Any] = []

    def RLock(self) -> Any:  # noqa: N802, multiprocessing's name
        """A lock that is kept."""
        self._locks.append(super().RLock())
        return self._locks[-1]


def _start_fork_server() -> None:
    """Start it, if it is not running, with this process's modules at hand."""
    with _starting:
        given = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        try:
            forkserver.set_forkserver_preload([__name__])
            forkserver.ensure_running()
        finally:
            del os.environ["PYTHONPATH"]
            os.environ.update({} if given is None else {"PYTHONPATH": given})
