"""The environment contract: an object per episode that opens it and replies to each of the policy's messages.

    class Shop(Environment):
        tools = [...]                                   # optional: JSON schemas for the chat template

        async def reset(self, row: Row) -> list[dict]:  # messages after the row's prompt; often none
            ...

        async def step(self, message: dict) -> Turn:    # {"role": "assistant", "content": ...} -> what comes next
            return Turn([{"role": "tool", "content": "..."}], reward=None, done=False)

`reset`, `step` and `close` may be `async` or not; a base class is not needed. An episode ends when a turn is done
or has no messages, or at a budget. A reward of None is no opinion; rewards of several turns add up.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Protocol

from engine.config import EnvironmentConfig, UserError
from engine.row import Row
from engine.user_code import load_object

Message = dict[str, Any]
"""`role` and `content`, as in a data row."""

BUILT_IN = {"tools": "engine.environments.tools:ToolEnvironment"}
"""Environments that are named without a module."""


@dataclass(frozen=True)
class Turn:
    """The environment's reply to a message of the policy."""

    messages: list[Message] = field(default_factory=list)
    """What the policy reads next."""
    reward: float | None = None
    """Of the policy's message; None is no opinion."""
    done: bool = False
    """The episode is over; `messages` are not read by anybody."""


class Environment(Protocol):
    """One episode."""

    def reset(self, row: Row) -> Any:
        """Messages after the row's prompt, or an awaitable of them."""

    def step(self, message: Message) -> Any:
        """A `Turn`, or an awaitable of one."""


class EnvironmentReplyError(Exception):
    """The environment returned something that is no reply; the message says what."""


def load_environment(config: EnvironmentConfig) -> tuple[type, list[dict[str, Any]]]:
    """The class that makes episodes with `config.arguments`, and the schemas of its tools.

    Raises:
        UserError: it cannot be imported or made, or lacks `reset` or `step`.
    """
    spec = BUILT_IN.get(config.path, config.path)
    if ":" not in spec:
        known = ", ".join(BUILT_IN)
        raise UserError(f"environment.path: {spec!r} must be pkg.mod:Class, path/file.py:Class or a built-in: {known}")
    loaded = load_object(spec, what="environment.path")
    try:
        inspect.signature(loaded).bind(**config.arguments)
    except TypeError as error:
        raise UserError(f"environment.arguments: {config.path} does not take them: {error}") from None
    made = loaded(**config.arguments)
    missing = [name for name in ("reset", "step") if not callable(getattr(made, name, None))]
    if missing:
        raise UserError(
            f"environment.path: {config.path} has no method {missing[0]!r}; an environment has reset and step"
        )
    return loaded, list(getattr(made, "tools", []))


def checked_messages(value: Any, where: str) -> list[Message]:
    """What `reset` or a turn brought, if it is messages.

    Raises:
        EnvironmentReplyError: it is not.
    """
    if not isinstance(value, list | tuple):
        raise EnvironmentReplyError(f"{where} returned {value!r:.80}, not a list of messages")
    for message in value:
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise EnvironmentReplyError(
                f"{where} returned {message!r:.80}; a message has 'role' and 'content', both text"
            )
        if message["role"] == "assistant":
            raise EnvironmentReplyError(f"{where} returned a message of the assistant, who is the policy")
    return [dict(message) for message in value]


def checked_turn(value: Any) -> Turn:
    """What `step` returned, if it is a reply.

    Raises:
        EnvironmentReplyError: it is not.
    """
    if not isinstance(value, Turn):
        raise EnvironmentReplyError(f"step() returned {value!r:.80}, not a Turn(messages, reward, done)")
    reward = value.reward
    if reward is not None and (not isinstance(reward, Real) or not math.isfinite(float(reward))):
        raise EnvironmentReplyError(f"step() gave the reward {reward!r:.40}; it must be a finite number or None")
    messages = checked_messages(value.messages, "step()")
    return Turn(messages, None if reward is None else float(reward), bool(value.done))
