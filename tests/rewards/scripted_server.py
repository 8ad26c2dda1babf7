"""A local HTTP server that answers chat completions as a test says, and keeps what it was asked."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, Mapping[str, str], bytes]


def completion(text: str, alternatives: Mapping[str, float] | None = None) -> Answer:
    """200 with a text of one token; `alternatives` are probabilities of tokens at its place."""
    logprobs = None
    if alternatives is not None:
        listed = [{"token": token, "logprob": math.log(share)} for token, share in alternatives.items()]
        own = next((each for each in listed if each["token"] == text), {"token": text, "logprob": -9999.0})
        logprobs = {"content": [own | {"top_logprobs": listed}]}
    body = {
        "choices": [{"message": {"role": "assistant", "content": text}, "logprobs": logprobs}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10},
    }
    return 200, {}, json.dumps(body).encode()


@dataclass
class Scripted:
    """What a test sees of its server."""

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    most_at_once: int = 0


@contextmanager
def scripted(answer: Callable[[dict[str, Any]], Answer]) -> Iterator[Scripted]:
    """`answer` gets each request's body, from several threads at once."""
    seen = Scripted()
    lock = threading.Lock()
    running = 0

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            nonlocal running
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                running += 1
                seen.most_at_once = max(seen.most_at_once, running)
                seen.bodies.append(body)
                seen.keys.append(self.headers["Authorization"])
                seen.times.append(time.monotonic())
            status, headers, data = answer(body)
            with lock:
                running -= 1
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    seen.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield seen
    finally:
        server.shutdown()
        server.server_close()
