"""Prompts and answers as token ids with masks. Pieces of text are tokenised one by one and their ids concatenated.

    context | answer | context | answer <eos>
    masked    trained  masked    trained

The ids of a context are those that generation starts from, so no token ever spans the border to an answer: the first
token of an answer is always trained, and nothing of the context is. (Tokenising the joined text instead would let a
prompt's last space, say, merge into the first word of the answer.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.config import DataConfig, UserError
from engine.data.examples import Example, PreparedExamples, TokenSequence
from engine.data.prompts import Prompt, RowError, apply_template, as_messages, tokenise_prompt, uses_template
from engine.data.sources import ROLES, Rows, bad_rows_error

ANCHORS = ("\n", "|", "=", "?", "a", "1")
"""Texts behind which a later piece is tokenised where a tokenizer marks the start of every text as a word's."""


class TooLongError(Exception):
    """This row is over the token limit; the message says by how much."""


@dataclass(frozen=True)
class Piece:
    """A part of a text that is trained as a whole or not at all."""

    text: str
    trained: bool


class Encoder:
    """Encodes rows with one tokenizer, its chat template and one limit."""

    def __init__(self, tokenizer: Any, data: DataConfig, max_length: int) -> None:
        """`max_length` in tokens bounds each sequence.

        Raises:
            UserError: a chat template is asked for and there is none, or the tokenizer has no end-of-sequence token.
        """
        if tokenizer.eos_token_id is None:
            raise UserError("model.path: the tokenizer has no end-of-sequence token, so no answer could end; set one")
        self.tokenizer = tokenizer
        self.data = data
        self.max_length = max_length
        self.templated = uses_template(tokenizer, data)
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special = tuple({*tokenizer.all_special_tokens, *added})
        first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])[:1]
        self._marks_starts = bool(first) and first[0].startswith("▁")

    def prompt(self, context: str | list[dict[str, Any]], row: dict[str, Any]) -> Prompt:
        """The context alone, as generation sees it."""
        return Prompt(
            tuple(tokenise_prompt(context, self.tokenizer, self.templated, self.data.system_prompt)), context, row
        )

    def answer(
        self,
        context: str | list[dict[str, Any]],
        answer: str | list[dict[str, Any]],
        *,
        skip: int = 0,
        all_tokens: bool = False,
    ) -> TokenSequence:
        """A context and what answers it: the assistant's tokens are trained.

        Args:
            context: text, or messages before the answer.
            answer: text, or messages of which the assistant's are trained.
            skip: characters at the start of the last answer that are not trained.
            all_tokens: train every token but the first.

        Raises:
            RowError: the answer is empty, or cannot be told from its context.
            TooLongError: there are more than `max_length` tokens, and rows are not to be cut.
        """
        if self.templated:
            before = as_messages(context)
            after = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
            check_messages(after, "the answer")
            pieces, ends = self._rendered([*before, *after], len(before), skip)
            ids, mask = self._encode(pieces, None)
        else:
            if not isinstance(context, str) or not isinstance(answer, str):
                raise RowError(
                    "messages need a chat template, and none is used; give text, or data.chat_template: auto"
                )
            if not answer.strip():
                raise RowError("the answer is empty")
            prompt = tokenise_prompt(context, self.tokenizer, False, None)
            pieces, ends = [Piece(answer[:skip], False), Piece(answer[skip:], True)], False
            ids, mask = self._encode(pieces, prompt)
        if not ends:
            ids, mask = [*ids, self.tokenizer.eos_token_id], [*mask, True]
        return self._limited(ids, [True] * len(mask) if all_tokens else mask)

    def steps(self, prompt: Prompt, steps: Sequence[str]) -> TokenSequence:
        """A prompt and reasoning steps; the mask is on each step's last token.

        Raises:
            TooLongError: there are more than `max_length` tokens, and rows are not to be cut.
        """
        ids, mask = list(prompt.token_ids), [False] * len(prompt.token_ids)
        for step in steps:
            own = self._ids(step, later=True)
            ids += own
            mask += [False] * (len(own) - 1) + [True]
        return self._limited(ids, mask)

    def _rendered(self, messages: list[dict[str, Any]], first: int, skip: int) -> tuple[list[Piece], bool]:
        """Pieces of a conversation whose assistant turns from `first` on are trained; whether the last ends itself."""
        turns = [i for i in range(first, len(messages)) if messages[i]["role"] == "assistant"]
        if not turns:
            raise RowError("there is no assistant message to train on")
        pieces: list[Piece] = []
        done, ends = "", False
        for i in turns:
            content = messages[i]["content"]
            if not content.strip():
                raise RowError("the answer is empty" if len(turns) == 1 else f"message {i} is empty")
            before = self._render(messages[:i], prompt=True)
            after = self._render(messages[: i + 1], prompt=False)
            if not after.startswith(before) or not before.startswith(done):
                raise RowError(
                    "the chat template rewrites earlier text when a turn is added, so turns cannot be told apart; "
                    "give only the last turn as the answer, or another template"
                )
            body, ends = self._body(after[len(before) :], content)
            pieces.append(Piece(before[len(done) :], False))
            hidden = skip if i == turns[-1] else 0
            if hidden and body[:hidden] != content[:hidden]:
                raise RowError("the chat template changes the reasoning, so the answer cannot be told from it")
            pieces += [Piece(body[:hidden], False), Piece(body[hidden:], True)]
            done = before + body
        return pieces, ends

    def _render(self, messages: list[dict[str, Any]], *, prompt: bool) -> str:
        """Messages as the chat template writes them; with `prompt`, up to where the assistant's answer begins."""
        system = self.data.system_prompt
        return apply_template(messages, self.tokenizer, system, tokenize=False, add_generation_prompt=prompt)

    def _body(self, remainder: str, content: str) -> tuple[str, bool]:
        """What is trained of a rendered turn: its content through the token that ends it, and whether there is one."""
        body = remainder.rstrip()
        if body.endswith(self._special):
            return body, True
        return (content, False) if remainder.startswith(content) else (body, False)

    def _encode(self, pieces: Sequence[Piece], prompt: list[int] | None) -> tuple[list[int], list[bool]]:
        ids = list(prompt or [])
        mask = [False] * len(ids)
        for piece in pieces:
            if piece.text:
                own = self._ids(piece.text, later=bool(ids))
                ids += own
                mask += [piece.trained] * len(own)
        return ids, mask

    def _ids(self, text: str, *, later: bool) -> list[int]:
        """Ids of a piece of text; one that is not the first gets no mark of a text's start."""
        if not (later and self._marks_starts):
            return self._plain_ids(text)
        for anchor in ANCHORS:
            head, joined = self._plain_ids(anchor), self._plain_ids(anchor + text)
            if joined[: len(head)] == head:
                return joined[len(head) :]
        raise RowError("the tokenizer merges the answer's first characters into any text before it")

    def _plain_ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _limited(self, ids: list[int], mask: list[bool]) -> TokenSequence:
        if len(ids) > self.max_length:
            if self.data.on_long_row != "truncate":
                raise TooLongError(f"has {len(ids)} tokens, the limit is {self.max_length}")
            ids, mask = ids[: self.max_length], mask[: self.max_length]
        mask[0] = False
        if not any(mask):
            raise RowError(f"no token of the answer is left within {self.max_length} tokens")
        return TokenSequence(np.array(ids, np.int32), np.array(mask))


def check_messages(messages: Any, what: str) -> None:
    """Raises RowError unless this is a list of messages with a known role and text."""
    if not isinstance(messages, list) or not messages:
        raise RowError(f"{what} must be text or a list of messages, and not empty")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str) or "role" not in message:
            raise RowError(f"{what}: message {i} must be an object with role and content, which is text")
        if message["role"] not in ROLES:
            raise RowError(f"{what}: message {i} has role {message['role']!r}; use one of {', '.join(ROLES)}")


def text_column(row: dict[str, Any], name: str) -> str:
    """A column that must hold text; raises RowError."""
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"column {name!r} must be text, and not empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(f"column {name!r} has characters that are not valid Unicode") from None
    return value


def context_column(row: dict[str, Any]) -> str | list[dict[str, Any]]:
    """The column `prompt`: text, or messages that end with the one to be answered; raises RowError."""
    prompt = row.get("prompt")
    if not isinstance(prompt, list):
        return text_column(row, "prompt")
    check_messages(prompt, "column 'prompt'")
    if prompt[-1]["role"] == "assistant":
        raise RowError("column 'prompt': the last message is the assistant's; end with the one to be answered")
    return prompt


def answer_column(row: dict[str, Any], name: str) -> str | list[dict[str, Any]]:
    """A column with an answer: text or messages; raises RowError."""
    value = row.get(name)
    if not isinstance(value, list):
        return text_column(row, name)
    check_messages(value, f"column {name!r}")
    return value


def build_examples(
    rows: Rows, data: DataConfig, make: Callable[[dict[str, Any]], Sequence[Example]]
) -> PreparedExamples:
    """The examples that `make` gives for each row; bad and over-long rows are reported or skipped.

    Raises:
        UserError: a row is bad or too long and that is not to be skipped, or none is left.
    """
    examples: list[Example] = []
    bad: list[str] = []
    long: list[str] = []
    skipped = list(rows.skipped)
    for place, row in zip(rows.places, rows.rows, strict=True):
        try:
            examples += make(row)
        except (RowError, TooLongError) as error:
            problems = long if isinstance(error, TooLongError) else bad
            problems.append(f"{place}: {error}")
            skipped.append(problems[-1])
    if bad and data.on_bad_row == "fail":
        raise bad_rows_error("rows", bad, len(rows.rows))
    if long and data.on_long_row == "fail":
        shown = "".join(f"\n  {reason}" for reason in long[:10])
        raise UserError(
            f"{len(long)} of {len(rows.rows)} rows are too long; raise training.max_length, or set data.on_long_row: "
            f"skip or truncate{shown}"
        )
    if not examples:
        shown = "".join(f"\n  {reason}" for reason in skipped[:10])
        raise UserError(f"no row is left: all {len(rows.rows)} were skipped{shown}")
    return PreparedExamples(examples, skipped)
