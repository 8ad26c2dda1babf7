"""Rows for supervised fine-tuning: `messages`, or `prompt` and `completion`, the latter with `reasoning` before it."""

from __future__ import annotations

from typing import Any

from engine.config import DataConfig, SFTConfig
from engine.data.encoder import Encoder, answer_column, build_examples, check_messages, context_column, text_column
from engine.data.examples import Example, PreparedExamples
from engine.data.prompts import RowError, as_messages
from engine.data.sources import Rows


def build_conversations(
    rows: Rows, tokenizer: Any, *, data: DataConfig, sft: SFTConfig, max_length: int
) -> PreparedExamples:
    """One sequence per row, its trained tokens as `sft.loss_on` says, ended by one end-of-sequence token.

    Of `messages` every assistant turn is trained, of `prompt` and `completion` the completion alone.

    Raises:
        UserError: a row is bad or too long and that is not to be skipped, or none is left.
    """
    encoder = Encoder(tokenizer, data, max_length)

    def make(row: dict[str, Any]) -> list[Example]:
        if row.get("messages") is not None:
            context, answer, skip = _from_messages(row, sft)
        else:
            context, answer, skip = _from_columns(row, sft)
        if sft.loss_on != "answer":
            skip = 0
        sequence = encoder.answer(context, answer, skip=skip, all_tokens=sft.loss_on == "all")
        prompt = encoder.prompt(_before_last_answer(context, answer), row)
        return [Example((sequence,), {}, row, prompt)]

    return build_examples(rows, data, make)


def _from_columns(row: dict[str, Any], sft: SFTConfig) -> tuple[Any, Any, int]:
    """(context, answer, characters of reasoning at its start)."""
    if row.get("completion") is None:
        present = ", ".join(row) or "none"
        raise RowError(f"has neither 'messages' nor 'prompt' and 'completion'; its columns: {present}")
    context, answer = context_column(row), answer_column(row, "completion")
    if row.get("reasoning") is None:
        return context, answer, 0
    if not isinstance(answer, str):
        raise RowError("column 'reasoning' goes with a completion that is text")
    whole, skip = _with_reasoning(row, answer, sft)
    return context, whole, skip


def _from_messages(row: dict[str, Any], sft: SFTConfig) -> tuple[Any, Any, int]:
    messages = row["messages"]
    check_messages(messages, "column 'messages'")
    first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), None)
    if first is None:
        raise RowError("column 'messages' has no assistant message to train on")
    if first == 0:
        raise RowError("column 'messages' begins with the assistant; there is nothing that it answers")
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    turns, skip = list(messages[first : last + 1]), 0
    if row.get("reasoning") is not None:
        whole, skip = _with_reasoning(row, turns[-1]["content"], sft)
        turns[-1] = {**turns[-1], "content": whole}
    return messages[:first], turns, skip


def _with_reasoning(row: dict[str, Any], answer: str, sft: SFTConfig) -> tuple[str, int]:
    """The completion with the reasoning in it, and where the answer begins."""
    reasoning = text_column(row, "reasoning")
    before, after = sft.reasoning_format.split("{completion}")
    head, tail = (part.replace("{reasoning}", reasoning) for part in (before, after))
    return head + answer + tail, len(head)


def _before_last_answer(context: Any, answer: Any) -> Any:
    """What the last answer was given to."""
    if isinstance(answer, str) or len(answer) == 1:
        return context
    before = as_messages(context)
    last = max(i for i, message in enumerate(answer) if message["role"] == "assistant")
    return [*before, *answer[:last]]
