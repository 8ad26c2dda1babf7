"""Runs a side's process and watches memory and CPU of it and all below it, and what others used meanwhile."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

INTERVAL_S = 0.5
GROWN = 1.01
"""So much larger than ever before are resident sizes that are looked at more closely."""
ACTOR = re.compile(r"ray::(\w+)")


class SideFailedError(RuntimeError):
    """A side's process did not end well."""


@dataclass(frozen=True)
class Usage:
    """What the processes of a run used at one time."""

    at: float
    cpu_s: Mapping[str, float]
    """CPU seconds since the start, by what the process is."""
    machine_cpu_s: float
    """CPU seconds of the whole machine since it was started."""


@dataclass
class Watch:
    """Samples of a process and all below it.

    To count shared pages once, the kernel walks all pages of a process and keeps it from getting others meanwhile,
    which would take a run of some gigabytes half a core. So that is asked for where the resident sizes, which cost
    nothing, have grown beyond all earlier ones.
    """

    usages: list[Usage] = field(default_factory=list)
    pss: int = 0
    """Most bytes at a time; a page that several share counts in parts, so that the sum counts it once (the object store
    too)."""
    uss: int = 0
    """Most bytes at a time that no other process shares."""
    _resident: int = 0
    _dead_s: dict[str, float] = field(default_factory=dict)
    _last: dict[int, tuple[str, float]] = field(default_factory=dict)

    def sample(self, root: psutil.Process) -> None:
        """Take one."""
        alive: dict[int, tuple[str, float]] = {}
        resident, processes = 0, tree(root)
        for process in processes:
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                alive[process.pid] = (title(process), times.user + times.system)
                resident += process.memory_info().rss
        if resident > self._resident * GROWN:
            self._resident = resident
            self._weigh(processes)
        for pid, (name, seconds) in self._last.items():
            if pid not in alive:
                self._dead_s[name] = self._dead_s.get(name, 0.0) + seconds
        self._last = alive
        total = dict(self._dead_s)
        for name, seconds in alive.values():
            total[name] = total.get(name, 0.0) + seconds
        times = psutil.cpu_times()
        self.usages.append(Usage(time.time(), total, times.user + times.system + times.nice))

    def _weigh(self, processes: Sequence[psutil.Process]) -> None:
        pss = uss = 0
        for process in processes:
            with contextlib.suppress(psutil.Error):
                memory = process.memory_full_info()
                pss, uss = pss + memory.pss, uss + memory.uss
        self.pss, self.uss = max(self.pss, pss), max(self.uss, uss)

    def cores(self, start: float, end: float) -> dict[str, float]:
        """Mean number of busy cores between two times, by what the process is; `others` is the rest of the machine."""
        first = min(self.usages, key=lambda usage: abs(usage.at - start))
        last = min(self.usages, key=lambda usage: abs(usage.at - end))
        span = last.at - first.at
        if span <= 0:
            return {}
        used = {name: (s - first.cpu_s.get(name, 0.0)) / span for name, s in last.cpu_s.items()}
        machine = (last.machine_cpu_s - first.machine_cpu_s) / span
        return used | {"others": max(0.0, machine - sum(used.values()))}


def quiet(cores: Sequence[Mapping[str, float]]) -> bool:
    """Whether the rest of the machine kept less than a tenth of a core busy in each of these spans."""
    return all(each.get("others", 0.0) < 0.1 for each in cores)


def tree(root: psutil.Process) -> list[psutil.Process]:
    """A process and everything below it."""
    try:
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def title(process: psutil.Process) -> str:
    """The class of a Ray actor, else the program's name."""
    line = process.cmdline()
    if line and (actor := ACTOR.match(line[0])):
        return actor[1]
    return process.name()


def run(command: Sequence[str], *, env: Mapping[str, str], log: Path, timeout_s: float) -> tuple[float, Watch]:
    """Run a command to its end; returns when it was started, and what was seen of it.

    Raises:
        SideFailedError: it failed, or took longer than `timeout_s`; it and all below it are gone by then.
    """
    watch, done = Watch(), threading.Event()
    with log.open("wb") as output:
        started_at = time.time()
        process = subprocess.Popen(command, env=dict(env), stdout=output, stderr=subprocess.STDOUT)
        root = psutil.Process(process.pid)

        def observe() -> None:
            while not done.wait(INTERVAL_S):
                watch.sample(root)

        observer = threading.Thread(target=observe)
        observer.start()
        try:
            code: int | None = process.wait(timeout_s)
        except BaseException as error:
            for member in tree(root):
                with contextlib.suppress(psutil.Error):
                    member.kill()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            code = None
        finally:
            done.set()
            observer.join()
    if code != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        what = f"took longer than {timeout_s:.0f} s" if code is None else f"ended with exit code {code}"
        raise SideFailedError(f"{' '.join(command)} {what}:\n{tail}")
    return started_at, watch


PEAKS = """
import time, torch
from engine.algorithms.products import matmul
torch.set_num_threads({threads})
a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
for product in (torch.matmul, matmul):
    best, end = 1e9, time.perf_counter() + {seconds}
    while time.perf_counter() < end:
        began = time.perf_counter(); product(a, b); best = min(best, time.perf_counter() - began)
    print(2 * 2048**3 / best)
"""


@dataclass(frozen=True)
class Peaks:
    """FLOP/s of a large float32 product."""

    torch: float
    """As torch.matmul computes it, hence TRL too."""
    fastest: float
    """By the fastest library that torch brings (engine/algorithms/products.py)."""


def matmul_peaks(threads: int, *, seconds: float = 1.5) -> Peaks:
    """The best of some seconds each, in a process of its own."""
    program = PEAKS.format(threads=threads, seconds=seconds)
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    usual, fastest = map(float, answer.stdout.split())
    return Peaks(usual, max(usual, fastest))
