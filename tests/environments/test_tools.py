"""Tool calls: how they are written, what they come to, and that no mistake of the policy is an incident."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from engine.config import UserError
from engine.environments.contract import Turn
from engine.environments.tools import LONGEST_RESULT, Call, ToolEnvironment, read_calls
from engine.row import Row


def add(a: int, b: int = 1) -> int:
    """Add two numbers.

    Args:
        a: the first.
        b: the second.
    """
    return a + b


async def shout(text: str) -> str:
    """Say it loudly.

    Args:
        text: what to say.
    """
    await asyncio.sleep(0)
    if text == "no":
        raise ValueError("I will not")
    return text.upper() * (LONGEST_RESULT if text == "long" else 1)


def said(text: str, *tools: Any) -> Turn:
    return asyncio.run(ToolEnvironment(tools or (add, shout)).step({"role": "assistant", "content": text}))


def call(body: str) -> str:
    return f"<tool_call>{body}</tool_call>"


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("It is 4.", []),
        ('so <tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>', [Call("add", {"a": 1})]),
        ('<tool_call>{"name": "add", "arguments": {"a": 1}}', [Call("add", {"a": 1})]),
        ('{"name": "add", "parameters": {"a": 1}}', [Call("add", {"a": 1})]),
        ('{"answer": 3}', []),
        (call('{"name": "f"}') + " and " + call('{"name": "g", "arguments": {}}'), [Call("f", {}), Call("g", {})]),
    ],
)
def test_calls_are_read_as_models_write_them(text, calls):
    assert read_calls(text) == calls


def test_a_message_with_calls_is_answered_call_by_call():
    turn = said(
        call('{"name": "add", "arguments": {"a": 2, "b": 3}}') + call('{"name": "shout", "arguments": {"text": "hi"}}')
    )
    assert [m["content"] for m in turn.messages] == ["5", "HI"]
    assert {m["role"] for m in turn.messages} == {"tool"}
    assert (turn.reward, turn.done) == (None, False)


def test_a_message_without_a_call_ends_the_episode():
    assert said("It is 5.") == Turn([], None, True)


@pytest.mark.parametrize(
    ("body", "answer"),
    [
        ("{", "the call is not JSON"),
        ("[1]", 'a call is a JSON object with "name" and "arguments"'),
        ('{"name": "add", "arguments": [1]}', 'the "arguments" of a call are a JSON object'),
        ('{"name": "sub", "arguments": {}}', "error: there is no tool 'sub'; there are: add, shout"),
        ('{"name": "add", "arguments": {"c": 1}}', "error: add: missing a required argument: 'a'"),
        ('{"name": "shout", "arguments": {"text": "no"}}', "error: ValueError: I will not"),
    ],
)
def test_a_call_that_cannot_be_made_is_told_to_the_policy_which_may_go_on(body, answer):
    turn = said(call(body))
    assert turn.messages[0]["content"].startswith(answer)
    assert not turn.done


def test_a_long_result_is_cut():
    [message] = said(call('{"name": "shout", "arguments": {"text": "long"}}')).messages
    assert len(message["content"]) == LONGEST_RESULT
    assert message["content"].endswith("...")


def test_the_template_is_shown_names_types_and_descriptions():
    environment = ToolEnvironment([add])
    assert environment.reset(Row({})) == []
    [schema] = environment.tools
    assert schema["function"]["name"] == "add"
    assert schema["function"]["parameters"]["properties"]["a"] == {"type": "integer", "description": "the first."}
    assert schema["function"]["parameters"]["required"] == ["a"]


def test_tools_that_cannot_be_used_are_told():
    def bare(x):
        return x

    with pytest.raises(UserError, match="tool 'bare': no schema"):
        ToolEnvironment([bare])
    with pytest.raises(UserError, match="tools is empty"):
        ToolEnvironment([])
