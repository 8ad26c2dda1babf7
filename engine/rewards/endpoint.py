"""A client for the chat completions of any server that speaks OpenAI's protocol.

    ask(body) --> on disk? --yes--------------------------------------> read --> answer
                     | no                                                ^
                     `--> wait for a turn --> openai, which repeats -----'--> written to disk, tokens counted

Every request has a client of its own. Reward calls run under event loops that may live for one call only, and a pooled
connection must not outlive its loop; beside the time a model takes to answer, a handshake is nothing. The key is read
from the environment for each request and is neither kept nor shown.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from engine.config import UserError
from engine.rewards.http import certificates, checked_url, is_loopback

T = TypeVar("T")

_LONGEST_QUEUE = 3600.0
_SHOWN = 300


class EndpointError(RuntimeError):
    """The server gave no usable answer; the message names the server and the reason."""


class Alternative(BaseModel):
    """A token that could stand at a position."""

    token: str
    logprob: float


class Token(Alternative):
    """The token that does, and the most probable ones there."""

    top_logprobs: list[Alternative] = []

    @property
    def alternatives(self) -> dict[str, float]:
        """token -> log-probability; the token itself is always among them."""
        return {self.token: self.logprob} | {each.token: each.logprob for each in self.top_logprobs}


class _Logprobs(BaseModel):
    content: list[Token] | None = None


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message
    logprobs: _Logprobs | None = None


class _TokenCount(BaseModel):
    prompt_tokens: int
    completion_tokens: int


class Completion(BaseModel):
    """What we read of a server's answer."""

    choices: list[_Choice] = Field(min_length=1)
    usage: _TokenCount | None = None

    @property
    def text(self) -> str:
        """Of the first choice; empty where the server gave none."""
        return self.choices[0].message.content or ""

    @property
    def tokens(self) -> list[Token]:
        """Of the first choice; empty where the server gave no log-probabilities."""
        logprobs = self.choices[0].logprobs
        return (logprobs.content or []) if logprobs else []


@dataclass(frozen=True)
class Usage:
    """What an endpoint has asked for so far, in this process."""

    answers: int = 0
    """Answers that the server gave, and wants to be paid for."""
    cached: int = 0
    """Answers that were on disk."""
    uncounted: int = 0
    """Answers that did not say how many tokens they took; the numbers below leave them out."""
    prompt_tokens: int = 0
    """Read by the server."""
    completion_tokens: int = 0
    """Written by the server."""
    cost: float = 0.0
    """In the unit of the prices."""


class Endpoint:
    """One server, with its limits, its answers on disk and its bill. Any number of calls, loops and threads at once."""

    def __init__(
        self,
        *,
        url: str | None = None,
        server: str | None = None,
        key_variable: str | None = None,
        deadline: float = 60.0,
        retries: int = 4,
        requests_per_second: float | None = None,
        concurrent: int = 16,
        cache: str | Path | None = None,
        input_price: float = 0.0,
        output_price: float = 0.0,
    ) -> None:
        """Nothing is asked of the server yet, and no variable is read.

        Args:
            url: base address, up to and with `/v1`.
            server: instead of it, the name of a server: GNOMON_SERVER_<NAME>_URL and _KEY hold address and key.
            key_variable: name of the environment variable that holds the key of `url`; None: the server wants none.
            deadline: seconds without an answer after which a request is repeated.
            retries: repetitions after 408, 409, 429, 5xx, a missed deadline or a broken connection.
            requests_per_second: of all processes that share `cache`; without one, of this process.
            concurrent: requests under way at a time, of one event loop.
            cache: folder that keeps answers; processes may share it.
            input_price: of a million prompt tokens.
            output_price: of a million tokens written.

        Raises:
            UserError: not exactly one of `url` and `server`, a malformed address, or a key where a variable's name is
                due.
        """
        if (url is None) == (server is None):
            raise UserError("give either url or server, the name of one of rewards.servers")
        if key_variable is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}", key_variable):
            raise UserError(  # what was given may be the key itself: not shown
                "key_variable must be the name of an environment variable that holds the key (capital letters, digits, "
                "_), not the key itself"
            )
        if server is not None:
            if key_variable is not None:
                raise UserError("key_variable goes with url; the key of a server comes from GNOMON_SERVER_<NAME>_KEY")
            prefix = "GNOMON_SERVER_" + re.sub(r"\W", "_", server).upper()
            self._url_variable, key_variable = f"{prefix}_URL", f"{prefix}_KEY"
        self._url = None if url is None else checked_url(url)
        self._server = server
        self._key_variable = key_variable
        self._deadline = deadline
        self._retries = retries
        self._concurrent = concurrent
        self._folder = None if cache is None else Path(cache)
        self._prices = (input_price, output_price)
        self._identity = server or str(self._url)
        self._pace = _Pace(requests_per_second, self._folder, self._identity) if requests_per_second else None
        self._lock = threading.Lock()
        self._slots: dict[asyncio.AbstractEventLoop, asyncio.Semaphore] = {}
        self._usage = Usage()

    @property
    def usage(self) -> Usage:
        """So far."""
        return self._usage

    async def ask(self, body: Mapping[str, Any], read: Callable[[Completion], T], draw: int = 0) -> T:
        """The answer to a request, as `read` makes it out.

        An answer is kept on disk once `read` has accepted it: one that raises is asked for again next time.

        Args:
            body: of the request: model, messages, ...
            read: what the caller wants of the answer; what it raises passes through.
            draw: tells requests apart that are equal and want an answer each.

        Raises:
            EndpointError: no usable answer, after all repetitions.
            UserError: an environment variable is missing or malformed.
        """
        path = self._path(body, draw)
        kept = None if path is None else _load(path)
        if kept is not None:
            value = read(kept)
            self._count(cached=1)
            return value
        data = await self._post(body)
        try:
            completion = Completion.model_validate_json(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            shown = self._shown(data.decode(errors="replace"))
            raise EndpointError(
                f"{self._name()}: answered something that is no chat completion ({where} {first['msg']}): {shown}"
            ) from None
        self._bill(completion)
        value = read(completion)
        if path is not None:
            _store(path, {"request": dict(body), "draw": draw, "response": json.loads(data)})
        return value

    def _path(self, body: Mapping[str, Any], draw: int) -> Path | None:
        """Where the answer is kept. A named server's address changes from run to run, so its name stands for it."""
        if self._folder is None:
            return None
        request = json.dumps([self._identity, body, draw], sort_keys=True)
        digest = hashlib.sha256(request.encode()).hexdigest()
        return self._folder / digest[:2] / f"{digest}.json"

    async def _post(self, body: Mapping[str, Any]) -> bytes:
        """The server's answer, as it came; repetitions, and waits that the server asks for, are the client's."""
        import openai

        url, key = self._address(), self._key()
        if self._pace is not None:
            await asyncio.sleep(self._pace.reserve())
        try:
            async with (
                self._slot(),
                openai.DefaultAsyncHttpxClient(verify=certificates(), trust_env=not is_loopback(url)) as http,
            ):
                client = openai.AsyncOpenAI(
                    base_url=url,
                    api_key=key or "none",
                    timeout=self._deadline,
                    max_retries=self._retries,
                    http_client=http,
                )
                rest = {name: value for name, value in body.items() if name not in ("model", "messages")}
                response = await client.chat.completions.with_raw_response.create(
                    model=body["model"], messages=body["messages"], extra_body=rest
                )
        except openai.APITimeoutError:
            raise EndpointError(f"{self._name()}: no answer within {self._deadline:g} s") from None
        except openai.APIConnectionError as error:
            reason = self._shown(f"{type(error.__cause__).__name__}: {error.__cause__}")
            raise EndpointError(f"{self._name()}: cannot be reached: {reason}") from None
        except openai.APIStatusError as error:
            told = self._shown(error.response.text)
            hint = self._hint(error.status_code, key)
            raise EndpointError(f"{self._name()}: HTTP {error.status_code}: {told}{hint}") from None
        return response.content

    def _slot(self) -> asyncio.Semaphore:
        """Of the running loop, as a semaphore belongs to one."""
        with self._lock:
            self._slots = {loop: slots for loop, slots in self._slots.items() if not loop.is_closed()}
            return self._slots.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(self._concurrent))

    def _address(self) -> str:
        if self._url is not None:
            return self._url
        value = os.environ.get(self._url_variable)
        if not value:
            raise UserError(
                f"server {self._server!r}: {self._url_variable} is not set; `rewards.servers` starts servers for a "
                "run, and outside of one give `url`"
            )
        return checked_url(value)

    def _key(self) -> str | None:
        if self._key_variable is None:
            return None
        key = os.environ.get(self._key_variable, "").strip()
        if not key and self._server is None:
            raise UserError(f"{self._name()}: the environment variable {self._key_variable} (key_variable) is not set")
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"{self._name()}: {self._key_variable} holds characters that no key has; set it again")
        return key or None

    def _hint(self, status: int, key: str | None) -> str:
        if status not in (401, 403):
            return ""
        return f" (the key is that of {self._key_variable})" if key else " (no key was sent; name its key_variable)"

    def _name(self) -> str:
        return f"server {self._server!r} ({self._address()})" if self._server else str(self._url)

    def _shown(self, text: str) -> str:
        """Something the server said, on one line, short, without the key that it may have repeated."""
        key = self._key()
        text = text.replace(key, "<key>") if key else text
        return " ".join(text.split())[:_SHOWN]

    def _bill(self, completion: Completion) -> None:
        used = completion.usage
        if used is None:
            self._count(answers=1, uncounted=1)
            return
        cost = (used.prompt_tokens * self._prices[0] + used.completion_tokens * self._prices[1]) / 1e6
        self._count(1, prompt_tokens=used.prompt_tokens, completion_tokens=used.completion_tokens, cost=cost)

    def _count(self, answers: int = 0, **more: float) -> None:
        with self._lock:
            now = self._usage
            added = {name: getattr(now, name) + value for name, value in (more | {"answers": answers}).items()}
            self._usage = replace(now, **added)


class _Pace:
    """Gives each request its time, 1/rate after the one before, in one file for all processes that share a folder."""

    def __init__(self, rate: float, folder: Path | None, identity: str) -> None:
        self._interval = 1 / rate
        self._lock = threading.Lock()
        self._free = 0.0
        self._file: Path | None = None
        if folder is not None:
            self._file = folder / f"pace-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"

    def reserve(self) -> float:
        """Seconds until this request's turn."""
        with self._lock:
            if self._file is None:
                wait, self._free = self._next(self._free)
                return wait
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.seek(0)
                wait, free = self._next(float(file.read() or 0))
                file.truncate(0)
                file.write(repr(free))
            return wait

    def _next(self, free: float) -> tuple[float, float]:
        now = time.time()  # processes share no other clock
        if free > now + _LONGEST_QUEUE:
            free = now  # the clock was set back
        start = max(now, free)
        return start - now, start + self._interval


def _load(path: Path) -> Completion | None:
    """A kept answer; None where there is none, or none that can be read."""
    try:
        return Completion.model_validate(json.loads(path.read_bytes())["response"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _store(path: Path, entry: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    with os.fdopen(handle, "w") as file:
        json.dump(entry, file)
    os.replace(temporary, path)
