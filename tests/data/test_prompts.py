"""Prompts as token ids."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from engine.config import DataConfig, UserError
from engine.data.prompts import PreparedPrompts, build_prompts
from engine.data.sources import Rows


def build(tokenizer: Any, *prompts: Any, limit: int = 100, **data: Any) -> PreparedPrompts:
    columns = [{"prompt": p, "answer": i} for i, p in enumerate(prompts)]
    places = [f"file.jsonl:{10 * i}" for i in range(1, len(prompts) + 1)]
    rows = Rows(columns, places, ["file.jsonl:9: not valid JSON"])
    return build_prompts(rows, tokenizer, data=DataConfig(train="x", **data), max_prompt_tokens=limit)


def words(tokenizer: PreTrainedTokenizerFast, prepared: PreparedPrompts) -> list[str]:
    return [" ".join(tokenizer.convert_ids_to_tokens(list(p.token_ids))) for p in prepared.prompts]


def test_plain_text_without_a_template_gets_the_special_tokens_once(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    assert words(plain_tokenizer, build(plain_tokenizer, "one two")) == ["<s> one two"]


def test_plain_text_becomes_a_user_message_when_there_is_a_template(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    assert words(chat_tokenizer, build(chat_tokenizer, "one two")) == ["<user> one two </s> <assistant>"]


def test_never_leaves_the_template_out(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    assert words(chat_tokenizer, build(chat_tokenizer, "one", chat_template="never")) == ["<s> one"]


def test_messages_are_rendered_as_they_are(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    expected = "<user> one </s> <assistant> two </s> <user> three </s> <assistant>"
    assert words(chat_tokenizer, build(chat_tokenizer, messages)) == [expected]


def test_the_system_prompt_goes_before_prompts_that_bring_none(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    own = [{"role": "system", "content": "two"}, {"role": "user", "content": "one"}]
    prepared = build(chat_tokenizer, "one", own, system_prompt="be brief")
    assert words(chat_tokenizer, prepared) == [
        "<system> be brief </s> <user> one </s> <assistant>",
        "<system> two </s> <user> one </s> <assistant>",
    ]
    assert own == [{"role": "system", "content": "two"}, {"role": "user", "content": "one"}]


def test_a_prompt_keeps_its_row(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = build(chat_tokenizer, "one", "two").prompts[1]
    assert (prompt.prompt, prompt.row) == ("two", {"prompt": "two", "answer": 1})


def test_always_without_a_template_is_refused(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"data.chat_template: is always, but the tokenizer has no chat template"):
        build(plain_tokenizer, "one", chat_template="always")


def test_messages_without_a_template_are_refused(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="jsonl:20: the prompt is a list of messages, which needs a chat template"):
        build(plain_tokenizer, "one", [{"role": "user", "content": "one"}])


def test_a_system_prompt_that_would_be_ignored_is_refused(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"data.system_prompt: needs a chat template, but the tokenizer has no"):
        build(plain_tokenizer, "one", system_prompt="be brief")


@pytest.mark.parametrize("limit", [3, 4])
def test_long_prompts_fail_with_their_places_and_lengths(plain_tokenizer: PreTrainedTokenizerFast, limit: int) -> None:
    with pytest.raises(
        UserError, match=f"1 of 2 prompts are too long(.|\n)*jsonl:20: .* 5 tokens, the limit is {limit}"
    ):
        build(plain_tokenizer, "one", "one two three four", limit=limit)


def test_a_prompt_of_exactly_the_limit_is_not_too_long(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(build(plain_tokenizer, "one two three four", limit=5).prompts[0].token_ids) == 5


def test_long_prompts_are_skipped_and_told(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    prepared = build(plain_tokenizer, "one two three", "one", limit=2, on_long_row="skip")
    assert [p.prompt for p in prepared.prompts] == ["one"]
    assert prepared.skipped == [
        "file.jsonl:9: not valid JSON",
        "file.jsonl:10: the prompt has 4 tokens, the limit is 2",
    ]


def test_truncation_keeps_the_end_and_the_prompt_becomes_what_the_model_sees(
    plain_tokenizer: PreTrainedTokenizerFast,
) -> None:
    prepared = build(plain_tokenizer, "one two three four", "one", limit=2, on_long_row="truncate")
    assert words(plain_tokenizer, prepared) == ["three four", "<s> one"]
    assert [p.prompt for p in prepared.prompts] == ["three four", "one"]
    assert prepared.prompts[0].row["prompt"] == "one two three four"


def test_truncation_shows_special_tokens_that_the_model_sees(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    prepared = build(plain_tokenizer, "one two </s> three", limit=2, on_long_row="truncate")
    assert prepared.prompts[0].prompt == "</s> three"


def test_truncation_never_cuts_a_chat_template(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    fits = build(chat_tokenizer, "one", limit=4, on_long_row="truncate")
    assert words(chat_tokenizer, fits) == ["<user> one </s> <assistant>"]
    with pytest.raises(UserError, match=r"1 of 2 .* would cut into the chat template; shorten them(.|\n)*jsonl:20: "):
        build(chat_tokenizer, "one", "one two", limit=4, on_long_row="truncate")
    cut = build(chat_tokenizer, "one two", limit=2, on_long_row="truncate", chat_template="never")
    assert words(chat_tokenizer, cut) == ["one two"]


def test_only_what_helps_against_long_prompts_is_proposed(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"on_long_row: skip\n"):
        build(chat_tokenizer, "one two", limit=2)
    with pytest.raises(UserError, match=r"on_long_row: skip or truncate\n"):
        build(chat_tokenizer, "one two", limit=2, chat_template="never")


def test_nothing_left_is_an_error_with_the_reasons(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"no prompt is left: all 1 rows were skipped(.|\n)*4 tokens, the limit is 2"):
        build(plain_tokenizer, "one two three", limit=2, on_long_row="skip")


LATE_SYSTEM = [{"role": "user", "content": "one"}, {"role": "system", "content": "two"}]


def test_a_row_that_the_template_refuses_is_named(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(
        UserError,
        match=r"^prompts: 1 bad of 2 (.|\n)*jsonl:20: the chat template failed: .* comes first",
    ):
        build(chat_tokenizer, "one", LATE_SYSTEM)


def test_a_row_that_the_template_refuses_can_be_skipped(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    prepared = build(chat_tokenizer, LATE_SYSTEM, "one", on_bad_row="skip")
    assert [p.prompt for p in prepared.prompts] == ["one"]
    assert prepared.skipped[-1].startswith("file.jsonl:10: the chat template failed: ")


def test_a_malformed_template_is_told_as_such(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    chat_tokenizer.chat_template = "\n{% for m in %}"
    with pytest.raises(UserError, match=r"chat template is malformed \(line 2\)"):
        build(chat_tokenizer, "one", on_bad_row="skip")
