"""A reward that a server computes (`gnomon serve reward`, or anything that answers POST /score as it does).

    sample --JSON--> circuit closed? --> POST /score --> 200: rewards --> the function's reward, as it returned it
                          |                  `--> 429, 5xx, no connection: back off, again, within the deadline
                          `--> open: an error at once, until a trial succeeds

What goes wrong is an exception, which the pool counts as an incident of the sample; it is never a reward. Each attempt
has a connection of its own: a reward call may live in an event loop of its own, and a connection must not outlive that.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from pydantic import BaseModel, ValidationError

from engine.config import UserError
from engine.rewards.contract import Sample
from engine.rewards.http import certificates, checked_url, is_loopback

FIRST_BACKOFF = 0.25
"""Seconds, at most, before the first repetition; doubled each time."""
MOST_BACKOFF = 8.0
"""Seconds, at most, before any repetition."""
_SHOWN = 300

Reward = float | None | dict[str, float | None] | list[float]


class RemoteError(RuntimeError):
    """The server gave no reward; the message names the server and the reason."""


class _Failure(BaseModel):
    kind: str
    message: str


class _Result(BaseModel):
    rewards: dict[str, Reward] | None = None
    error: _Failure | None = None


class _Answer(BaseModel):
    results: list[_Result]


class Circuit:
    """Closed, open after `failures` in a row, half-open `seconds` later: one trial then closes or opens it.

    No failure while half-open lets a second trial through. Thread-safe; without I/O.
    """

    def __init__(self, failures: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._failures = failures
        self._seconds = seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._in_a_row = 0
        self._opened: float | None = None
        self._trying = False

    def admit(self) -> float:
        """0: go ahead, and report `succeeded`, `failed` or `gave_up`. Else the seconds until a trial is possible."""
        with self._lock:
            if self._opened is None:
                return 0.0
            left = self._opened + self._seconds - self._clock()
            if left > 0 or self._trying:
                return max(left, 0.001)
            self._trying = True
            return 0.0

    def succeeded(self) -> None:
        """The server answered."""
        with self._lock:
            self._in_a_row, self._opened, self._trying = 0, None, False

    def failed(self) -> None:
        """It did not."""
        with self._lock:
            self._in_a_row += 1
            self._trying = False
            if self._in_a_row >= self._failures:
                self._opened = self._clock()

    def gave_up(self) -> None:
        """The caller did not wait to see."""
        with self._lock:
            self._trying = False


@dataclass(frozen=True)
class Remote:
    """The reward that a function of a server gives."""

    url: str
    """Address of the server, without `/score`."""
    component: str | None = None
    """Name of the function whose reward is taken. None: that of the only one; several are parts, unweighted."""
    token_env: str = "GNOMON_REWARD_TOKEN"
    """Name of the environment variable that holds the token."""
    timeout: float = 25.0
    """Seconds of one call, repetitions included. Less than the entry's `timeout`, which ends the process."""
    retries: int = 2
    """Repetitions after 429, 5xx or a broken connection."""
    open_after: int = 5
    """Failed attempts in a row, in this process, after which the server is left alone: calls fail at once."""
    open_seconds: float = 30.0
    """Seconds until one call tries it again."""
    columns: list[str] | None = None
    """Columns of the row that are sent; None: all."""
    _circuit: Circuit = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the arguments.

        Raises:
            UserError: one has no sensible value, or the token's variable is not set.
        """
        try:
            object.__setattr__(self, "url", checked_url(self.url))
        except UserError as error:
            raise UserError(f"remote: {error}") from None
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", self.token_env):
            raise UserError("remote: token_env must be the name of an environment variable, not the token itself")
        for name in ("timeout", "open_seconds"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"remote: {name}={getattr(self, name)}: must be a number of seconds above 0")
        if self.retries < 0 or self.open_after < 1:
            raise UserError(f"remote: retries={self.retries}, open_after={self.open_after}: at least 0 and 1")
        if self.component is not None and "/" in self.component:
            raise UserError(f"remote: component={self.component!r}: name a function; its parts come with it")
        self._token()
        object.__setattr__(self, "_circuit", Circuit(self.open_after, self.open_seconds))

    async def __call__(self, sample: Sample) -> Reward:
        """The reward of one sample, as the server's function returned it; None is its "no opinion".

        Raises:
            RemoteError: no answer in time, a refusal, or the function failed on this sample.
            ValueError, KeyError: the sample cannot be sent as JSON, or its row lacks a column.
        """
        result = self._result(await self._post(encode([sample], self.columns)))
        if result.error is not None or result.rewards is None:
            kind, reason = (result.error.kind, result.error.message) if result.error else ("no_reward", "nothing")
            raise RemoteError(f"{self.url}: {kind}: {reason}")
        return self._taken(result.rewards)

    def _taken(self, rewards: dict[str, Reward]) -> Reward:
        if self.component is None:
            if len(rewards) == 1:
                return next(iter(rewards.values()))
            return {name: _outcome(value) for name, value in rewards.items()}
        if self.component not in rewards:
            raise RemoteError(f"{self.url}: has no function {self.component!r}; it has {', '.join(rewards) or 'none'}")
        return rewards[self.component]

    async def _post(self, body: bytes) -> bytes:
        """The server's answer to a request, after repetitions."""
        deadline = time.monotonic() + self.timeout
        problem = ""
        for attempt in range(1, self.retries + 2):
            if wait := self._circuit.admit():
                raise RemoteError(
                    f"{self.url}: left alone for {wait:.1f} s more, after {self.open_after} failures in a row"
                    + (f"; the last: {problem}" if problem else "")
                )
            data, problem = await self._attempt(body, deadline - time.monotonic())
            if data is not None:
                return data
            backoff = random.uniform(0.5, 1.0) * min(MOST_BACKOFF, FIRST_BACKOFF * 2 ** (attempt - 1))
            if attempt > self.retries or time.monotonic() + backoff >= deadline:
                break
            await asyncio.sleep(backoff)
        raise RemoteError(f"{self.url}: {problem} (attempt {attempt} of {self.retries + 1})")

    async def _attempt(self, body: bytes, seconds: float) -> tuple[bytes | None, str]:
        """The answer, or None and why there is none. The circuit is told.

        Raises:
            RemoteError: a refusal that a repetition does not mend.
        """
        import httpx

        token = self._token()
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        try:
            async with (
                asyncio.timeout(seconds),
                httpx.AsyncClient(verify=certificates(), timeout=None, trust_env=not is_loopback(self.url)) as client,
            ):
                response = await client.post(f"{self.url}/score", content=body, headers=headers)
        except TimeoutError:
            self._circuit.failed()
            return None, f"no answer within {self.timeout:g} s"
        except httpx.RequestError as error:
            self._circuit.failed()
            return None, f"cannot be reached: {type(error).__name__}: {error}"
        except BaseException:
            self._circuit.gave_up()
            raise
        told = " ".join(response.text.replace(token, "<token>").split())[:_SHOWN] if not response.is_success else ""
        problem = f"HTTP {response.status_code}: {told}"
        if response.status_code == 429 or response.status_code >= 500:
            self._circuit.failed()
            return None, problem
        self._circuit.succeeded()
        if not response.is_success:
            hint = f" (the token is that of {self.token_env})" if response.status_code in (401, 403) else ""
            raise RemoteError(f"{self.url}: {problem}{hint}")
        return response.content, ""

    def _result(self, data: bytes) -> _Result:
        try:
            (result,) = _Answer.model_validate_json(data).results
        except (ValidationError, ValueError) as error:
            reason = " ".join(str(error).split())[:_SHOWN]
            raise RemoteError(f"{self.url}: answered something that is no result of one sample: {reason}") from None
        return result

    def _token(self) -> str:
        token = os.environ.get(self.token_env, "").strip()
        if not token:
            raise UserError(
                f"remote: the environment variable {self.token_env} is not set; it must hold the token of {self.url}"
            )
        if not re.fullmatch(r"[!-~]+", token):
            raise UserError(f"remote: {self.token_env} holds characters that no token has; set it again")
        return token


def encode(samples: list[Sample], columns: list[str] | None = None) -> bytes:
    """The body of a request.

    Raises:
        ValueError: a column is not JSON.
        KeyError: a row lacks one of `columns`.
    """
    return json.dumps({"samples": [_wire(sample, columns) for sample in samples]}).encode()


def _wire(sample: Sample, columns: list[str] | None) -> dict[str, Any]:
    row = {name: _plain(name, sample.row[name]) for name in (sample.row if columns is None else columns)}
    return {f.name: getattr(sample, f.name) for f in fields(Sample)} | {"row": row}


def _plain(column: str, value: Any) -> Any:
    """A column's value as JSON has it; arrays become lists."""
    try:
        return json.loads(json.dumps(value, default=lambda other: other.tolist()))
    except (TypeError, ValueError, AttributeError):
        raise ValueError(
            f"column {column!r} ({type(value).__name__}) cannot be sent as JSON; name those that the server needs in "
            "`columns`"
        ) from None


def _outcome(reward: Reward) -> float | None:
    """One number of a reward: parts and steps added up."""
    if isinstance(reward, dict):
        held = [part for part in reward.values() if part is not None]
        return sum(held) if held else None
    if isinstance(reward, list):
        return sum(reward) if reward else None
    return reward
