"""What runs stand on and lose for a while: room on the disk, the server of a reward."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.chaos.outcome import Outcome, lost_samples, nothing_left
from tests.chaos.runs import ROOT, Observed
from tests.chaos.workshop import PROMPTS, SAMPLES, TOKEN, Workshop

DISK_BYTES = 24 * 2**20


def full_disk(workshop: Workshop, times: int) -> list[Outcome]:
    """The checkpoints' disk, then the disk of everything that the run writes."""
    with small_disk(workshop.folder / "small") as disk:
        if disk is None:
            return [Outcome("full disk", 0, [], 0, ["not allowed to mount a small one here"])]
        return [_full_for_checkpoints(workshop, disk, times), _full_for_all(workshop, disk, times)]


def _full_for_checkpoints(workshop: Workshop, disk: Path, times: int) -> Outcome:
    """The run goes on, each checkpoint that could not be written is told, and they are written again afterwards."""
    run, steps = _sized(workshop, "disk-of-checkpoints", 120 * times, checkpoint={"every": 2, "folder": str(disk)})
    run.start()
    seconds = []
    for _ in range(times):
        run.wait_until(lambda: bool(_whole(disk)), 300, "a checkpoint")
        told = len(_failed(run))
        with filled(disk):
            run.wait_until(lambda: len(_failed(run)) >= told + 2, 120, "two checkpoints that fail")  # noqa: B023
        start, newest = time.monotonic(), _whole(disk)
        run.wait_until(lambda: _whole(disk) > newest, 60, "a checkpoint that is whole again")  # noqa: B023
        seconds.append(time.monotonic() - start)
    assert run.wait(600) == 0, run.tail()
    return Outcome("full disk, of the checkpoints", times, seconds, lost_samples(run, steps), nothing_left())


def _full_for_all(workshop: Workshop, disk: Path, times: int) -> Outcome:
    """The run ends and says why; the same command goes on from its newest checkpoint."""
    run, steps = _sized(workshop, "disk-of-all", 120 * times, output_dir=str(disk))
    run.start()
    seconds = []
    for _ in range(times):
        furthest = run.furthest()
        run.wait_until(lambda: run.furthest() >= furthest + 5, 300, "five steps")  # noqa: B023
        with filled(disk):
            assert run.wait(120) == 1, run.tail()
            assert "No space left on device" in run.tail(), run.tail()
        start, furthest = time.monotonic(), run.furthest()
        run.start()
        run.wait_until(lambda: run.furthest() > furthest, 120, "a further step")  # noqa: B023
        seconds.append(time.monotonic() - start)
    assert run.wait(600) == 0, run.tail()
    return Outcome("full disk, of all files", times, seconds, lost_samples(run, steps), nothing_left())


def service_down(workshop: Workshop, times: int) -> list[Outcome]:
    """The server of a reward is killed, and there again three seconds later."""
    with contextlib.ExitStack() as stack:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server = stack.enter_context(reward_server(workshop.task, port))
        patient = {"url": f"http://127.0.0.1:{port}", "token_env": TOKEN, "retries": 100, "open_after": 10**6}
        function = {"function": "remote", "arguments": patient | {"timeout": 100.0}, "timeout": 110.0}
        run, steps = _sized(workshop, "service", 60 * times, rewards={"functions": [function]})
        run.start()
        seconds = []
        for _ in range(times):
            furthest = run.furthest()
            run.wait_until(lambda: run.furthest() >= furthest + 3, 300, "three steps")  # noqa: B023
            server.kill()
            server.wait(30)
            time.sleep(3)
            start, furthest = time.monotonic(), run.furthest()
            server = stack.enter_context(reward_server(workshop.task, port))
            run.wait_until(lambda: run.furthest() >= furthest + 2, 120, "two further steps")  # noqa: B023
            seconds.append(time.monotonic() - start)
        assert run.wait(600) == 0, run.tail()
        return [Outcome("reward service down for 3 s", times, seconds, lost_samples(run, steps), nothing_left())]


def _sized(workshop: Workshop, name: str, steps: int, **changes: Any) -> tuple[Observed, int]:
    size = {"steps": steps, "prompts_per_step": PROMPTS, "samples_per_prompt": SAMPLES}
    return workshop.run(name, rl=size, **changes), steps


def _failed(run: Observed) -> list[dict[str, Any]]:
    return [event for event in run.events("incident") if event["incident"] == "checkpoint_failed"]


def _whole(disk: Path) -> int:
    """Step of the newest checkpoint; 0 without one."""
    steps = [int(path.parent.name[5:]) for path in disk.glob("disk-of-checkpoints/step_*[0-9]/manifest.json")]
    return max(steps, default=0)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A disk of `DISK_BYTES`; None where nobody may mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


@contextlib.contextmanager
def filled(disk: Path) -> Iterator[None]:
    """Not a byte is left."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (2**16, 2**12, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
    try:
        yield
    finally:
        ballast.unlink()


@contextlib.contextmanager
def reward_server(task: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """`gnomon serve reward`; returns when it listens."""
    command = [sys.executable, "-m", "engine", "serve", "reward", f"{task}:share_of_e", "--port", str(port)]
    server = subprocess.Popen([*command, "--token-env", TOKEN], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            assert server.poll() is None
            assert time.monotonic() < end, "the reward server does not listen"
            time.sleep(0.1)
        yield server
    finally:
        server.kill()
        server.wait(30)
