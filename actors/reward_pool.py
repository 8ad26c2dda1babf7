"""Runs the user's reward functions in processes of their own, with deadlines.

    score() threads --> queue of calls --> worker processes: import the functions once, then call, check, answer
                  <-- answers, errors, deadlines (a late worker is killed and replaced) <--

Nothing but specs and samples is pickled. Exceptions come back as text, so that one that cannot be unpickled does no
harm. A plain class: the cluster makes a Ray actor of it.
"""

from __future__ import annotations

import ctypes
import math
import os
import queue
import signal
import sys
import threading
import time
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as DeadlineError
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

import numpy as np
from pebble import ProcessExpired, ProcessPool

from engine.config import RewardsConfig, UserError
from engine.rewards.contract import Outcome, RewardError, Sample, Scores, resolve_all
from engine.user_code import describe_error

START_DEADLINE = 120.0
"""Seconds in which a worker must have imported the user's functions."""
_REISSUES = 3
_REMEDY = "mend the function (events.jsonl holds each failure)"
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class _Function:
    """What the pool must know of a reward function; the function itself stays in the workers."""

    name: str
    timeout: float
    on_error: str
    batch: bool


@dataclass
class _Call:
    """One function on some of the samples."""

    function: int
    positions: list[int]
    unanswered: list[int]
    """Positions without a reward so far."""
    attempt: int = 1
    reissued: int = 0
    pool: ProcessPool | None = None


class RewardPool:
    """Worker processes that score samples: `start` first; `score` may be called from several threads at once."""

    def __init__(self, rewards: RewardsConfig) -> None:
        self._config = rewards
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._functions: list[_Function] = []
        self._successes: dict[str, int] = {}
        self._failures: dict[str, int] = {}
        self._progress = time.monotonic()
        self._pool: ProcessPool | None = None
        # Linux tells a worker of its parent's death when the *thread* that started it ends, so one of ours stays alive.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="reward-pool")

    def start(self) -> None:
        """Start the workers and import the reward functions in them. After an error the pool is closed.

        Not part of the constructor because Ray aborts, loudly, an actor with threads whose constructor raises.

        Raises:
            UserError: a reward function cannot be imported or used as it is.
        """
        try:
            self._pool = self._starter.submit(self._open_pool).result()
            self._functions = self._warm_up(self._pool)
        except BaseException:
            self.close()
            raise

    def _open_pool(self) -> ProcessPool:
        pool = ProcessPool(
            max_workers=self._config.workers,
            initializer=_start_worker,
            initargs=(self._config, os.getpid()),
            context=_WorkerContext(),
        )
        assert pool.active, "reading `active` starts the workers, in this thread"
        return pool

    def _warm_up(self, pool: ProcessPool) -> list[_Function]:
        try:
            answer = pool.schedule(_describe).result(timeout=START_DEADLINE)
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

    def score(self, samples: list[Sample]) -> Scores:
        """Evaluate every function on the samples; returns when each has a reward or is dropped.

        A per-sample function gets one call for each sample, with a deadline of its own; a batch function one call for
        all. A failed call is repeated `rewards.retries` times.

        Raises:
            RewardError: a function with on_error "fail" failed; one has failed on `rewards.stop_after_failures` samples
                without a success since the start; or no call makes progress.
        """
        scoring = _Scoring(samples, self._functions)
        finished: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
        pending: dict[Future[Any], _Call] = {}
        waiting = scoring.calls()
        self._progress = time.monotonic()
        try:
            while pending or waiting:
                for call in waiting:
                    future = self._submit(call, samples)
                    pending[future] = call
                    future.add_done_callback(finished.put)
                waiting = []
                done = self._next_finished(finished, pending)
                if done is not None:
                    call = pending.pop(done)
                    waiting = [call] if self._settle(scoring, call, done) else []
        except RewardError as error:
            error.incidents = scoring.incidents
            raise
        finally:
            for future in pending:
                future.cancel()
        return scoring.scores()

    def _submit(self, call: _Call, samples: list[Sample]) -> Future[Any]:
        arguments = (call.function, [samples[p] for p in call.positions])
        with self._lock:
            if self._closed.is_set():
                raise RuntimeError("the reward pool is closed")
            assert self._pool is not None, "start() comes before score()"
            if not self._pool.active:
                _stop(self._pool)
                self._pool = self._starter.submit(self._open_pool).result()
            call.pool = self._pool
            return self._pool.schedule(_call, args=arguments, timeout=self._functions[call.function].timeout)

    def _next_finished(
        self, finished: queue.SimpleQueue[Future[Any]], pending: dict[Future[Any], _Call]
    ) -> Future[Any] | None:
        """A finished call, or None after a second without one."""
        try:
            future = finished.get(timeout=1.0)
        except queue.Empty:
            if self._closed.is_set():
                raise RuntimeError("the reward pool is closed") from None
            silent = time.monotonic() - self._progress
            if silent > START_DEADLINE + max(f.timeout for f in self._functions):
                raise RewardError(
                    f"no reward call has ended for {silent:.0f} s: the worker processes do not come up again; look for "
                    "slow or crashing code at the top level of the reward files"
                ) from None
            for future, call in pending.items():
                if call.pool is not None and not call.pool.active:
                    future.cancel()  # a broken pool forgets the calls that it had not sent to a worker
            return None
        self._progress = time.monotonic()
        return future

    def _settle(self, scoring: _Scoring, call: _Call, future: Future[Any]) -> bool:
        """Take in what a call came to. True: repeat it."""
        function = self._functions[call.function]
        kind, answer = "reward_error", ""
        try:
            answer = future.result()
        except DeadlineError:
            kind, answer = "reward_timeout", f"took longer than {function.timeout:g} s"
        except ProcessExpired as error:
            answer = f"the worker process died ({_exit_reason(error.exitcode)})"
        except (BrokenProcessPool, CancelledError):
            if call.reissued < _REISSUES:
                call.reissued += 1
                return True
            answer = "the worker processes died"
        except Exception as error:
            answer = describe_error(error)
        asked = len(call.unanswered)
        failed = scoring.take(call, answer, kind)
        with self._lock:
            self._successes[function.name] = self._successes.get(function.name, 0) + asked - len(call.unanswered)
        if not failed:
            return False
        if call.attempt <= self._config.retries:
            call.attempt += 1
            return True
        self._give_up(scoring, call, kind, failed)
        return False

    def _give_up(self, scoring: _Scoring, call: _Call, kind: str, message: str) -> None:
        function = self._functions[call.function]
        ids = [scoring.samples[p].id for p in call.unanswered]
        who = f"sample {ids[0]}" if len(ids) == 1 else f"{len(ids)} samples ({ids[0]}, ...)"
        if function.on_error == "fail":
            raise RewardError(
                f"reward function {function.name!r} failed on {who} (on_error: fail): {message}; {_REMEDY}"
            )
        with self._lock:
            self._failures[function.name] = self._failures.get(function.name, 0) + len(ids)
            failures, successes = self._failures[function.name], self._successes[function.name]
        if successes == 0 and failures >= self._config.stop_after_failures:
            raise RewardError(
                f"reward function {function.name!r} has failed on {failures} samples without one success "
                f"(rewards.stop_after_failures); the last error, on {who}: {message}; {_REMEDY}"
            )
        for position in call.unanswered:
            scoring.dropped.setdefault(position, kind)

    def close(self) -> None:
        """End all worker processes. Calls that are running are lost; calling it again does nothing."""
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
            if self._pool is not None:
                _stop(self._pool)
        self._starter.shutdown()


class _Scoring:
    """The samples of one `score` call and what is known of them so far."""

    def __init__(self, samples: list[Sample], functions: list[_Function]) -> None:
        self.samples = samples
        self.functions = functions
        self.dropped: dict[int, str] = {}
        self.incidents: list[dict[str, Any]] = []
        self._values = {f.name: self._no_opinion() for f in functions}
        self._steps: dict[str, list[np.ndarray | None]] = {}

    def _no_opinion(self) -> np.ndarray:
        return np.full(len(self.samples), np.nan, np.float32)

    def calls(self) -> list[_Call]:
        """All samples for each batch function, one for each call of the others."""
        everything = list(range(len(self.samples)))
        groups = [
            (i, [everything] if f.batch and everything else [[p] for p in everything])
            for i, f in enumerate(self.functions)
        ]
        return [_Call(i, positions, list(positions)) for i, group in groups for positions in group]

    def take(self, call: _Call, answer: list[Outcome] | str, kind: str) -> str | None:
        """Keep the rewards, record failures as incidents. Returns the last failure's message, None if there is none.

        Rewards that an earlier attempt of the call gave are kept.
        """
        if isinstance(answer, str):
            alone = self.samples[call.positions[0]].id if len(call.positions) == 1 else None
            self._record(call, kind, alone, answer)
            return answer
        message = None
        for position, outcome in zip(call.positions, answer, strict=True):
            if position not in call.unanswered:
                continue
            if isinstance(outcome, str):
                message = outcome
                self._record(call, kind, self.samples[position].id, outcome)
                continue
            call.unanswered.remove(position)
            for name, value in outcome.items():
                values = self._values.setdefault(name, self._no_opinion())
                values[position] = math.fsum(value) if isinstance(value, tuple) else value
                if isinstance(value, tuple):
                    self._steps.setdefault(name, [None] * len(self.samples))[position] = np.array(value)
        return message

    def _record(self, call: _Call, kind: str, sample_id: int | None, message: str) -> None:
        name = self.functions[call.function].name
        incident = {"kind": kind, "function": name, "sample_id": sample_id, "attempt": call.attempt, "message": message}
        self.incidents.append(incident)

    def scores(self) -> Scores:
        """The components, once every call is settled."""
        dropped = dict(sorted(self.dropped.items()))
        return Scores(self._values, self._no_opinion(), dropped, self.incidents, self._steps)


def _exit_reason(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _stop(pool: ProcessPool) -> None:
    pool.stop()
    pool.join()


# ---- in the worker processes ----

_functions: list[Any] | str = "not started"
"""The resolved reward functions of this worker, or why there are none."""


def _start_worker(rewards: RewardsConfig, parent: int) -> None:
    """Make the process end with its parent and at the first signal, then import the user's functions."""
    global _functions
    os.setpgid(0, 0)  # with it end the processes that the user's code has started
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        _functions = resolve_all(rewards)
    except UserError as error:
        _functions = str(error)


def _describe() -> list[_Function] | str:
    if isinstance(_functions, str):
        return _functions
    return [_Function(f.name, f.timeout, f.on_error, f.batch) for f in _functions]


def _call(function: int, samples: list[Sample]) -> list[Outcome] | str:
    if isinstance(_functions, str):
        return _functions
    try:
        return _functions[function](samples)
    except BaseException as error:  # SystemExit too: whatever the user's code raises is reported, not obeyed
        return describe_error(error)


# ---- how the worker processes are started ----

_starting = threading.Lock()


class _WorkerProcess(SpawnProcess):
    """A spawned process that leaves the parent's `__main__` alone and takes its own children with it."""

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


class _WorkerContext(SpawnContext):
    """Pebble's processes are ours."""

    Process = _WorkerProcess
