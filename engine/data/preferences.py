"""Rows of preferences: pairs `prompt`, `chosen`, `rejected`, or for KTO single answers that are desirable or not.

Rows without a `prompt` have it inside: as the messages that both sides begin with, or as the dialogue of the Anthropic
HH format ("\\n\\nHuman: ... \\n\\nAssistant: ...") up to the last turn of the assistant.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from engine.config import DataConfig
from engine.data.encoder import Encoder, answer_column, build_examples, context_column
from engine.data.examples import Example, PreparedExamples, TokenSequence
from engine.data.prompts import RowError
from engine.data.sources import Rows

_HH_TURN = re.compile(r"\n\n(Human|Assistant): ?")
_HH_LAST = "\n\nAssistant:"
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


def build_pairs(
    rows: Rows, tokenizer: Any, *, data: DataConfig, max_length: int, score_last: bool = False
) -> PreparedExamples:
    """Two sequences per row, chosen before rejected; their masks are on the answers.

    A column `margin` becomes a label; so does `annotator`, numbered in sorted order.

    Args:
        max_length: longest sequence, in tokens.
        score_last: mask the last token alone, at which a reward model scores.

    Raises:
        UserError: a row is bad or too long and that is not to be skipped, or none is left.
    """
    encoder = Encoder(tokenizer, data, max_length)

    def make(row: dict[str, Any]) -> list[Example]:
        context, chosen, rejected = _pair(row, encoder.templated)
        sequences = tuple(encoder.answer(context, answer) for answer in (chosen, rejected))
        if np.array_equal(sequences[0].tokens, sequences[1].tokens):
            raise RowError("chosen and rejected are the same (within the token limit), so nothing is preferred")
        if score_last:
            sequences = tuple(last_only(sequence) for sequence in sequences)
        labels: dict[str, tuple[float, ...]] = (
            {} if row.get("margin") is None else {"margin": (_number(row, "margin"),) * 2}
        )
        return [Example(sequences, labels, row, encoder.prompt(context, row))]

    return number_annotators(_same_labels(build_examples(rows, data, make)))


def build_unpaired(rows: Rows, tokenizer: Any, *, data: DataConfig, max_length: int) -> PreparedExamples:
    """One sequence per answer, with the label `desirable`: of `prompt`, `completion`, `label`, or both of a pair.

    Raises:
        UserError: a row is bad or too long and that is not to be skipped, or none is left.
    """
    encoder = Encoder(tokenizer, data, max_length)

    def make(row: dict[str, Any]) -> list[Example]:
        if row.get("chosen") is not None:
            context, *answers = _pair(row, encoder.templated)
            labels = [1.0, 0.0]
        else:
            context, answers = context_column(row), [answer_column(row, "completion")]
            if row.get("label") not in (0, 1):
                raise RowError("column 'label' must be true or false")
            labels = [float(row["label"])]
        prompt = encoder.prompt(context, row)
        return [
            Example((encoder.answer(context, answer),), {"desirable": (label,)}, row, prompt)
            for answer, label in zip(answers, labels, strict=True)
        ]

    return build_examples(rows, data, make)


def last_only(sequence: TokenSequence) -> TokenSequence:
    """The same tokens with the mask on the last one."""
    mask = np.zeros_like(sequence.mask)
    mask[-1] = True
    return TokenSequence(sequence.tokens, mask)


def number_annotators(prepared: PreparedExamples) -> PreparedExamples:
    """The column `annotator` as a label, where every row has it."""
    who = [example.row.get("annotator") for example in prepared.examples]
    if any(name is None for name in who):
        return prepared
    names = tuple(sorted({str(name) for name in who}))
    number = {name: float(i) for i, name in enumerate(names)}
    examples = [
        replace(e, labels=e.labels | {"annotator": (number[str(e.row["annotator"])],) * len(e.sequences)})
        for e in prepared.examples
    ]
    return replace(prepared, examples=examples, annotators=names)


def _same_labels(prepared: PreparedExamples) -> PreparedExamples:
    """A margin in some rows only is 0 in the others."""
    if not any("margin" in e.labels for e in prepared.examples):
        return prepared
    return replace(prepared, examples=[replace(e, labels={"margin": (0.0, 0.0)} | e.labels) for e in prepared.examples])


def _pair(row: dict[str, Any], templated: bool) -> tuple[Any, Any, Any]:
    """(context, chosen, rejected)."""
    chosen, rejected = answer_column(row, "chosen"), answer_column(row, "rejected")
    if type(chosen) is not type(rejected):
        raise RowError("chosen and rejected must both be text or both be messages")
    if row.get("prompt") is not None:
        return context_column(row), chosen, rejected
    if isinstance(chosen, str) and isinstance(rejected, str) and not templated:
        end = _common_start(chosen, rejected).rfind(_HH_LAST)
        if end < 0:
            raise RowError("has no 'prompt', and chosen and rejected share no dialogue that ends with 'Assistant:'")
        cut = end + len(_HH_LAST)
        return chosen[:cut], chosen[cut:], rejected[cut:]
    sides = [_hh_messages(side) if isinstance(side, str) else side for side in (chosen, rejected)]
    return _without_common_start(*sides)


def _common_start(one: str, other: str) -> str:
    length = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]


def _hh_messages(dialogue: str) -> list[dict[str, str]]:
    start, *parts = _HH_TURN.split(dialogue)
    if start.strip() or not parts:
        raise RowError("has no 'prompt', and its text is no dialogue of '\\n\\nHuman: ' and '\\n\\nAssistant: ' turns")
    turns: Sequence[tuple[str, str]] = list(zip(parts[::2], parts[1::2], strict=True))
    return [{"role": _HH_ROLES[who], "content": text.strip()} for who, text in turns]


def _without_common_start(chosen: list[dict], rejected: list[dict]) -> tuple[list, list, list]:
    common = 0
    for one, other in zip(chosen, rejected, strict=False):
        if one != other:
            break
        common += 1
    if common == len(chosen) or common == len(rejected):
        raise RowError("chosen and rejected are the same, or one begins the other, so nothing is preferred")
    if common == 0:
        raise RowError("has no 'prompt', and chosen and rejected begin differently")
    return chosen[:common], chosen[common:], rejected[common:]


def _number(row: dict[str, Any], name: str) -> float:
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RowError(f"column {name!r} must be a number")
    return float(value)
