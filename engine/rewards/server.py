"""Reward functions behind HTTP, so that a run elsewhere can ask for them (`engine.rewards.remote.Remote`).

    POST /score {"samples": [...]} --> token? size? --> waiting samples --(max_batch, or max_wait later)--> a thread
        <-- {"results": [...]} one for each sample, in order <-- results <-- pool.score(all of them) <------'

The event loop only waits: the functions run in the pool's processes, each call with its deadline, and several batches
may be under way at once. A result is {"rewards": {name: reward}}, where a reward is what the function returned (number,
null for no opinion, dict of parts, list of steps), or {"error": {"kind": ..., "message": ...}}. JSON only.
"""

# No `from __future__ import annotations`: FastAPI reads the handlers' annotations, and its types are imported late.

import asyncio
import contextlib
import ipaddress
import logging
import math
import os
import re
import secrets
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engine.config import RewardsConfig, UserError
from engine.rewards.contract import Sample, Scores
from engine.row import Row

LARGEST_REQUEST = 16 * 2**20
"""Bytes of a request's body."""
MOST_BATCHES = 64
"""Batches under way at once; the others wait."""
GRACE_S = 2
"""Seconds that requests under way get when the server ends."""
_NEVER = 2**31

logger = logging.getLogger(__name__)


class Pool(Protocol):
    """What runs the functions: `actors.reward_pool.RewardPool`."""

    def start(self) -> None:
        """Import the functions; raises UserError where one cannot be used."""

    def score(self, samples: list[Sample]) -> Scores:
        """Blocks; called from several threads at once."""

    def close(self) -> None:
        """End everything, also calls under way; once more does nothing."""


class _WireSample(BaseModel):
    """A `Sample` as it travels."""

    model_config = ConfigDict(extra="forbid")

    completion: str
    prompt: str | list[dict[str, Any]] = ""
    id: int = 0
    row: dict[str, Any] = {}
    finish_reason: str = Field(default="stop", pattern="^(stop|length)$")
    num_tokens: int = 0
    completion_ids: tuple[int, ...] = ()
    prompt_ids: tuple[int, ...] = ()
    messages: tuple[dict[str, Any], ...] = ()
    step_texts: tuple[str, ...] = ()

    def sample(self) -> Sample:
        return Sample(**{name: getattr(self, name) for name in type(self).model_fields} | {"row": Row(self.row)})


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")

    samples: list[_WireSample]


def rewards_config(functions: Sequence[str], *, workers: int, timeout: float) -> RewardsConfig:
    """The pool's settings: nothing is repeated and nothing stops the server, as both are for the asking run to decide.

    `timeout` is in seconds, for functions whose `@reward` names none.

    Raises:
        UserError: a setting has no sensible value.
    """
    entries = [{"function": function, "on_error": "skip"} for function in functions]
    limits = {"workers": workers, "timeout": timeout, "retries": 0, "stop_after_failures": _NEVER}
    try:
        return RewardsConfig.model_validate({"functions": entries, **limits})
    except ValidationError as error:
        raise UserError(_first_problem(error)) from None


def results_of(samples: Sequence[Sample], scores: Scores) -> list[dict[str, Any]]:
    """What is sent back for each sample: its rewards by function, or the kind and the reasons of its failure."""
    return [_result(position, sample, scores) for position, sample in enumerate(samples)]


def _result(position: int, sample: Sample, scores: Scores) -> dict[str, Any]:
    kind = scores.dropped.get(position)
    if kind is None:
        names = [name for name in scores.components if "/" not in name]
        return {"rewards": {name: _reward(name, position, scores) for name in names}}
    failures = [i for i in scores.incidents if i["sample_id"] in (sample.id, None)]
    reasons = dict.fromkeys(f"{failure['function']}: {failure['message']}" for failure in failures)
    return {"error": {"kind": kind, "message": "; ".join(reasons)}}


def _reward(name: str, position: int, scores: Scores) -> float | dict[str, float] | list[float] | None:
    """As the function returned it. Parts that only other samples of the batch have are left out."""
    total = float(scores.components[name][position])
    if math.isnan(total):
        return None
    steps = scores.steps.get(name, {position: None})[position]
    if steps is not None:
        return [float(step) for step in steps]
    prefix = f"{name}/"
    parts = {key.removeprefix(prefix): v[position] for key, v in scores.components.items() if key.startswith(prefix)}
    return {part: float(value) for part, value in parts.items() if not math.isnan(value)} or total


class Batcher:
    """Joins the samples of concurrent requests into one call of the pool. For use in one event loop."""

    def __init__(self, pool: Pool, *, max_batch: int, max_wait: float) -> None:
        """`max_batch` samples make a batch; the first of fewer waits `max_wait` seconds."""
        self.problem: str | None = None
        """Why the pool could not score the last batch at all; None if it could."""
        self._pool = pool
        self._max_batch = max_batch
        self._max_wait = max_wait
        self._threads = ThreadPoolExecutor(MOST_BATCHES, thread_name_prefix="score")
        self._waiting: list[tuple[Sample, asyncio.Future[dict[str, Any]]]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._under_way: set[asyncio.Task[None]] = set()

    async def score(self, samples: Sequence[Sample]) -> list[dict[str, Any]]:
        """The results of these samples, in order.

        Raises:
            RuntimeError: the pool itself failed.
        """
        return await asyncio.gather(*[self._add(sample) for sample in samples])

    def _add(self, sample: Sample) -> asyncio.Future[dict[str, Any]]:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[dict[str, Any]] = loop.create_future()
        self._waiting.append((sample, answer))
        if len(self._waiting) >= self._max_batch:
            self._send()
        elif self._timer is None:
            self._timer = loop.call_later(self._max_wait, self._send)
        return answer

    def _send(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        batch, self._waiting = self._waiting, []
        task = asyncio.get_running_loop().create_task(self._score(batch))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def _score(self, batch: list[tuple[Sample, asyncio.Future[dict[str, Any]]]]) -> None:
        samples = [sample for sample, _ in batch]
        loop = asyncio.get_running_loop()
        try:
            scores = await loop.run_in_executor(self._threads, self._pool.score, samples)
            self.problem = None
            for (_, answer), result in zip(batch, results_of(samples, scores), strict=True):
                if not answer.done():  # its client may be gone
                    answer.set_result(result)
        except Exception as error:  # of the pool: each waiting request is told
            self.problem = f"the reward functions cannot be called: {error}"
            logger.exception("the pool failed")
            for _, answer in batch:
                if not answer.done():
                    answer.set_exception(RuntimeError(self.problem))

    async def close(self) -> None:
        """End the pool; what is under way ends with it."""
        await asyncio.to_thread(self._pool.close)
        await asyncio.gather(*self._under_way)
        self._threads.shutdown()


def make_app(pool: Pool, *, token: str, max_batch: int, max_wait: float) -> Callable[..., Any]:
    """The ASGI application around a started pool, which it closes at its end.

    Args:
        pool: runs the functions.
        token: that every request must carry.
        max_batch: samples in one call of the functions.
        max_wait: seconds that a sample waits for others.

    Raises:
        UserError: fastapi is not installed.
    """
    try:
        from fastapi import Depends, FastAPI, HTTPException, Request
        from fastapi.responses import JSONResponse
    except ImportError as error:
        raise UserError(
            f"`gnomon serve reward` needs fastapi and uvicorn ({error}); pip install fastapi uvicorn"
        ) from None

    batcher = Batcher(pool, max_batch=max_batch, max_wait=max_wait)
    expected = f"Bearer {token}".encode()

    def known(request: Request) -> None:
        given = request.headers.get("Authorization", "").encode("latin-1")
        if not secrets.compare_digest(given, expected):
            raise HTTPException(
                401, "Authorization: Bearer <token> is missing or wrong", {"WWW-Authenticate": "Bearer"}
            )

    async def body_of(request: Request) -> bytes:
        too_large = HTTPException(413, f"a request may hold {LARGEST_REQUEST} bytes; send fewer samples at a time")
        if int(request.headers.get("Content-Length", 0)) > LARGEST_REQUEST:
            raise too_large
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > LARGEST_REQUEST:
                raise too_large
        return bytes(body)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await batcher.close()

    app = FastAPI(dependencies=[Depends(known)], lifespan=lifespan, openapi_url=None)

    @app.get("/health")
    async def health() -> JSONResponse:
        if batcher.problem is not None:
            return JSONResponse({"status": "failing", "detail": batcher.problem}, 503)
        return JSONResponse({"status": "ok"})

    @app.post("/score")
    async def score(request: Request) -> JSONResponse:
        # The body is read here, not by FastAPI, which would read all of it before it looked at the token.
        body = await body_of(request)
        try:
            samples = [each.sample() for each in _Request.model_validate_json(body).samples]
        except ValidationError as error:
            raise HTTPException(422, _first_problem(error)) from None
        try:
            return JSONResponse({"results": await batcher.score(samples)})
        except RuntimeError as error:
            raise HTTPException(503, str(error)) from None

    return app


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'request'}: {first['msg']}"


def serve(
    make_pool: Callable[[RewardsConfig], Pool],
    functions: Sequence[str],
    *,
    host: str,
    port: int,
    token_variable: str,
    workers: int,
    timeout: float,
    max_batch: int,
    max_wait_ms: float,
) -> None:
    """Serve until Ctrl-C or SIGTERM; prints the address, and the token where it makes one. For the main thread.

    Args:
        make_pool: the pool of these settings, not started.
        functions: as in `rewards.functions`.
        host: address to listen at.
        port: 0 takes a free one.
        token_variable: environment variable with the token; where it is unset, a token is made.
        workers: processes that run the functions.
        timeout: seconds of one call, where the function's `@reward` names none.
        max_batch: samples in one call of the functions.
        max_wait_ms: milliseconds that a sample waits for others.

    Raises:
        UserError: a function, the address or the token cannot be used.
        KeyboardInterrupt: Ctrl-C. SIGTERM is a SystemExit with code 0.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise UserError(
            f"`gnomon serve reward` needs fastapi and uvicorn ({error}); pip install fastapi uvicorn"
        ) from None

    signal.signal(signal.SIGTERM, _leave)  # uvicorn hands the signal on once it has ended
    token, made = _token(token_variable)
    pool = make_pool(rewards_config(functions, workers=workers, timeout=timeout))
    app = make_app(pool, token=token, max_batch=max_batch, max_wait=max_wait_ms / 1000)
    with contextlib.closing(_listener(host, port)) as listener, contextlib.closing(pool):
        pool.start()
        _announce(listener, functions, token_variable, token if made else None)
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE_S)
        uvicorn.Server(config).run(sockets=[listener])


def _leave(*_: Any) -> NoReturn:
    sys.exit(0)


def _token(variable: str) -> tuple[str, bool]:
    """The token, and whether it was made here."""
    token = os.environ.get(variable, "").strip()
    if not re.fullmatch(r"[!-~]*", token):
        raise UserError(f"{variable}: a token is made of visible ASCII characters, without spaces; set it again")
    return (token, False) if token else (secrets.token_urlsafe(32), True)


def _listener(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as error:
        raise UserError(f"cannot listen at {host}:{port}: {error}; choose another --host or --port") from None


def _announce(listener: socket.socket, functions: Sequence[str], variable: str, made: str | None) -> None:
    host, port = listener.getsockname()[:2]
    if not ipaddress.ip_address(host).is_loopback:
        print("warning: not only this machine can reach the server, and what travels is not encrypted", file=sys.stderr)
    if made is not None:
        print(f"{variable} is not set; the token of this server, shown only once: {made}")
    shown = f"[{host}]" if ":" in host else host
    print(f"serving {', '.join(functions)} at http://{shown}:{port} (Ctrl-C ends it)", flush=True)
