"""`ray job submit` on a running cluster: the job's status and exit code say how the run ended."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from engine.tracking.jsonl import read_rows
from engine.tracking.status import status_of

pytestmark = pytest.mark.timeout(600)
ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).parent / "ray")


@dataclass(frozen=True)
class Head:
    """A local Ray head with a token of its own."""

    dashboard: str
    env: dict[str, str]

    def job(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`ray job <command> --address <head> <arguments>`."""
        return subprocess.run(
            [RAY, "job", command, "--address", self.dashboard, *arguments],
            cwd=ROOT,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )


def free_ports(count: int) -> list[int]:
    """Different TCP ports that were free a moment ago."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """Started as an operator would, beside whatever other clusters the machine has; ended by its own process tree."""
    folder = Path(tempfile.mkdtemp(prefix="gnomon-head-"))  # short: Ray puts sockets below it
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env = inherited | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_JOB_STOP_WAIT_TIME_S": "60",
    }
    gcs, dashboard, agent, client = free_ports(4)
    options = {
        "node-ip-address": "127.0.0.1",
        "port": gcs,
        "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": agent,
        "ray-client-server-port": client,
        "temp-dir": folder / "ray",
        "num-cpus": 8,
        "object-store-memory": 2**28,
    }
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(
            [RAY, "start", "--head", "--block", "--disable-usage-stats", *[f"--{k}={v}" for k, v in options.items()]],
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_for_port(dashboard, process, folder / "head.log")
        yield Head(f"http://127.0.0.1:{dashboard}", env)
    finally:
        end_tree(process)
        shutil.rmtree(folder, ignore_errors=True)


def wait_for_port(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until somebody listens; the head prints why if it ends before."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.5)
    raise AssertionError(f"the dashboard did not come up: {log.read_text()}")


def end_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and everything below it."""
    tree = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait(30)
    for child in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(tree, timeout=30)


def submit(head: Head, name: str, *overrides: str, wait: bool = True) -> subprocess.CompletedProcess[str]:
    """Submit a run of the quickstart's configuration and, unless told not to, wait for its end."""
    run = ["python", "-m", "engine", "run", "examples/quickstart/quickstart.yaml", *overrides]
    options = [] if wait else ["--no-wait"]
    return head.job("submit", "--submission-id", name, "--working-dir", str(ROOT), *options, "--", *run)


def wait_for(what: str, reached: Callable[[], bool]) -> None:
    """Poll until something is so."""
    end = time.monotonic() + 200
    while not reached():
        assert time.monotonic() < end, f"not reached: {what}"
        time.sleep(0.2)


def ended(head: Head, name: str) -> bool:
    """Whether a job is over."""
    return any(state in head.job("status", name).stdout.upper() for state in ("SUCCEEDED", "FAILED", "STOPPED"))


@pytest.fixture
def overrides(tiny_model: Path, tmp_path: Path) -> list[str]:
    """The quickstart, made tiny."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "number {i}"}}\n' for i in range(8)))
    rewards = tmp_path / "digits.py"
    rewards.write_text("def digits(sample):\n    return float(sum(sample.completion_ids) % 11)\n")
    return [
        f"model.path={tiny_model}",
        f"output_dir={tmp_path / 'runs'}",
        f"data={{train: {rows}, evaluation: {rows}}}",
        "evaluation={prompts: 2}",
        f"rewards.functions=['{rewards}:digits']",
        "rl={steps: 1, prompts_per_step: 2, samples_per_prompt: 2}",
        "algorithm.kl_coef=0",
        "policy.threads=1",
        "rollout.threads=1",
        "rollout.kv_cache_gib=0.03",
    ]


def test_a_submitted_run_that_fails_is_a_failed_job_with_an_exit_code(head: Head, overrides: list[str]) -> None:
    done = submit(head, "bad", *overrides, "rl.samples_per_prompt=1")
    assert done.returncode != 0, done.stdout
    assert "rl.samples_per_prompt: grpo compares the samples of one prompt" in done.stdout
    status = head.job("status", "bad").stdout
    assert "FAILED" in status.upper()
    assert "exit code 2" in status


def test_a_job_that_is_stopped_has_saved_its_last_step_and_goes_on_when_it_is_submitted_again(
    head: Head, overrides: list[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "runs" / "quickstart"
    longer = [*overrides, "rl={steps: 60, prompts_per_step: 2, samples_per_prompt: 2}", "checkpoint.every=1000"]

    def steps() -> list[int]:
        return [row["step"] for row in read_rows(run_dir / "metrics.jsonl") if "time/step" in row]

    submit(head, "stopped", *longer, wait=False)
    wait_for("step 3", lambda: len(steps()) >= 3)
    head.job("stop", "stopped")
    assert "STOPPED" in head.job("status", "stopped").stdout.upper()
    logs = head.job("logs", "stopped").stdout
    assert "is saved; the same command goes on from there" in logs, logs
    assert (status_of(run_dir).state, status_of(run_dir).checkpoints) == ("interrupted", [steps()[-1]])
    assert len(steps()) < 60

    again = submit(head, "again", *longer)
    assert again.returncode == 0, again.stdout
    assert "goes on from the checkpoint of step" in again.stdout
    assert "model saved in" in again.stdout  # the run's own output reaches the person who submitted it
    assert "SUCCEEDED" in head.job("status", "again").stdout.upper()
    assert (run_dir / "model" / "model.safetensors").is_file()
    assert steps() == list(range(1, 61))


@pytest.mark.thorough
def test_two_runs_on_one_cluster_do_not_disturb_each_other(head: Head, overrides: list[str], tmp_path: Path) -> None:
    names = ("left", "right")
    for name in names:
        submit(
            head,
            name,
            *overrides,
            f"name={name}",
            "rl={steps: 3, prompts_per_step: 2, samples_per_prompt: 2}",
            wait=False,
        )
    for name in names:
        wait_for(f"the end of {name}", lambda: ended(head, name))  # noqa: B023
        assert "SUCCEEDED" in head.job("status", name).stdout.upper(), head.job("logs", name).stdout
    left, right = (
        [
            {key: value for key, value in row.items() if not key.startswith("time/")}
            for row in read_rows(tmp_path / "runs" / name / "metrics.jsonl")
        ]
        for name in names
    )
    assert left == right, "the same run, whoever else is there"
    for name in names:
        assert not [row for row in read_rows(tmp_path / "runs" / name / "events.jsonl") if row["kind"] == "incident"]
