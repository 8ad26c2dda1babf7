"""Preference rows: pairs of answers to one prompt, and single answers that are desirable or not."""

from __future__ import annotations

import re
from typing import Any

from engine.config import DataConfig
from engine.data.conversations import Answered, AnswerTokenizer, Messages, read_answer, read_prompt
from engine.data.examples import (
    Example,
    PreparedExamples,
    collect_examples,
    read_column,
    read_messages,
    read_number,
    read_text,
    with_annotators,
)
from engine.data.prompts import RowError
from engine.data.sources import Rows

_ASSISTANT = "\n\nAssistant:"
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_SPEAKER = re.compile(r"\n\n(Human|Assistant):")

_Said = str | Messages


def build_pairs(
    rows: Rows, tokenizer: Any, *, data: DataConfig, max_length: int, score_last: bool = False
) -> PreparedExamples:
    """Two sequences per row, `chosen` before `rejected`, with the answers masked.

    The columns are text or messages. Without `prompt`, it is what the two have in common: of messages, those before
    the first answers that differ; of dialogues in text ("\\n\\nHuman: ... \\n\\nAssistant: ...", as in Anthropic's
    HH), the text up to the last "\\n\\nAssistant:" of their common beginning; if a chat template is used, the text
    becomes messages. Messages that hold the whole conversation may stand beside a `prompt` in text, which is not used.
    Labels, each the same for both: `margin` (0 where the row has none) if any row has one; `annotator` (see
    `with_annotators`). `Example.prompt` is what the answers answer.

    Args:
        tokenizer: a fast transformers tokenizer.
        max_length: longest sequence, in tokens; `data.on_long_row` "truncate" cuts both at their end.
        score_last: end each answer with its end token and mask that one alone, for reward models.

    Raises:
        UserError: as `collect_examples` and `AnswerTokenizer`.
    """
    answers = AnswerTokenizer(tokenizer, data)
    has_margin = any(row.get("margin") is not None for row in rows.rows)

    def build(row: dict[str, Any]) -> list[Example]:
        chosen, rejected = _encode_pair(row, answers)
        margin = 0.0 if row.get("margin") is None else read_number(row["margin"], "column 'margin'")
        labels: dict[str, tuple[float, ...]] = {"margin": (margin, margin)} if has_margin else {}
        return [Example((chosen.sequence, rejected.sequence), labels, row, chosen.first_prompt(row))]

    prepared = collect_examples(
        rows, build, what="preference pairs", data=data, max_length=max_length, score_last=score_last
    )
    return with_annotators(prepared)


def build_unpaired(rows: Rows, tokenizer: Any, *, data: DataConfig, max_length: int) -> PreparedExamples:
    """One sequence per row of `prompt`, `completion`, `label`; two examples per pair (see `build_pairs`).

    The label `desirable` is 1 or 0. Arguments and errors as in `build_pairs`.
    """
    answers = AnswerTokenizer(tokenizer, data)

    def build(row: dict[str, Any]) -> list[Example]:
        if row.get("completion") is None and row.get("chosen") is not None:
            judged = list(zip(_encode_pair(row, answers), (1.0, 0.0), strict=True))
        else:
            completion = read_answer(read_column(row, "completion"), "column 'completion'")
            label = read_number(read_column(row, "label"), "column 'label'")
            if label not in (0.0, 1.0):
                raise RowError(f"column 'label' must be true or false, or 1 or 0, is {row['label']!r}")
            judged = [(answers.encode(read_prompt(row), completion), label)]
        return [Example((a.sequence,), {"desirable": (label,)}, row, a.first_prompt(row)) for a, label in judged]

    return collect_examples(rows, build, what="judged answers", data=data, max_length=max_length)


def _encode_pair(row: dict[str, Any], answers: AnswerTokenizer) -> tuple[Answered, Answered]:
    prompt, chosen, rejected = _read_pair(row, answers.templated)
    if chosen == rejected:
        raise RowError("columns 'chosen' and 'rejected' are the same")
    return answers.encode(prompt, chosen), answers.encode(prompt, rejected)


def _read_pair(row: dict[str, Any], templated: bool) -> tuple[_Said, _Said, _Said]:
    """Prompt, chosen and rejected answer."""
    chosen, rejected = read_column(row, "chosen"), read_column(row, "rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RowError("columns 'chosen' and 'rejected' must both be text, or both messages")
    if row.get("prompt") is None:
        return _split_texts(chosen, rejected, templated) if isinstance(chosen, str) else _split(chosen, rejected)
    prompt = read_prompt(row)
    if isinstance(prompt, str) and not isinstance(chosen, str):
        first = read_messages(chosen, "column 'chosen'")[0]
        if first["role"] != "assistant":  # the whole conversation, whose beginning is the prompt once more
            return _split(chosen, rejected)
    return prompt, read_answer(chosen, "column 'chosen'"), read_answer(rejected, "column 'rejected'")


def _split(chosen: Any, rejected: Any) -> tuple[Messages, Messages, Messages]:
    """Whole conversations, at the last answer before which they are the same."""
    chosen, rejected = read_messages(chosen, "column 'chosen'"), read_messages(rejected, "column 'rejected'")
    split = 0
    for i, (ours, theirs) in enumerate(zip(chosen, rejected, strict=False)):
        if ours["role"] == theirs["role"] == "assistant":
            split = i
        if ours != theirs:
            break
    if split == 0:
        raise RowError("columns 'chosen' and 'rejected' have no beginning in common that the assistant answers")
    return chosen[:split], chosen[split:], rejected[split:]


def _split_texts(chosen: str, rejected: str, templated: bool) -> tuple[_Said, _Said, _Said]:
    """Whole dialogues in text."""
    shared = _common_beginning(read_text(chosen, "column 'chosen'"), read_text(rejected, "column 'rejected'"))
    split = shared.rfind(_ASSISTANT) + len(_ASSISTANT)
    if split < len(_ASSISTANT):
        raise RowError(
            "there is no column 'prompt', and columns 'chosen' and 'rejected' are no dialogues (\"\\n\\nHuman: ... "
            '\\n\\nAssistant: ...") with a common beginning'
        )
    prompt, said = shared[:split], {"chosen": chosen[split:], "rejected": rejected[split:]}
    for name, answer in said.items():
        read_text(answer, f"the answer in column {name!r}")
        if _SPEAKER.search(answer):
            raise RowError(f"column {name!r} goes on after the answer in which the two dialogues differ")
    if not templated:
        return prompt, said["chosen"], said["rejected"]
    return _to_messages(prompt.removesuffix(_ASSISTANT)), said["chosen"].strip(), said["rejected"].strip()


def _to_messages(dialogue: str) -> Messages:
    parts = _SPEAKER.split(dialogue)
    if parts[0].strip() or len(parts) == 1:
        raise RowError('a dialogue in text must begin with "\\n\\nHuman:"')
    return [
        {"role": _SPEAKERS[speaker], "content": text.strip()}
        for speaker, text in zip(parts[1::2], parts[2::2], strict=True)
    ]


def _common_beginning(a: str, b: str) -> str:
    return a[: next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))]
