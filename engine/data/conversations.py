"""Conversations as token ids, with a mask over what the assistant says.

The text is cut into pieces, each is tokenised on its own, and the ids are put one after the other:

    context          | answer             | context                          | answer           | end
    <user> hi <bot>  | hello <end-token>  | newline <user> and now? <bot>    | good <end-token> | newline
    not trained      | trained            | not trained                      | trained          | not trained

So the ids before an answer are those that generation sees (`engine.data.prompts`), and the answer's first token is
always trained, however the tokenizer would have merged the two in one go.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from engine.config import DataConfig, SFTConfig, UserError
from engine.data.examples import (
    Example,
    PreparedExamples,
    TokenSequence,
    collect_examples,
    read_column,
    read_messages,
    read_text,
)
from engine.data.prompts import Prompt, RowError, apply_template, as_messages, tokenise_prompt, uses_template
from engine.data.sources import Rows

Messages = list[dict[str, Any]]


def build_conversations(
    rows: Rows, tokenizer: Any, *, data: DataConfig, sft: SFTConfig, max_length: int
) -> PreparedExamples:
    """One sequence per row: `messages`, or `prompt` and `completion`, with an optional `reasoning`.

    Of `messages` every turn of the assistant is trained, and what follows the last one is left out; of `prompt` and
    `completion` (each text or messages) those of the completion. `reasoning` joins the last turn, by
    `sft.reasoning_format`. `Example.prompt` is the context before the last turn of the assistant.

    Args:
        tokenizer: a fast transformers tokenizer.
        max_length: longest sequence, in tokens; `data.on_long_row` "truncate" cuts at the end, end token included.

    Raises:
        UserError: as `collect_examples`, `uses_template` and `AnswerTokenizer`; `sft.loss_on` is "answer", and
            `sft.reasoning_format` puts the reasoning after it.
    """
    answers = AnswerTokenizer(tokenizer, data)
    before, _, after = sft.reasoning_format.partition("{completion}")
    if sft.loss_on == "answer" and "{reasoning}" in after:
        raise UserError(
            "sft.loss_on: answer trains what follows the reasoning, but sft.reasoning_format puts it after the answer"
        )

    def build(row: dict[str, Any]) -> list[Example]:
        prompt, completion = _read_conversation(row)
        thought = ""
        if row.get("reasoning") is not None:
            reasoning = read_text(row["reasoning"], "column 'reasoning'")
            thought = before.replace("{reasoning}", reasoning)
            completion = _join_last(completion, thought, after.replace("{reasoning}", reasoning))
        answered = answers.encode(prompt, completion, untrained=thought if sft.loss_on == "answer" else "")
        sequence = answered.sequence
        if sft.loss_on == "all":
            sequence = TokenSequence(sequence.tokens, np.arange(len(sequence.tokens)) > 0)
        return [Example((sequence,), {}, row, answered.last_prompt(row))]

    return collect_examples(rows, build, what="conversations", data=data, max_length=max_length)


def _read_conversation(row: dict[str, Any]) -> tuple[str | Messages, str | Messages]:
    """The part that is context alone, and the part whose assistant turns are trained."""
    if row.get("messages") is None:
        if not {"prompt", "completion"} <= set(row):
            raise RowError(f"needs a column 'messages', or 'prompt' and 'completion'; its columns: {', '.join(row)}")
        return read_prompt(row), read_answer(read_column(row, "completion"), "column 'completion'")
    messages = read_messages(row["messages"], "column 'messages'")
    first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), None)
    if first is None:
        raise RowError("column 'messages': none is the assistant's, so there is nothing to learn")
    if first == 0:
        raise RowError("column 'messages': the first is the assistant's; put what it answers before it")
    return messages[:first], messages[first:]


def _join_last(completion: str | Messages, before: str, after: str) -> str | Messages:
    if isinstance(completion, str):
        return before + completion + after
    last = max(i for i, message in enumerate(completion) if message["role"] == "assistant")
    joined = completion[last] | {"content": before + completion[last]["content"] + after}
    return [*completion[:last], joined, *completion[last + 1 :]]


def read_prompt(row: dict[str, Any]) -> str | Messages:
    """The column `prompt`: text, or messages that do not end with the assistant's.

    Raises:
        RowError: it is something else.
    """
    prompt = read_column(row, "prompt")
    if isinstance(prompt, str):
        return read_text(prompt, "column 'prompt'")
    messages = read_messages(prompt, "column 'prompt'")
    if messages[-1]["role"] == "assistant":
        raise RowError("column 'prompt': the last message is the assistant's; end with the one to be answered")
    return messages


def read_answer(value: Any, name: str) -> str | Messages:
    """Text, or messages of which the first is the assistant's; `name` says in messages what it is.

    Raises:
        RowError: it is something else.
    """
    if isinstance(value, str):
        return read_text(value, name)
    messages = read_messages(value, name)
    if messages[0]["role"] != "assistant":
        raise RowError(f"{name}: the first message must be the assistant's, is the {messages[0]['role']}'s")
    return messages


@dataclass(frozen=True)
class Answered:
    """A prompt and what follows it."""

    sequence: TokenSequence
    """All of it; the mask is on the assistant's turns after the prompt."""
    starts: tuple[int, ...]
    """Position of the first token of each of these turns."""
    contexts: tuple[str | Messages, ...]
    """What stands before each of them, as text or messages."""

    def first_prompt(self, row: dict[str, Any]) -> Prompt:
        """What is before the first answer."""
        return self._prompt(0, row)

    def last_prompt(self, row: dict[str, Any]) -> Prompt:
        """What is before the last answer; earlier answers keep their ids of the sequence."""
        return self._prompt(-1, row)

    def _prompt(self, turn: int, row: dict[str, Any]) -> Prompt:
        return Prompt(tuple(self.sequence.tokens[: self.starts[turn]].tolist()), self.contexts[turn], row)


class AnswerTokenizer:
    """Prompts and their answers as token ids, piece by piece."""

    def __init__(self, tokenizer: Any, data: DataConfig) -> None:
        """`data` says whether the chat template is used, and with which system prompt.

        Raises:
            UserError: as `uses_template` and `PieceTokenizer`; there is no template and no end-of-sequence token.
        """
        self.templated = uses_template(tokenizer, data)
        """Whether prompts go through the chat template; without one, there are no messages."""
        self.pieces = PieceTokenizer(tokenizer)
        self._tokenizer = tokenizer
        self._system_prompt = data.system_prompt
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special_tokens = tuple(dict.fromkeys([*tokenizer.all_special_tokens, *added]))
        if not self.templated:
            self._end_id()

    def prompt(self, prompt: str | Messages) -> list[int]:
        """The ids of `build_prompts`; errors are those of `tokenise_prompt`."""
        return tokenise_prompt(prompt, self._tokenizer, self.templated, self._system_prompt)

    def encode(self, prompt: str | Messages, completion: str | Messages, *, untrained: str = "") -> Answered:
        """A prompt and what follows it, the end token of each answer trained once.

        Messages after the last one of the assistant are left out. An answer to which the chat template adds no special
        token ends without one, but for the last, which gets the end-of-sequence token.

        Args:
            untrained: how the last answer begins, but what is not trained of it.

        Raises:
            RowError: the template refuses the messages, renders what it rendered before differently when there are
                more of them, or changes an answer; there are messages and no template; the prompt gives no tokens.
            UserError: the template is malformed; an end-of-sequence token is needed and there is none.
        """
        if self.templated:
            answers = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
            return self._encode_messages(prompt, answers, untrained)
        ids = self.prompt(prompt)
        if not isinstance(completion, str):
            raise RowError("the answer is a list of messages, which needs a chat template, and none is used; give text")
        sequence = _Growing()
        sequence.add(ids, trained=False)
        sequence.add(self.pieces.continuing(untrained), trained=False)
        sequence.add(self.pieces.continuing(completion[len(untrained) :]), trained=True)
        sequence.end(self._end_id())
        return Answered(sequence.finish(), (len(ids),), (prompt,))

    def _encode_messages(self, prompt: str | Messages, answers: Messages, untrained: str) -> Answered:
        messages = [*as_messages(prompt), *answers]
        turns = [i for i in range(len(messages) - len(answers), len(messages)) if messages[i]["role"] == "assistant"]
        sequence, starts, contexts = _Growing(), [], []
        done, stop, rendered = "", None, ""  # `done` is tokenised, and ends with the special token `stop`
        for i in turns:
            before, rendered = self._render(messages[:i], True), self._render(messages[: i + 1], False)
            if not before.startswith(done) or not rendered.startswith(before):
                raise RowError(
                    f"the chat template renders message {i} so that the text does not begin with what stood before it, "
                    "so it cannot be trained as the answer to that; use another template, or one answer per row"
                )
            sequence.add(self._context(before[len(done) :], done, stop), trained=False)
            if not sequence.ids:
                raise RowError("the prompt gives no tokens")
            starts.append(len(sequence.ids))
            contexts.append(prompt if i == turns[0] else messages[:i])
            answer, stop = self._trained_part(rendered[len(before) :], messages[i]["content"])
            skipped = _length_of(untrained, answer) if i == turns[-1] else 0
            sequence.add(self.pieces.continuing(answer[:skipped]), trained=False)
            sequence.add(self.pieces.continuing(answer[skipped:]), trained=True)
            done = before + answer
        if stop is None:
            sequence.end(self._end_id())
        else:
            sequence.add(self._context(rendered[len(done) :], done, stop), trained=False)
        return Answered(sequence.finish(), tuple(starts), tuple(contexts))

    def _render(self, messages: Messages, add_generation_prompt: bool) -> str:
        return apply_template(
            messages,
            self._tokenizer,
            self._system_prompt,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )

    def _context(self, text: str, done: str, stop: str | None) -> list[int]:
        if not done:
            return self.pieces.beginning(text)
        return self.pieces.continuing(text) if stop is None else self.pieces.behind(stop, text)

    def _trained_part(self, remainder: str, content: str) -> tuple[str, str | None]:
        """What to train of the text after a generation prompt, and the special token of the template that ends it."""
        body = remainder.rstrip()
        said = content.rstrip()
        stop = next((token for token in self._special_tokens if body.endswith(token)), None)
        if stop is not None and not body.endswith(said):
            if said.endswith(stop):
                raise RowError(f"an answer ends with {stop!r}, which the chat template adds; leave it out")
            return body, stop
        for answer in (content, content.strip()):
            at = remainder.find(answer)
            if at >= 0 and not remainder[:at].strip():
                return remainder[: at + len(answer)], None
        raise RowError("the chat template changes the text of an answer, and puts no special token at its end")

    def _end_id(self) -> int:
        if self._tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no end-of-sequence token (eos_token), so answers cannot be ended; set one in its "
                "tokenizer_config.json"
            )
        return self._tokenizer.eos_token_id


def _length_of(untrained: str, answer: str) -> int:
    """Characters of an answer, as rendered, up to where its untrained beginning ends."""
    at = answer.find(untrained.strip())
    if at < 0:
        raise RowError("the chat template changes the reasoning, so that the answer after it is not found")
    end = at + len(untrained.strip())
    space = untrained[len(untrained.rstrip()) :]
    return end + len(space) if answer.startswith(space, end) else end


class _Growing:
    """A sequence that pieces are added to."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self._mask: list[bool] = []

    def add(self, ids: list[int], *, trained: bool) -> None:
        self.ids += ids
        self._mask += [trained] * len(ids)

    def end(self, end_id: int) -> None:
        """Train the end token, if something trained is there that does not end with it."""
        if self._mask[-1] and self.ids[-1] != end_id:
            self.add([end_id], trained=True)

    def finish(self) -> TokenSequence:
        return TokenSequence(np.array(self.ids, np.int32), np.array(self._mask, bool))


class PieceTokenizer:
    """Tokenises text that goes on after other text, without the mark that some tokenizers put before a first word."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer`: of transformers; a UserError is raised if it is not a fast one."""
        if not tokenizer.is_fast:
            raise UserError(
                f"the tokenizer is a {type(tokenizer).__name__}, which is not a fast one; training on rows needs a "
                "tokenizer.json beside the model"
            )
        self._tokenizer = tokenizer
        description = json.loads(tokenizer.backend_tokenizer.to_str())
        parts = {name: description[name] for name in ("normalizer", "pre_tokenizer")}
        unmarked = {name: _without_mark(part) for name, part in parts.items()}
        self._unmarked: Tokenizer | None = None
        if unmarked != parts:
            unlimited = {"truncation": None, "padding": None}
            self._unmarked = Tokenizer.from_str(json.dumps(description | unmarked | unlimited))

    def beginning(self, text: str) -> list[int]:
        """The ids of a text's beginning, as of a rendered chat template."""
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []

    def continuing(self, text: str) -> list[int]:
        """The ids of text that stands on its own amidst other text."""
        if self._unmarked is None:
            return self.beginning(text)
        return self._unmarked.encode(text, add_special_tokens=False).ids

    def behind(self, token: str, text: str) -> list[int]:
        """The ids of text as they are where a special token stands before it in the same text.

        Unlike `continuing`, this is how a template's next turn comes out when all turns are tokenised in one go.
        """
        return self.beginning(token + text)[len(self.beginning(token)) :]


def _without_mark(part: Any) -> Any:
    """A component of a tokenizer without that mark: a SentencePiece-like one's "▁", a byte-level one's space."""
    if not isinstance(part, dict):
        return part
    kind = part["type"]
    if kind == "Prepend":
        return None
    if kind == "Metaspace":
        return part | {"prepend_scheme": "never"}
    if kind == "ByteLevel":
        return part | {"add_prefix_space": False}
    if kind == "Sequence":
        members = "normalizers" if "normalizers" in part else "pretokenizers"
        kept = [_without_mark(member) for member in part[members]]
        return part | {members: [member for member in kept if member is not None]}
    return part
