"""Several hosts on one machine: network namespaces joined by a bridge where that is allowed, else several raylets."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import psutil

RAY = str(Path(sys.executable).parent / "ray")
FAST = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}
"""Ray notices a lost node in seconds instead of a minute."""
CARD = "eth0"


def namespaces_allowed() -> bool:
    """Whether this user may make network namespaces."""
    name = f"gn{uuid.uuid4().hex[:6]}"
    made = shutil.which("ip") and subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "delete", name], check=False)
    return bool(made)


class Hosts:
    """A Ray cluster whose nodes are hosts of their own; `with` ends it."""

    def __init__(self, cpus: list[int]) -> None:
        """The first is the head."""
        self.apart = namespaces_allowed()
        self.cpus = cpus
        self.mark = uuid.uuid4().hex[:5]
        self.folder = Path(tempfile.mkdtemp(prefix="gnomon-hosts-"))
        token = self.folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        self.env = inherited | FAST | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        if self.apart:
            self.env["GLOO_SOCKET_IFNAME"] = CARD
        self.nodes: list[subprocess.Popen[bytes]] = []

    @property
    def address(self) -> str:
        """Of the head."""
        return f"{self.ip(0)}:6399"

    def ip(self, number: int) -> str:
        """Of a host."""
        return f"10.213.77.{number + 1}" if self.apart else "127.0.0.1"

    def inside(self, number: int) -> list[str]:
        """What a command begins with that runs on a host."""
        return ["ip", "netns", "exec", self._name(number)] if self.apart else []

    def __enter__(self) -> Hosts:
        try:
            if self.apart:
                _ip("link", "add", self._bridge, "type", "bridge")
                _ip("link", "set", self._bridge, "up")
            for number in range(len(self.cpus)):
                self._start(number)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for node in self.nodes:
            _end_tree(node)
        if self.apart:
            for number in range(len(self.cpus)):
                subprocess.run(["ip", "netns", "delete", self._name(number)], capture_output=True, check=False)
            subprocess.run(["ip", "link", "delete", self._bridge], capture_output=True, check=False)
        shutil.rmtree(self.folder, ignore_errors=True)

    def host_of(self, pid: int) -> int:
        """Number of the host that a process runs on."""
        above = {process.pid for process in psutil.Process(pid).parents()}
        return next(number for number, node in enumerate(self.nodes) if node.pid in above)

    def cut_off(self, number: int) -> None:
        """Pull the cable of a host; where there is none, kill its raylet."""
        if self.apart:
            _ip("link", "set", f"g{self.mark}p{number}", "down")
            return
        for process in psutil.Process(self.nodes[number].pid).children(recursive=True):
            if process.name() == "raylet":
                process.send_signal(signal.SIGKILL)

    @property
    def _bridge(self) -> str:
        return f"g{self.mark}b"

    def _name(self, number: int) -> str:
        return f"g{self.mark}n{number}"

    def _start(self, number: int) -> None:
        if self.apart:
            self._plug_in(number)
        options = {"num-cpus": self.cpus[number], "object-store-memory": 2**27, "node-ip-address": self.ip(number)}
        if number == 0:
            where = ["--head", "--port=6399", "--include-dashboard=false", f"--temp-dir={self.folder / 'ray'}"]
        else:
            where = [f"--address={self.address}"]
        command = [*self.inside(number), RAY, "start", *where, "--block", "--disable-usage-stats"]
        command += [f"--{name}={value}" for name, value in options.items()]
        log = self.folder / f"node{number}.log"
        with log.open("w") as file:
            node = subprocess.Popen(
                command, env=self.env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.nodes.append(node)
        end = time.monotonic() + 120
        while "Ray runtime started" not in log.read_text():
            assert node.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)

    def _plug_in(self, number: int) -> None:
        name, here = self._name(number), f"g{self.mark}p{number}"
        _ip("netns", "add", name)
        _ip("link", "add", here, "type", "veth", "peer", "name", CARD, "netns", name)
        _ip("link", "set", here, "master", self._bridge, "up")
        _ip("-n", name, "address", "add", f"{self.ip(number)}/24", "dev", CARD)
        _ip("-n", name, "link", "set", CARD, "up")
        _ip("-n", name, "link", "set", "lo", "up")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def _end_tree(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        tree = [process, *psutil.Process(process.pid).children(recursive=True)]
        for member in tree:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                member.kill()
    process.wait(30)
