"""Ctrl-C and SIGTERM end a run within 15 s: exit code 130, no process left, records whole."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.conftest import thorough

ROOT = Path(__file__).parents[2]
END_S = 15.0
"""A run must be gone so many seconds after the signal."""
MARK = "GNOMON_TEST_RUN"


class Running:
    """`gnomon run` in a process group of its own, and every process that it has started."""

    def __init__(self, folder: Path, raw: dict[str, Any]) -> None:
        config = folder / "run.yaml"
        config.write_text(yaml.safe_dump(raw))
        self.run_dir = Path(raw["output_dir"]) / raw["name"]
        self.mark = uuid.uuid4().hex
        self.log = folder / "output.txt"
        env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {MARK: self.mark}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "engine", "run", str(config)],
                cwd=ROOT,
                env=env,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.seen: set[psutil.Process] = set()

    def processes(self) -> list[psutil.Process]:
        """Its live processes: descendants seen so far, and any that inherited its environment."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.seen |= set(psutil.Process(self.process.pid).children(recursive=True))
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.pid != self.process.pid and process.environ().get(MARK) == self.mark:
                    self.seen.add(process)
        return [p for p in self.seen if _is_alive(p)]

    def wait_until(self, reached: Callable[[], bool], timeout_s: float) -> None:
        """Wait until something is so; fails when the run ends before or the time is over."""
        end = time.monotonic() + timeout_s
        while not reached():
            assert self.process.poll() is None, f"the run ended early:\n{self.log.read_text()}"
            assert time.monotonic() < end, f"not reached within {timeout_s} s:\n{self.log.read_text()}"
            time.sleep(0.2)

    def has_process(self, part: str) -> bool:
        """Whether a process with this in its command line was started."""
        return any(part in " ".join(_command(p)) for p in self.processes())

    def measured(self, lines: int) -> bool:
        """Whether metrics.jsonl has so many lines."""
        file = self.run_dir / "metrics.jsonl"
        return file.exists() and file.read_text().count("\n") >= lines

    def seconds_to_end(self) -> float:
        """Wait until the run and all its processes are gone; returns how long that took, at most twice END_S."""
        start = time.monotonic()
        while time.monotonic() - start < 2 * END_S and (self.process.poll() is None or self.processes()):
            time.sleep(0.1)
        return time.monotonic() - start

    def events(self) -> list[dict[str, Any]]:
        """events.jsonl."""
        return [json.loads(line) for line in (self.run_dir / "events.jsonl").read_text().splitlines()]


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.fixture
def running(raw_config: dict[str, Any], tmp_path: Path) -> Iterator[Running]:
    """A run that does not end by itself. Whatever is left of it at the end of the test is killed."""
    raw_config["rl"]["steps"] = 100_000
    run = Running(tmp_path, raw_config)
    yield run
    for process in run.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    run.process.kill()
    run.process.wait(30)


def assert_ended_in_order(run: Running, seconds: float) -> None:
    """In time, with the exit code of an interruption, without a process left and with whole records."""
    output = run.log.read_text()
    left = [(p.pid, " ".join(_command(p))[:120]) for p in run.processes()]
    assert not left, f"still there after {seconds:.0f} s:\n{left}\n{output}"
    assert seconds < END_S, f"took {seconds:.1f} s:\n{output}"
    assert run.process.returncode == 130, output
    assert "interrupted" in output.splitlines()
    assert "Traceback" not in output
    events = run.events()
    assert (events[-1]["kind"], events[-1]["status"]) == ("run_ended", "interrupted")
    metrics = (run.run_dir / "metrics.jsonl").read_text()
    assert metrics == "" or metrics.endswith("\n")
    assert all(json.loads(line) for line in metrics.splitlines())


@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [signal.SIGINT, *thorough(signal.SIGTERM)], ids=["ctrl-c", "sigterm"])
def test_a_signal_during_training_ends_the_run_and_every_process_of_it(
    running: Running, number: signal.Signals
) -> None:
    running.wait_until(lambda: running.measured(lines=3), timeout_s=400)
    started = " ".join(" ".join(_command(p)) for p in running.processes())
    assert all(name in started for name in ("raylet", "PolicyActor", "RolloutActor", "RewardPool", "forkserver"))
    if number == signal.SIGINT:
        os.killpg(running.process.pid, number)  # a terminal sends Ctrl-C to the whole group
        time.sleep(0.5)
        os.killpg(running.process.pid, number)  # the impatient press it twice
    else:
        running.process.send_signal(number)  # a supervisor sends SIGTERM to the process
    assert_ended_in_order(running, running.seconds_to_end())
    assert running.measured(lines=3)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("moment", ["ray::RolloutActor", *thorough("raylet")])
def test_ctrl_c_while_the_run_starts_ends_it_and_every_process_of_it(running: Running, moment: str) -> None:
    running.wait_until(lambda: running.has_process(moment), timeout_s=300)
    os.killpg(running.process.pid, signal.SIGINT)
    assert_ended_in_order(running, running.seconds_to_end())
