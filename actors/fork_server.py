"""Processes for the user's code, forked from a server that has imported all but that code: each is there at once.

A process ends with the one that started it, however that ends, and takes along what it has started itself.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from importlib.machinery import ModuleSpec
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

START_DEADLINE = 120.0
"""Seconds in which a process must have imported the user's code."""
_PRELOADED = ["actors.reward_workers"]
_PR_SET_PDEATHSIG = 1
_starting = threading.Lock()


class _WorkerProcess(ForkServerProcess):
    """A forked process that leaves the parent's `__main__` alone and takes its own children with it."""

    def start(self) -> None:
        """Start without importing the parent's main script again (Ray's worker script, or an unguarded one)."""
        main = sys.modules["__main__"]
        with _starting:
            spec = main.__spec__
            main.__spec__ = ModuleSpec("user_code.__main__", None)  # multiprocessing imports no `*.__main__`
            try:
                super().start()
            finally:
                main.__spec__ = spec

    def terminate(self) -> None:
        """Kill the process and all in its group."""
        assert self.pid is not None
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has not made its group yet, or is gone
            self.kill()


class WorkerContext(ForkServerContext):
    """Starts the processes. Their locks live as long as the context, for a process may just be starting."""

    Process = _WorkerProcess

    def __init__(self) -> None:
        super().__init__()
        self._locks: list[Any] = []
        _start_fork_server()

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
            forkserver.set_forkserver_preload(_PRELOADED)
            forkserver.ensure_running()
        finally:
            del os.environ["PYTHONPATH"]
            os.environ.update({} if given is None else {"PYTHONPATH": given})


def become_worker(environment: dict[str, str]) -> None:
    """In a new process: end with the parent and at the first signal, take its environment, use one thread."""
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
