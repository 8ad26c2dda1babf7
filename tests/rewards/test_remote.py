"""`gnomon serve reward` in a process of its own, asked by the `remote` reward."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import httpx
import psutil
import pytest

from engine.config import UserError
from engine.rewards.contract import Sample
from engine.rewards.remote import Circuit, Remote, RemoteError, encode
from engine.row import Row

TOKEN = "a-token-of-the-test"
FUNCTIONS = """
import os, time

def right(sample):
    if sample.completion == "raise":
        raise KeyError("no such thing")
    if sample.completion == "hang":
        time.sleep(600)
    if sample.completion == "none":
        return None
    return float(sample.completion == sample.row["gold"])

def batched(prompts, completions, **columns):
    return [float(len(completions))] * len(completions)
"""


def sample(completion: str, gold: str = "4") -> Sample:
    return Sample(id=7, prompt="2 + 2", completion=completion, row=Row({"gold": gold}))


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("served")
    (folder / "own.py").write_text(FUNCTIONS)
    command = [str(Path(sys.executable).with_name("gnomon")), "serve", "reward", "own.py:right", "own.py:batched"]
    server = subprocess.Popen(
        [*command, "--port", "0", "--timeout", "2", "--max-wait-ms", "200"],
        cwd=folder, env=os.environ | {"GNOMON_REWARD_TOKEN": TOKEN}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert server.stdout is not None
    line = server.stdout.readline()
    found = re.search(r"http://127\.0\.0\.1:\d+", line)
    assert found, line
    yield found[0]
    workers = psutil.Process(server.pid).children(recursive=True)
    server.send_signal(signal.SIGTERM)
    assert server.wait(20) == 0
    deadline = time.monotonic() + 10
    while any(w.is_running() and w.status() != psutil.STATUS_ZOMBIE for w in workers):
        assert time.monotonic() < deadline, "a worker has outlived the server"
        time.sleep(0.05)
    server.stdout.close()


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GNOMON_REWARD_TOKEN", TOKEN)


def ask(remote: Remote, *samples: Sample) -> list[Any]:
    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*[remote(each) for each in samples], return_exceptions=True)

    return asyncio.run(all_of_them())


def test_a_reward_comes_back_as_the_function_gave_it(address: str) -> None:
    assert ask(Remote(address, component="right"), sample("4"), sample("5"), sample("none")) == [1.0, 0.0, None]


def test_several_functions_are_parts(address: str) -> None:
    [reward] = ask(Remote(address), sample("4"))
    assert set(reward) == {"right", "batched"}


def test_samples_of_concurrent_requests_share_a_call(address: str) -> None:
    assert max(ask(Remote(address, component="batched"), *[sample("4")] * 8)) > 1


def test_a_failure_is_an_error_of_its_own_sample_and_never_a_reward(address: str) -> None:
    raising, hanging, right = ask(Remote(address, component="right"), sample("raise"), sample("hang"), sample("4"))
    assert "no such thing" in str(raising)
    assert isinstance(raising, RemoteError)
    assert "reward_timeout" in str(hanging)
    assert right == 1.0


def test_who_has_no_token_learns_nothing(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("/score", "/health", "/docs", "/openapi.json"):
        assert httpx.get(address + path).status_code in (401, 404, 405)
    assert httpx.post(f"{address}/score", content=encode([sample("4")])).status_code == 401
    monkeypatch.setenv("GNOMON_REWARD_TOKEN", "another")
    [refused] = ask(Remote(address), sample("4"))
    assert "HTTP 401" in str(refused)
    assert "the token is that of GNOMON_REWARD_TOKEN" in str(refused)


def test_a_request_that_is_none_is_refused_with_the_place(address: str) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    answer = httpx.post(f"{address}/score", content=b'{"samples": [{"id": 1}]}', headers=headers)
    assert answer.status_code == 422
    assert "samples.0.completion" in answer.text
    assert httpx.post(f"{address}/score", content=b"x" * (17 << 20), headers=headers).status_code == 413


class _Shaky(BaseHTTPRequestHandler):
    """Fails with the statuses in `plan`, then answers."""

    plan: ClassVar[list[int]] = []
    asked: ClassVar[list[float]] = []

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append(time.monotonic())
        status = self.plan.pop(0) if self.plan else 200
        body = b'{"results": [{"rewards": {"f": 0.5}}]}' if status == 200 else b"busy"
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def shaky() -> Iterator[str]:
    _Shaky.plan, _Shaky.asked = [], []
    with ThreadingHTTPServer(("127.0.0.1", 0), _Shaky) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_what_may_pass_is_tried_again_and_what_does_not_is_not(shaky: str) -> None:
    _Shaky.plan = [503, 429]
    assert ask(Remote(shaky), sample("4")) == [0.5]
    assert len(_Shaky.asked) == 3
    _Shaky.plan = [400]
    [refused] = ask(Remote(shaky), sample("4"))
    assert "HTTP 400" in str(refused)
    assert len(_Shaky.asked) == 4


def test_a_server_that_fails_is_left_alone_until_a_trial_succeeds(shaky: str) -> None:
    remote = Remote(shaky, retries=0, open_after=2, open_seconds=0.3)
    _Shaky.plan = [500, 500]
    errors = [ask(remote, sample("4"))[0] for _ in range(4)]
    assert [("left alone" in str(e)) for e in errors] == [False, False, True, True]
    assert len(_Shaky.asked) == 2
    time.sleep(0.4)
    assert ask(remote, sample("4")) == [0.5]


def test_the_deadline_holds_whatever_the_server_does() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        [late] = ask(Remote(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.5), sample("4"))
        assert "no answer within 0.5 s" in str(late)
        assert time.monotonic() - began < 2


def test_one_trial_at_a_time_decides_about_an_open_circuit() -> None:
    now = [0.0]
    circuit = Circuit(2, 10.0, clock=lambda: now[0])
    for _ in range(2):
        assert circuit.admit() == 0
        circuit.failed()
    assert circuit.admit() == 10.0
    now[0] = 10.0
    assert circuit.admit() == 0
    assert circuit.admit() > 0
    circuit.failed()
    assert circuit.admit() == 10.0
    now[0] = 20.0
    assert circuit.admit() == 0
    circuit.succeeded()
    assert circuit.admit() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"url": "ftp://x"}, "must begin with http"),
        ({"url": "http://user:pass@x"}, "no user, password"),
        ({"url": "http://x", "token_env": "not a name"}, "the name of an environment variable"),
        ({"url": "http://x", "token_env": "GNOMON_NOT_SET"}, "GNOMON_NOT_SET is not set"),
        ({"url": "http://x", "timeout": 0}, "timeout=0"),
    ],
)
def test_arguments_without_sense_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Remote(**arguments)


def test_a_function_that_cannot_be_imported_ends_the_command_with_a_message(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("gnomon")), "serve", "reward", "nothing.py:f", "--port", "0"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert "nothing.py" in ended.stderr
    assert "Traceback" not in ended.stderr
