"""A frozen language model behind vLLM's own OpenAI-compatible server, for judges and verifiers (`rewards.servers`).

    actor --(pipe: dies with the actor)--> supervised.py --> vLLM's server <--HTTP, bearer key-- reward functions

The server listens on the loopback address where the cluster is one node, else on its node's own; either way it answers
to nobody without the key, which is drawn anew for each run.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import ray

from actors import supervised
from actors.process import free_port
from actors.rollout import engine_environment
from engine.config import Config, ServerConfig

POLL_S = 0.5
END_S = 10.0
_SHOWN = 2000


class ModelServerActor:
    """One server process."""

    def __init__(self, config: Config, server: ServerConfig) -> None:
        self.config = config
        self.server = server
        self._process: subprocess.Popen[bytes] | None = None
        self._address = ("", "")

    def start(self) -> None:
        """Start the server; returns when it answers.

        Raises:
            RuntimeError: it ended, or did not answer within `timeouts.start`; with the end of what it said.
        """
        nodes = [node for node in ray.nodes() if node["Alive"]]
        host = "127.0.0.1" if len(nodes) == 1 else ray.util.get_node_ip_address()
        port, key = free_port(), secrets.token_urlsafe(32)
        environment = os.environ | engine_environment(self.config.device, self.server.threads) | {"VLLM_API_KEY": key}
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        command += server_arguments(self.config, self.server, host, port)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115, it is the server's
        self._process = subprocess.Popen(
            [sys.executable, str(Path(supervised.__file__)), *command],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        self._wait_for(f"http://{host}:{port}/health")
        self._address = (f"http://{host}:{port}/v1", key)

    def address(self) -> tuple[str, str]:
        """URL, up to and with `/v1`, and key."""
        return self._address

    def close(self) -> None:
        """End the server; calling it again does nothing."""
        if self._process is not None:
            self._process.communicate(timeout=END_S)  # closes the pipe

    def _wait_for(self, url: str) -> None:
        assert self._process is not None
        deadline = time.monotonic() + self.config.timeouts.start
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while True:
            try:
                direct.open(url, timeout=5).close()
                return
            except (urllib.error.URLError, OSError):
                pass
            code = self._process.poll()
            if code is not None or time.monotonic() > deadline:
                said = self._last_words()
                self.close()
                why = f"ended with exit code {code}" if code is not None else "did not answer in time (timeouts.start)"
                raise RuntimeError(f"the server of {self.server.path} {why}; it said last: {said}")
            time.sleep(POLL_S)

    def _last_words(self) -> str:
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - _SHOWN))
        return self._log.read().decode(errors="replace").strip()


def server_arguments(config: Config, server: ServerConfig, host: str, port: int) -> list[str]:
    """Of vLLM's server; the key goes through the environment, where no process list shows it."""
    dtype = "float32" if config.device == "cpu" else "bfloat16"
    arguments = ["--model", server.path, "--served-model-name", server.name, "--host", host, "--port", str(port)]
    arguments += ["--dtype", dtype, "--max-model-len", str(server.max_model_len), "--uvicorn-log-level", "warning"]
    arguments += ["--kv-cache-memory-bytes", str(int(server.kv_cache_gib * 2**30)), "--disable-log-stats"]
    arguments += ["--logprobs-mode", "processed_logprobs"]  # where only labels are allowed, their shares alone
    if config.model.trust_remote_code:
        arguments.append("--trust-remote-code")
    if config.device == "cpu":
        arguments += ["--enforce-eager", "--block-size", "32", "--distributed-executor-backend", "uni"]
    return arguments
