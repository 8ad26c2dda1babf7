"""Python functions as tools: the policy calls them in its messages, their results are the replies.

    policy: <tool_call>{"name": "calculate", "arguments": {"expression": "6 * 7"}}</tool_call>
    tool:   42
    policy: The answer is 42.                      no call: the episode is over

Understood are calls as Hermes and Qwen write them (above; several in one message), and a message that is one bare JSON
object with `name` and `arguments` or `parameters` (Llama 3). A call that cannot be made (malformed, unknown tool, wrong
arguments, an exception of the tool) is answered with a message that says so: the policy may try again.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from engine.config import UserError
from engine.environments.contract import Message, Turn
from engine.row import Row
from engine.user_code import load_object

LONGEST_RESULT = 2000
"""Characters of a tool's result that the policy reads."""
_TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Call:
    """A tool call in a message."""

    name: str
    arguments: dict[str, Any]


def read_calls(text: str) -> list[Call | str]:
    """The calls of a message in order; of one that cannot be read, what is wrong with it."""
    tagged = _TAGGED.findall(text)
    if tagged:
        return [_read_call(body) for body in tagged]
    body = text.strip()
    if body.startswith("{") and body.endswith("}"):
        call = _read_call(body)
        return [call] if isinstance(call, Call) else []
    return []


def _read_call(body: str) -> Call | str:
    try:
        held = json.loads(body)
    except ValueError as error:
        return f"the call is not JSON: {error}"
    if not isinstance(held, dict) or not isinstance(held.get("name"), str):
        return 'a call is a JSON object with "name" and "arguments"'
    arguments = held.get("arguments", held.get("parameters", {}))
    if not isinstance(arguments, dict):
        return 'the "arguments" of a call are a JSON object'
    return Call(held["name"], arguments)


class ToolEnvironment:
    """Answers tool calls until a message has none; gives no reward of its own."""

    def __init__(self, tools: Sequence[str | Callable[..., Any]]) -> None:
        """`tools` are functions, or where they are: `pkg.mod:fn`, `file.py:fn`. Both may be `async`.

        Their names, parameters' types and docstrings (with a section `Args:`) become the schemas that the chat template
        shows to the policy.

        Raises:
            UserError: there are none, one cannot be loaded, or lacks types or descriptions.
        """
        from transformers.utils import get_json_schema

        functions = [load_object(tool, what="tool") if isinstance(tool, str) else tool for tool in tools]
        if not functions:
            raise UserError("environment.arguments: tools is empty; name at least one function")
        self._functions = {function.__name__: function for function in functions}
        self.tools = []
        for name, function in self._functions.items():
            try:
                self.tools.append(get_json_schema(function))
            except Exception as error:  # transformers raises kinds of its own
                raise UserError(
                    f"tool {name!r}: no schema can be made of it: {error}; give each parameter a type, and the "
                    "docstring a line for each under Args:"
                ) from None

    def reset(self, row: Row) -> list[Message]:
        """The row's prompt is all there is."""
        return []

    async def step(self, message: Message) -> Turn:
        """The results of the message's calls, one message each; done where there is none."""
        calls = read_calls(message["content"])
        results = [call if isinstance(call, str) else await self._result(call) for call in calls]
        replies = [{"role": "tool", "content": result} for result in results]
        return Turn(replies, done=not calls)

    async def _result(self, call: Call) -> str:
        function = self._functions.get(call.name)
        if function is None:
            return f"error: there is no tool {call.name!r}; there are: {', '.join(self._functions)}"
        try:
            inspect.signature(function).bind(**call.arguments)
        except TypeError as error:
            return f"error: {call.name}: {error}"
        try:
            value = function(**call.arguments)
            value = await value if inspect.isawaitable(value) else value
        except Exception as error:
            return f"error: {type(error).__name__}: {error}"[:LONGEST_RESULT]
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        return text if len(text) <= LONGEST_RESULT else text[: LONGEST_RESULT - 3] + "..."
