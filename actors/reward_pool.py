"""Scores samples with the user's reward functions: a reward for each, or a reason why it has none.

    score() threads --> calls --> worker processes (actors/reward_workers.py)
                  <-- answers, errors, deadlines: kept, repeated, or given up as `on_error` says

A plain class: the cluster makes a Ray actor of it.
"""

from __future__ import annotations

import math
import queue
import signal
import threading
import time
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as DeadlineError
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np
from pebble import ProcessExpired

from actors.awaited_calls import LostCallError
from actors.fork_server import START_DEADLINE
from actors.reward_workers import Function, RewardWorkers
from engine.config import RewardsConfig
from engine.rewards.contract import Failure, Outcome, RewardError, Sample, Scores
from engine.user_code import describe_error

_REISSUES = 3
_BLOCKS = (
    "an async function blocked its event loop or ended its process; its calls run one by one from here on, as those of "
    "a plain function do: await what takes long, or give it to asyncio.to_thread"
)
_REMEDY = "mend the function (events.jsonl holds each failure)"


@dataclass
class _Call:
    """One function on some of the samples."""

    function: int
    positions: list[int]
    unanswered: list[int]
    """Positions without a reward so far."""
    attempt: int = 1
    reissued: int = 0
    workers: RewardWorkers | None = None
    """Who has it."""


class RewardPool:
    """Worker processes that score samples: `start` first; `score` may be called from several threads at once."""

    def __init__(self, rewards: RewardsConfig) -> None:
        self._config = rewards
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._functions: list[Function] = []
        self._blocking: set[int] = set()
        self._successes: dict[str, int] = {}
        self._failures: dict[str, int] = {}
        self._progress = time.monotonic()
        self._workers: RewardWorkers | None = None

    def start(self) -> None:
        """Start the workers and import the reward functions in them. After an error the pool is closed.

        Not part of the constructor because Ray aborts, loudly, an actor with threads whose constructor raises.

        Raises:
            UserError: a reward function cannot be imported or used as it is.
        """
        try:
            self._workers = RewardWorkers(self._config)
            self._functions = self._workers.functions()
        except BaseException:
            self.close()
            raise

    def score(self, samples: list[Sample]) -> Scores:
        """Evaluate every function on the samples; returns when each has a reward or is dropped.

        A per-sample function gets one call for each sample, with a deadline of its own, those of an async one many
        at a time; a batch function one call for all. A failed call is repeated `rewards.retries` times.

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
        chosen = [samples[p] for p in call.positions]
        with self._lock:
            if self._closed.is_set():
                raise RuntimeError("the reward pool is closed")
            assert self._workers is not None, "start() comes before score()"
            if not self._workers.alive:
                self._workers.stop()
                self._workers = RewardWorkers(self._config)
            call.workers = self._workers
            alone = call.function in self._blocking
            return self._workers.submit(call.function, self._functions[call.function], chosen, alone=alone)

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
                if call.workers is not None and not call.workers.alive:
                    future.cancel()  # workers that have died forget the calls that had not reached one of them
            return None
        self._progress = time.monotonic()
        return future

    def _settle(self, scoring: _Scoring, call: _Call, future: Future[Any]) -> bool:
        """Take in what a call came to. True: repeat it."""
        function = self._functions[call.function]
        answer: list[Outcome] | Failure
        try:
            answer = future.result()
        except DeadlineError:
            answer = Failure(f"took longer than {function.timeout:g} s", "reward_timeout")
        except LostCallError:
            self._ask_alone(scoring, call)
            return True
        except ProcessExpired as error:
            answer = Failure(f"the worker process died ({_exit_reason(error.exitcode)})")
        except (BrokenProcessPool, CancelledError):
            if call.reissued < _REISSUES:
                call.reissued += 1
                return True
            answer = Failure("the worker processes died")
        except Exception as error:
            answer = Failure(describe_error(error))
        asked = len(call.unanswered)
        failure = scoring.take(call, answer)
        with self._lock:
            self._successes[function.name] = self._successes.get(function.name, 0) + asked - len(call.unanswered)
        if failure is None:
            return False
        if call.attempt <= self._config.retries:
            call.attempt += 1
            return True
        self._give_up(scoring, call, failure)
        return False

    def _ask_alone(self, scoring: _Scoring, call: _Call) -> None:
        """From here on each call of the function gets a process for itself, where it can be ended."""
        with self._lock:
            known = call.function in self._blocking
            self._blocking.add(call.function)
        if not known:
            scoring.record(call, None, Failure(_BLOCKS, "reward_blocks_loop"))

    def _give_up(self, scoring: _Scoring, call: _Call, failure: Failure) -> None:
        function = self._functions[call.function]
        ids = [scoring.samples[p].id for p in call.unanswered]
        who = f"sample {ids[0]}" if len(ids) == 1 else f"{len(ids)} samples ({ids[0]}, ...)"
        if function.on_error == "fail":
            raise RewardError(
                f"reward function {function.name!r} failed on {who} (on_error: fail): {failure.message}; {_REMEDY}"
            )
        with self._lock:
            self._failures[function.name] = self._failures.get(function.name, 0) + len(ids)
            failures, successes = self._failures[function.name], self._successes[function.name]
        if successes == 0 and failures >= self._config.stop_after_failures:
            raise RewardError(
                f"reward function {function.name!r} has failed on {failures} samples without one success "
                f"(rewards.stop_after_failures); the last error, on {who}: {failure.message}; {_REMEDY}"
            )
        for position in call.unanswered:
            scoring.dropped.setdefault(position, failure.kind)

    def close(self) -> None:
        """End all worker processes. Calls that are running are lost; calling it again does nothing."""
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
            if self._workers is not None:
                self._workers.stop()


class _Scoring:
    """The samples of one `score` call and what is known of them so far."""

    def __init__(self, samples: list[Sample], functions: list[Function]) -> None:
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

    def take(self, call: _Call, answer: list[Outcome] | Failure) -> Failure | None:
        """Keep the rewards, record failures as incidents. Returns the last failure, None if there is none.

        Rewards that an earlier attempt of the call gave are kept.
        """
        if isinstance(answer, Failure):
            alone = self.samples[call.positions[0]].id if len(call.positions) == 1 else None
            self.record(call, alone, answer)
            return answer
        failure = None
        for position, outcome in zip(call.positions, answer, strict=True):
            if position not in call.unanswered:
                continue
            if isinstance(outcome, Failure):
                failure = outcome
                self.record(call, self.samples[position].id, outcome)
                continue
            call.unanswered.remove(position)
            for name, value in outcome.items():
                values = self._values.setdefault(name, self._no_opinion())
                values[position] = math.fsum(value) if isinstance(value, tuple) else value
                if isinstance(value, tuple):
                    self._steps.setdefault(name, [None] * len(self.samples))[position] = np.array(value)
        return failure

    def record(self, call: _Call, sample_id: int | None, failure: Failure) -> None:
        """Keep an incident."""
        name = self.functions[call.function].name
        self.incidents.append(
            {"kind": failure.kind, "function": name, "sample_id": sample_id, "attempt": call.attempt}
            | {"message": failure.message}
        )

    def scores(self) -> Scores:
        """The components, once every call is settled."""
        dropped = dict(sorted(self.dropped.items()))
        return Scores(self._values, self._no_opinion(), dropped, self.incidents, self._steps)


def _exit_reason(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
