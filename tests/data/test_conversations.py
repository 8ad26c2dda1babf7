"""Conversations as token sequences: what is trained, over tokenizers and chat templates of the usual kinds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, normalizers, processors
from transformers import ByT5Tokenizer

from engine.config import SFTConfig, UserError
from engine.data.conversations import build_conversations
from engine.data.examples import Example, PreparedExamples
from engine.data.prompts import build_prompts
from tests.data.tokenizer_families import (
    CORES,
    LOSSLESS,
    TEMPLATES,
    data_of,
    decode,
    make,
    rows_of,
    trained_texts,
)

ANSWERS = ["Paris it is", " yes", "no ", "a few lines\n\nand more", "123", "\nthe é"]
ENDED = [name for name, (_, end) in TEMPLATES.items() if end]
TALK = [
    {"role": "system", "content": "think"},
    {"role": "user", "content": "what is it?"},
    {"role": "assistant", "content": "it is hello"},
    {"role": "user", "content": "and the capital?"},
    {"role": "assistant", "content": "Paris"},
]


def build(tokenizer: Any, *rows: dict[str, Any], limit: int = 500, sft: Any = None, **data: Any) -> PreparedExamples:
    return build_conversations(
        rows_of(*rows), tokenizer, data=data_of(**data), sft=SFTConfig(**(sft or {})), max_length=limit
    )


def only(prepared: PreparedExamples) -> Example:
    assert len(prepared.examples) == 1
    assert len(prepared.examples[0].sequences) == 1
    return prepared.examples[0]


def one(tokenizer: Any, row: dict[str, Any], **settings: Any) -> Example:
    return only(build(tokenizer, row, **settings))


def generated_from(tokenizer: Any, prompt: Any, **data: Any) -> tuple[int, ...]:
    """What the model is given in the stages that generate."""
    prepared = build_prompts(rows_of({"prompt": prompt}), tokenizer, data=data_of(**data), max_prompt_tokens=500)
    return prepared.prompts[0].token_ids


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("family", CORES)
@pytest.mark.parametrize("prompt", ["what is it?", "the capital is "])
def test_plain_text_trains_the_answer_and_one_end(family: str, bos: bool, prompt: str) -> None:
    tokenizer = make(family, bos=bos)
    given = generated_from(tokenizer, prompt)
    for answer in ANSWERS:
        example = one(tokenizer, {"prompt": prompt, "completion": answer})
        (sequence,) = example.sequences
        assert tuple(sequence.tokens[: len(given)]) == given == example.prompt.token_ids
        assert not sequence.mask[: len(given)].any()
        assert sequence.mask[len(given) :].all()
        assert list(sequence.tokens).count(tokenizer.eos_token_id) == 1
        assert sequence.tokens[-1] == tokenizer.eos_token_id
        assert (sequence.tokens.dtype, sequence.mask.dtype) == (np.int32, bool)
        if family in LOSSLESS:
            assert trained_texts(tokenizer, sequence) == [answer + "</s>"]
            assert decode(tokenizer, sequence.tokens) == decode(tokenizer, given) + answer + "</s>"
            assert decode(tokenizer, given).endswith(prompt)


@pytest.mark.parametrize("family", CORES)
def test_an_answer_gets_no_mark_of_a_first_word(family: str) -> None:
    tokenizer = make(family)
    (sequence,) = one(tokenizer, {"prompt": "what is it?", "completion": "hello"}).sequences
    first = tokenizer.convert_ids_to_tokens(int(sequence.tokens[sequence.mask][0]))
    assert not first.startswith(("▁", "Ġ"))


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("family", CORES)
def test_a_template_trains_the_answer_through_its_end(family: str, template: str) -> None:
    end = TEMPLATES[template][1] or "</s>"
    tokenizer = make(family, template, bos=True, eos=end)
    given = generated_from(tokenizer, "what is it?")
    for answer in ["Paris it is", "a few lines\n\nand more", "123"]:
        example = one(tokenizer, {"prompt": "what is it?", "completion": answer})
        (sequence,) = example.sequences
        assert tuple(sequence.tokens[: len(given)]) == given == example.prompt.token_ids
        assert not sequence.mask[: len(given)].any()
        assert sequence.mask[len(given)]
        trained = sequence.tokens[sequence.mask]
        assert trained[-1] == tokenizer.convert_tokens_to_ids(end)
        assert list(trained).count(trained[-1]) == 1
        if family in LOSSLESS:
            texts = trained_texts(tokenizer, sequence)
            assert [text.replace(" ", "") for text in texts] == [(answer + end).replace(" ", "")]
            assert texts == [answer + end] or template in ("llama2", "no-end")


@pytest.mark.parametrize("template", ENDED)
@pytest.mark.parametrize("family", CORES)
def test_every_turn_of_the_assistant_is_trained_in_its_context(family: str, template: str) -> None:
    end = TEMPLATES[template][1]
    tokenizer = make(family, template, bos=True, eos=end)
    example = one(tokenizer, {"messages": TALK})
    (sequence,) = example.sequences
    for i in (2, 4):
        given = generated_from(tokenizer, TALK[:i])
        assert tuple(sequence.tokens[: len(given)]) == given
        assert sequence.mask[len(given)]
        assert not sequence.mask[len(given) - 1]
    assert example.prompt.token_ids == generated_from(tokenizer, TALK[:4])
    assert example.prompt.prompt == TALK[:4]
    if family in LOSSLESS:
        spoken = [text.strip() for text in trained_texts(tokenizer, sequence)]
        space = " " if template == "llama2" else ""
        assert spoken == [f"it is hello{space}{end}", f"Paris{space}{end}"]
        rendered = tokenizer.apply_chat_template(TALK, tokenize=False)
        marks = "always" in family or "prefix" in family or family == "llama2"  # decoded as spaces after special tokens
        assert decode(tokenizer, sequence.tokens) == rendered or marks


def test_what_follows_the_end_token_is_context() -> None:
    tokenizer = make("byte-level", "chatml", eos="<|im_end|>")
    (sequence,) = one(tokenizer, {"prompt": "hello", "completion": "bye"}).sequences
    assert decode(tokenizer, sequence.tokens[-1:]) == "\n"
    assert not sequence.mask[-1]


@pytest.mark.parametrize("family", LOSSLESS)
def test_a_template_without_an_end_gets_the_end_of_sequence_after_the_last_turn(family: str) -> None:
    tokenizer = make(family, "no-end")
    (sequence,) = one(tokenizer, {"messages": TALK}).sequences
    assert trained_texts(tokenizer, sequence) == [" it is hello", " Paris</s>"]
    assert decode(tokenizer, sequence.tokens).lstrip() == (
        "System: think\nUser: what is it?\nAssistant: it is hello\nUser: and the capital?\nAssistant: Paris</s>"
    )


def test_messages_after_the_last_answer_are_left_out() -> None:
    tokenizer = make("byte-level", "chatml", eos="<|im_end|>")
    longer = one(tokenizer, {"messages": [*TALK, {"role": "user", "content": "bye"}]})
    assert np.array_equal(longer.sequences[0].tokens, one(tokenizer, {"messages": TALK}).sequences[0].tokens)


def test_answers_in_the_prompt_are_not_trained() -> None:
    tokenizer = make("byte-level", "chatml", eos="<|im_end|>")
    example = one(tokenizer, {"prompt": TALK[:4], "completion": TALK[4:]})
    assert trained_texts(tokenizer, example.sequences[0]) == ["Paris<|im_end|>"]
    assert example.prompt.token_ids == generated_from(tokenizer, TALK[:4])
    assert example.row == {"prompt": TALK[:4], "completion": TALK[4:]}


def test_a_token_that_swallows_the_space_after_it_does_so_in_every_turn() -> None:
    tokenizer = make("byte-level", "chatml", eos="<|im_end|>")
    core = tokenizer.backend_tokenizer
    core.add_special_tokens([AddedToken("<|im_end|>", rstrip=True, normalized=False)])
    example = one(tokenizer, {"messages": TALK})
    assert example.prompt.token_ids == generated_from(tokenizer, TALK[:4])


def test_the_system_prompt_is_the_one_of_generation() -> None:
    tokenizer = make("byte-level", "chatml", eos="<|im_end|>")
    example = one(tokenizer, {"messages": TALK[1:]}, system_prompt="bad")
    assert example.prompt.token_ids == generated_from(tokenizer, TALK[1:4], system_prompt="bad")
    assert decode(tokenizer, example.sequences[0].tokens).startswith("<|im_start|>system\nbad<|im_end|>")
    assert example.prompt.prompt == TALK[1:4]


def test_a_template_that_is_not_wanted_is_not_used() -> None:
    tokenizer = make("byte-level", "chatml", eos="<|im_end|>")
    (sequence,) = one(tokenizer, {"prompt": "hello", "completion": " bye"}, chat_template="never").sequences
    assert decode(tokenizer, sequence.tokens) == "hello bye<|im_end|>"


def test_an_end_in_the_answer_is_not_doubled() -> None:
    (sequence,) = one(make("byte-level"), {"prompt": "hello", "completion": " bye</s>"}).sequences
    assert decode(make("byte-level"), sequence.tokens) == "hello bye</s>"


def test_a_tokenizer_that_ends_every_text_does_not_end_the_prompt() -> None:
    tokenizer = make("byte-level")
    end = ("</s>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[end])
    (sequence,) = one(tokenizer, {"prompt": "hello", "completion": " bye"}).sequences
    assert decode(tokenizer, sequence.tokens) == "hello bye</s>"
    assert generated_from(tokenizer, "hello</s>")[-1] == tokenizer.eos_token_id


# ---- reasoning and loss_on ----

THOUGHT = {"prompt": "what is it?", "completion": "Paris", "reasoning": "think about it"}


@pytest.mark.parametrize("template", [None, "chatml", "llama3", "zephyr"])
@pytest.mark.parametrize("family", LOSSLESS)
def test_reasoning_is_trained_with_the_answer_or_left_out(family: str, template: str | None) -> None:
    end = TEMPLATES[template][1] if template else "</s>"
    tokenizer = make(family, template, eos=end)
    thought = "<think>\nthink about it\n</think>\n\n"
    both = one(tokenizer, THOUGHT).sequences[0]
    assert trained_texts(tokenizer, both) == [f"{thought}Paris{end}"]
    alone = one(tokenizer, THOUGHT, sft={"loss_on": "answer"}).sequences[0]
    assert trained_texts(tokenizer, alone) == [f"Paris{end}"]
    assert decode(tokenizer, alone.tokens) == decode(tokenizer, both.tokens)


def test_reasoning_with_messages_joins_the_last_turn() -> None:
    tokenizer = make("byte-level", "chatml", eos="<|im_end|>")
    row = {"messages": TALK, "reasoning": "think {completion}"}
    example = one(tokenizer, row, sft={"reasoning_format": "[{reasoning}] {completion}."})
    texts = trained_texts(tokenizer, example.sequences[0])
    assert texts == ["it is hello<|im_end|>", "[think {completion}] Paris.<|im_end|>"]
    example = one(tokenizer, row, sft={"reasoning_format": "[{reasoning}] {completion}.", "loss_on": "answer"})
    assert trained_texts(tokenizer, example.sequences[0]) == ["it is hello<|im_end|>", "Paris.<|im_end|>"]


def test_reasoning_that_a_template_trims_is_still_found() -> None:
    tokenizer = make("byte-level", "llama3", eos="<|eot_id|>")
    sft = {"loss_on": "answer", "reasoning_format": "\n{reasoning} {completion}"}
    (sequence,) = one(tokenizer, THOUGHT, sft=sft).sequences
    assert trained_texts(tokenizer, sequence) == ["Paris<|eot_id|>"]


def test_reasoning_after_the_answer_cannot_be_left_out_by_loss_on_answer() -> None:
    sft = {"loss_on": "answer", "reasoning_format": "{completion} because {reasoning}"}
    with pytest.raises(UserError, match="reasoning_format puts it after the answer"):
        build(make("byte-level"), THOUGHT, sft=sft)


def test_loss_on_all_trains_every_token_but_the_first() -> None:
    tokenizer = make("byte-level", "chatml", eos="<|im_end|>")
    (sequence,) = one(tokenizer, {"messages": TALK}, sft={"loss_on": "all"}).sequences
    assert not sequence.mask[0]
    assert sequence.mask[1:].all()
    assert decode(tokenizer, sequence.tokens) == tokenizer.apply_chat_template(TALK, tokenize=False)


# ---- too long ----

SHORT, LONG = ({"prompt": "hello", "completion": c} for c in (" bye", " bye bye bye bye bye bye bye bye"))


def test_a_row_of_exactly_the_limit_is_whole() -> None:
    tokenizer = make("byte-level")
    length = len(one(tokenizer, LONG).sequences[0].tokens)
    assert len(one(tokenizer, LONG, limit=length).sequences[0].tokens) == length
    with pytest.raises(UserError, match=f"1 of 1 conversations are too long.*\n  file.jsonl:1: {length} tokens"):
        build(tokenizer, LONG, limit=length - 1)


def test_long_rows_are_skipped_and_told() -> None:
    prepared = build(make("byte-level"), LONG, SHORT, limit=8, on_long_row="skip")
    assert [e.row for e in prepared.examples] == [SHORT]
    assert len(prepared.skipped) == 1
    assert prepared.skipped[0].startswith("file.jsonl:1: ")


def test_a_cut_answer_has_no_end() -> None:
    tokenizer = make("byte-level")
    whole = one(tokenizer, LONG).sequences[0]
    example = one(tokenizer, LONG, limit=5, on_long_row="truncate")
    assert list(example.sequences[0].tokens) == list(whole.tokens[:5])
    assert list(example.sequences[0].mask) == list(whole.mask[:5])
    assert example.prompt.token_ids == generated_from(tokenizer, "hello")


def test_a_cut_that_leaves_no_answer_is_a_bad_row() -> None:
    tokenizer = make("byte-level")
    length = len(generated_from(tokenizer, "hello"))
    with pytest.raises(UserError, match=f"conversations: 1 bad(.|\n)*jsonl:1: cut to {length} tokens, nothing is left"):
        build(tokenizer, LONG, limit=length, on_long_row="truncate")


def test_a_prompt_that_was_cut_off_is_not_given_to_generation() -> None:
    tokenizer = make("byte-level", "chatml", eos="<|im_end|>")
    length = len(generated_from(tokenizer, TALK[:4]))
    assert one(tokenizer, {"messages": TALK}, limit=length, on_long_row="truncate").prompt is None
    assert one(tokenizer, {"messages": TALK}, limit=length + 1, on_long_row="truncate").prompt is not None


# ---- bad rows ----

USER = {"role": "user", "content": "hello"}
BAD_ROWS = [
    ({"text": "x"}, "needs a column 'messages', or 'prompt' and 'completion'; its columns: text"),
    ({"prompt": "x", "completion": None}, "a column is empty: 'completion'"),
    ({"prompt": "hello", "completion": "  "}, "column 'completion' is empty"),
    ({"prompt": "hello", "completion": 3}, "column 'completion' must be a list"),
    ({"prompt": 3, "completion": "x"}, "column 'prompt' must be a list"),
    ({"prompt": "hello", "completion": "\ud800"}, "column 'completion' has characters that are not valid Unicode"),
    ({"prompt": "hello", "completion": [USER]}, "the first message must be the assistant's, is the user's"),
    ({"prompt": TALK, "completion": "x"}, "the last message is the assistant's"),
    ({"messages": "hello"}, "column 'messages' must be a list"),
    ({"messages": []}, "column 'messages' is empty"),
    ({"messages": [USER]}, "none is the assistant's"),
    ({"messages": TALK[2:]}, "the first is the assistant's"),
    ({"messages": [{"role": "user"}]}, "message 0 must be an object with role and content"),
    ({"messages": [{"role": "human", "content": "x"}]}, "message 0 has role 'human'; use one of system, user"),
    ({"messages": [USER, {"role": "assistant", "content": ["x"]}]}, "content of message 1 must be text"),
    ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "content of message 1 is empty"),
    ({"prompt": "hello", "completion": "bye<|im_end|>"}, "an answer ends with '<|im_end|>', which the chat template"),
    ({"prompt": "hello", "completion": "x", "reasoning": 3}, "column 'reasoning' must be text"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS, ids=[reason[:40] for _, reason in BAD_ROWS])
def test_a_bad_row_is_told_or_skipped(row: dict[str, Any], reason: str) -> None:
    tokenizer = make("byte-level", "chatml", eos="<|im_end|>")
    with pytest.raises(UserError) as caught:
        build(tokenizer, SHORT, row)
    assert "conversations: 1 bad of 2 rows" in str(caught.value)
    assert "file.jsonl:2: " in str(caught.value)
    assert reason in str(caught.value)
    prepared = build(tokenizer, SHORT, row, on_bad_row="skip")
    assert [e.row for e in prepared.examples] == [SHORT]
    assert reason in prepared.skipped[0]


def test_no_usable_row_is_an_error_with_the_reasons() -> None:
    with pytest.raises(
        UserError, match=r"conversations: no example is left: all 1 rows were skipped\n  file.jsonl:1: "
    ):
        build(make("byte-level"), {"text": "x"}, on_bad_row="skip")


def test_a_template_that_rewrites_history_cannot_train_turn_by_turn() -> None:
    forgetful = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content if loop.last or m.role != 'assistant' else 'bye' }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = make("byte-level", forgetful, eos="<|im_end|>")
    with pytest.raises(UserError, match=r"file.jsonl:1: the chat template renders message 4 so that"):
        build(tokenizer, {"messages": TALK})
    assert one(tokenizer, {"messages": TALK[:3]}).sequences[0].mask.any()
    example = one(tokenizer, {"prompt": TALK[:4], "completion": "Paris"})
    assert trained_texts(tokenizer, example.sequences[0]) == ["Paris<|im_end|>"]


def test_a_generation_prompt_that_does_not_stand_before_answers_is_told() -> None:
    thinking = TEMPLATES["chatml"][0].replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    with pytest.raises(UserError, match=r"file.jsonl:1: the chat template renders message 1 so that"):
        build(make("byte-level", thinking, eos="<|im_end|>"), SHORT)


def test_a_template_that_gives_no_context_is_refused() -> None:
    bare = "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}</s>{% endif %}{% endfor %}"
    with pytest.raises(UserError, match=r"file.jsonl:1: the prompt gives no tokens"):
        build(make("byte-level", bare), SHORT)


def test_an_answer_that_gives_no_tokens_is_a_bad_row() -> None:
    tokenizer = make("byte-level")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u00ad", "")
    with pytest.raises(UserError, match=r"file.jsonl:1: an answer gives no tokens"):
        build(tokenizer, {"prompt": "hello", "completion": "\u00ad"})


def test_a_template_without_an_end_may_trim_answers() -> None:
    trimming = TEMPLATES["no-end"][0].replace("{{ m.content }}", "{{ m.content | trim }}")
    tokenizer = make("byte-level", trimming)
    (sequence,) = one(tokenizer, {"prompt": "hello", "completion": "  bye  "}).sequences
    assert trained_texts(tokenizer, sequence) == [" bye</s>"]


def test_a_special_token_that_the_answer_brings_is_not_its_end() -> None:
    tokenizer = make("byte-level", "no-end")
    (sequence,) = one(tokenizer, {"prompt": "hello", "completion": "bye<|im_end|>"}).sequences
    assert trained_texts(tokenizer, sequence) == [" bye<|im_end|></s>"]


def test_a_template_that_changes_answers_needs_an_end_token() -> None:
    shouting = TEMPLATES["no-end"][0].replace("{{ m.content }}", "{{ m.content | upper }}")
    with pytest.raises(UserError, match="the chat template changes the text of an answer, and puts no special token"):
        build(make("byte-level", shouting), SHORT)


def test_messages_without_a_template_are_refused() -> None:
    with pytest.raises(UserError, match="jsonl:1: the prompt is a list of messages, which needs a chat template"):
        build(make("byte-level"), {"messages": TALK})
    with pytest.raises(UserError, match="jsonl:1: the answer is a list of messages, which needs a chat template"):
        build(make("byte-level"), {"prompt": "hello", "completion": TALK[4:]})


def test_an_end_token_is_needed_where_the_template_has_none() -> None:
    tokenizer = make("byte-level", "no-end")
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        build(tokenizer, SHORT)
    with pytest.raises(UserError, match="no end-of-sequence token"):
        build(tokenizer, SHORT, chat_template="never")


def test_a_tokenizer_that_is_not_fast_is_refused() -> None:
    with pytest.raises(UserError, match="a ByT5Tokenizer, which is not a fast one"):
        build(ByT5Tokenizer(), SHORT)
