"""A process that awaits the calls of one async reward function, many at once, so that a slow one holds up no other.

    submit(sample) --pipe--> event loop: a task for each sample, with its deadline --pipe--> the sample's future

The loop gives a sign of life all the time. When it gives none, the function blocks it (or has ended the process): the
process is killed, and its calls fail with `LostCallError`; whoever asked must ask for each alone, in a process where it
can be ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing.connection import Connection
from typing import Any

from actors.fork_server import START_DEADLINE, WorkerContext
from engine.rewards.contract import Outcome, RewardFunction, Sample

BLOCKED_S = 10.0
"""Seconds without a sign of life."""
CONCURRENT = 16
"""Calls awaited at once, for each of `rewards.workers`."""
_SIGN_S = 0.25

Load = Callable[[], RewardFunction]
"""Makes the process end with its parent, and gives the function."""


class LostCallError(Exception):
    """The process that awaited the call is gone, perhaps because of another call."""


class AwaitedCalls:
    """The calls of one function."""

    def __init__(self, load: Load, workers: int) -> None:
        """Start the process, which will call `load`; it must pickle."""
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._ids = itertools.count()
        self._pending: dict[int, Future[Any]] = {}
        self._lost = False
        self._context = WorkerContext()
        self._pipe, theirs = self._context.Pipe()
        self._process = self._context.Process(target=_serve, args=(load, theirs, CONCURRENT * workers))
        self._process.start()
        theirs.close()
        threading.Thread(target=self._listen, name="awaited-calls", daemon=True).start()

    def submit(self, sample: Sample) -> Future[Any]:
        """The future gives the sample's outcome in a list, or `LostCallError`."""
        answer: Future[Any] = Future()
        with self._lock:
            number = next(self._ids)
            self._pending[number] = answer
            lost = self._lost
        if lost:
            self._fail()
            return answer
        with self._sending, contextlib.suppress(OSError):  # of one that has just died the listener tells all who wait
            self._pipe.send((number, sample))
        return answer

    def stop(self) -> None:
        """End the process; what is pending is lost."""
        self._process.terminate()
        self._process.join()

    def _listen(self) -> None:
        patience = START_DEADLINE
        try:
            while self._pipe.poll(patience):
                said = self._pipe.recv()
                patience = BLOCKED_S
                if said is not None:
                    number, outcome = said
                    with self._lock:
                        answer = self._pending.pop(number)
                    if answer.set_running_or_notify_cancel():
                        answer.set_result([outcome])
        except (EOFError, OSError):
            pass
        self._process.terminate()
        self._fail()

    def _fail(self) -> None:
        with self._lock:
            self._lost, pending, self._pending = True, self._pending, {}
        for answer in pending.values():
            if answer.set_running_or_notify_cancel():
                answer.set_exception(LostCallError())


def _serve(load: Load, pipe: Connection, concurrent: int) -> None:
    asyncio.run(_await_calls(load(), pipe, concurrent))


async def _await_calls(function: RewardFunction, pipe: Connection, concurrent: int) -> None:
    slots = asyncio.Semaphore(concurrent)
    tasks: set[asyncio.Task[None]] = set()

    async def answer(number: int, sample: Sample) -> None:
        async with slots:
            outcome: Outcome = await function.awaited(sample)
        pipe.send((number, outcome))

    def receive() -> None:
        try:
            number, sample = pipe.recv()
        except EOFError:
            os._exit(0)  # nobody waits any more
        task = asyncio.get_running_loop().create_task(answer(number, sample))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    asyncio.get_running_loop().add_reader(pipe.fileno(), receive)
    while True:
        pipe.send(None)
        await asyncio.sleep(_SIGN_S)
