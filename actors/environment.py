"""Runs the user's environments in a process of their own, many episodes at once.

    reset / step / close  -->  the episode's own thread and event loop  -->  user code

Blocking user code holds up its own episode only. A call over its deadline is told as late; its thread cannot be ended
and is counted, and when too many hang the process ends itself and Ray starts a new one. Exceptions travel as text.
A plain class: the cluster makes a Ray actor of it.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import queue
import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as DeadlineError
from typing import Any

from engine.config import EnvironmentConfig
from engine.environments.contract import (
    EnvironmentReplyError,
    Message,
    Turn,
    checked_messages,
    checked_turn,
    load_environment,
)
from engine.row import Row
from engine.user_code import describe_error

MOST_HUNG = 64
"""Threads that user code may hold for good before the process is replaced."""

Failure = tuple[str, str]
"""(`environment_error` or `environment_timeout`, message)."""


class _Episode:
    """An environment, and the thread and event loop that all its calls run on."""

    def __init__(self, make: Any) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], str, tuple[Any, ...]]] = queue.SimpleQueue()
        self._runner = asyncio.Runner()
        self._make = make
        self._environment: Any = None
        # A daemon, unlike an executor's thread: user code that hangs must not keep the process from ending.
        threading.Thread(target=self._run, name="environment", daemon=True).start()

    def start(self, method: str, *arguments: Any) -> Future[Any]:
        """Begin a call. After `close` there are no more."""
        call: Future[Any] = Future()
        self._calls.put((call, method, arguments))
        return call

    def _run(self) -> None:
        method = ""
        while method != "close":
            call, method, arguments = self._calls.get()
            try:
                call.set_result(self._call(method, arguments))
            except BaseException as error:  # SystemExit too: whatever user code raises is reported, not obeyed
                call.set_exception(error)
        self._runner.close()

    def _call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        if method == "close" and not callable(getattr(self._environment, "close", None)):
            return None
        if self._environment is None:
            self._environment = self._make()
        value = getattr(self._environment, method)(*arguments)
        if not inspect.isawaitable(value):
            return value

        async def wait() -> Any:
            return await value

        return self._runner.run(wait())


class EnvironmentActor:
    """The environments of one process."""

    def __init__(self, config: EnvironmentConfig) -> None:
        self.config = config
        self._lock = threading.Lock()
        self._made: tuple[type, list[dict[str, Any]]] | None = None
        self._episodes: dict[str, _Episode] = {}
        self._hung = 0

    def start(self) -> None:
        """Import the environment.

        Raises:
            UserError: it cannot be used as it is.
        """
        self._load()

    def tools(self) -> list[dict[str, Any]]:
        """JSON schemas of the environment's tools."""
        return self._load()[1]

    def reset(self, name: str, row: dict[str, Any]) -> list[Message] | Failure:
        """Begin an episode; its opening messages, or why there are none."""
        environment, _ = self._load()
        with self._lock:
            episode = self._episodes[name] = _Episode(lambda: environment(**self.config.arguments))
        answer = self._wait(episode.start("reset", Row(row)), "reset")
        return answer if isinstance(answer, tuple) else self._checked(lambda: checked_messages(answer[0], "reset()"))

    def step(self, name: str, message: Message) -> Turn | Failure:
        """The reply to a message of the policy, or why there is none."""
        with self._lock:
            episode = self._episodes.get(name)
        if episode is None:
            return "environment_error", "the episode is gone: its process was replaced"
        answer = self._wait(episode.start("step", message), "step")
        return answer if isinstance(answer, tuple) else self._checked(lambda: checked_turn(answer[0]))

    def close(self, name: str) -> None:
        """End an episode; one that is not there is no matter."""
        with self._lock:
            episode = self._episodes.pop(name, None)
        if episode is not None:
            episode.start("close")

    def _load(self) -> tuple[type, list[dict[str, Any]]]:
        """Imported at the first call of a process, which Ray may have started again."""
        with self._lock:
            if self._made is None:
                self._made = load_environment(self.config)
            return self._made

    def _wait(self, call: Future[Any], method: str) -> list[Any] | Failure:
        """What a call returned, in a list, or how it failed."""
        try:
            return [call.result(self.config.timeout)]
        except DeadlineError:
            if call.done():  # the user's own TimeoutError
                return "environment_error", f"{method}(): {describe_error(call.exception() or DeadlineError())}"
            self._count_hung()
            return "environment_timeout", f"{method}() took longer than {self.config.timeout:g} s"
        except BaseException as error:
            return "environment_error", f"{method}(): {describe_error(error)}"

    def _count_hung(self) -> None:
        with self._lock:
            self._hung += 1
            if self._hung >= MOST_HUNG:
                os._exit(1)

    def _checked(self, check: Any) -> Any:
        try:
            return check()
        except EnvironmentReplyError as error:
            return "environment_error", str(error)
