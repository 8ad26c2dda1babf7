"""Replies of an environment as token ids: behind what was sampled, exactly what the template puts there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.config import SFTConfig
from engine.data.conversations import build_conversations
from engine.data.prompts import RowError
from engine.data.turns import TurnTokens
from tests.data.tokenizer_families import CORES, LOSSLESS, TEMPLATES, data_of, decode, make, rows_of

ENDED = [name for name, (_, end) in TEMPLATES.items() if end]
TALK = [
    {"role": "user", "content": "hello it is"},
    {"role": "assistant", "content": "it is hello"},
    {"role": "user", "content": "the capital of France"},
    {"role": "assistant", "content": "Paris"},
]


def runs(tokenizer: Any, messages: list[dict[str, str]]) -> list[tuple[bool, list[int]]]:
    """(trained, ids) of each run of tokens of a conversation, as supervised fine-tuning sees it."""
    rows = rows_of({"messages": messages})
    [example] = build_conversations(rows, tokenizer, sft=SFTConfig(), data=data_of(), max_length=500).examples
    [sequence] = example.sequences
    edges = np.flatnonzero(np.diff(sequence.mask)) + 1
    parts = np.split(sequence.tokens, edges)
    return [(bool(mask[0]), part.tolist()) for mask, part in zip(np.split(sequence.mask, edges), parts, strict=True)]


@pytest.mark.parametrize("template", ENDED)
@pytest.mark.parametrize("family", CORES)
def test_opening_turns_and_replies_are_the_tokens_of_the_whole_conversation(family: str, template: str) -> None:
    tokenizer = make(family, template, bos=True, eos=TEMPLATES[template][1])
    turns = TurnTokens(tokenizer, data_of())
    (_, opening), (_, said), (_, between), (_, _last), *_ = runs(tokenizer, TALK)
    assert turns.start(TALK[:1]) == opening
    assert turns.reply([TALK[2]], said) == between


@pytest.mark.parametrize("template", ENDED)
@pytest.mark.parametrize("family", LOSSLESS)
def test_an_answer_that_did_not_end_itself_is_ended(family: str, template: str) -> None:
    end = TEMPLATES[template][1]
    tokenizer = make(family, template, eos=end)
    turns = TurnTokens(tokenizer, data_of())
    ended = turns.reply([TALK[2]], [50, tokenizer.convert_tokens_to_ids(end)])
    assert turns.reply([TALK[2]], [50]) == [tokenizer.convert_tokens_to_ids(end), *ended]


@pytest.mark.parametrize("family", LOSSLESS)
def test_a_template_without_an_end_goes_on_with_its_text(family: str) -> None:
    tokenizer = make(family, "no-end")
    reply = TurnTokens(tokenizer, data_of()).reply([TALK[2]], [50])
    assert decode(tokenizer, reply).strip() == "User: the capital of France\nAssistant:"


def test_several_messages_and_tools_go_through_the_template() -> None:
    template = "{% if tools %}{{ tools[0].name }}\n{% endif %}" + TEMPLATES["chatml"][0]
    tokenizer = make("byte-level", template, eos="<|im_end|>")
    turns = TurnTokens(tokenizer, data_of(), tools=[{"name": "calculate"}])
    assert decode(tokenizer, turns.start(TALK[:1])).startswith("calculate\n<|im_start|>user")
    two = [{"role": "tool", "content": "12"}, {"role": "user", "content": "and?"}]
    said = decode(tokenizer, turns.reply(two, [tokenizer.eos_token_id]))
    assert said == "\n<|im_start|>tool\n12<|im_end|>\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_that_drops_earlier_reasoning_does_not_touch_what_was_sampled() -> None:
    body = "{{ m.content if loop.last else m.content.split('</think>')[-1] }}"
    template = TEMPLATES["chatml"][0].replace("{{ m.content }}", body)
    tokenizer = make("byte-level", template, eos="<|im_end|>")
    reply = TurnTokens(tokenizer, data_of()).reply([TALK[2]], [tokenizer.eos_token_id])
    plain = TurnTokens(make("byte-level", "chatml", eos="<|im_end|>"), data_of())
    assert reply == plain.reply([TALK[2]], [tokenizer.eos_token_id])


def test_a_role_that_the_template_refuses_is_told() -> None:
    template = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}" + (
        TEMPLATES["chatml"][0].removeprefix("{% for m in messages %}")
    )
    turns = TurnTokens(make("byte-level", template), data_of())
    with pytest.raises(RowError, match="no tools"):
        turns.reply([{"role": "tool", "content": "1"}], [7])


@pytest.mark.parametrize("family", LOSSLESS)
def test_without_a_template_texts_are_joined_as_they_are(family: str) -> None:
    tokenizer = make(family)
    turns = TurnTokens(tokenizer, data_of())
    assert turns.start(TALK[:1]) == tokenizer("hello it is")["input_ids"]
    assert decode(tokenizer, turns.reply([{"role": "tool", "content": "12 a"}], [7])).strip() == "12 a"
