"""What an offline stage trains on: token sequences with masks, grouped into units that stay in one micro-batch.

rows -> a builder (conversations, preferences, rankings, steps), through `collect_examples` -> Examples -> `to_batch`
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np

from engine.config import DataConfig, UserError
from engine.data.batch import Batch
from engine.data.prompts import Prompt, RowError
from engine.data.sources import ROLES, Rows, bad_rows_error

_SHOWN = 10


@dataclass(frozen=True)
class TokenSequence:
    """One sample."""

    tokens: np.ndarray
    """[n] int32: token ids."""
    mask: np.ndarray
    """[n] bool: True on tokens that are trained (or scored); never on the first."""


@dataclass(frozen=True)
class Example:
    """One unit: a conversation (1 sequence), a pair (2: chosen, rejected), a ranking (one per response)."""

    sequences: tuple[TokenSequence, ...]
    """Its samples."""
    labels: dict[str, tuple[float, ...]]
    """name -> one number per sequence."""
    row: dict[str, Any]
    """All columns of the row."""
    prompt: Prompt | None = None
    """The prompt alone, ready to be continued; None where there is none."""
    token_labels: tuple[np.ndarray, ...] | None = None
    """Per sequence, [n] float32: what the mask's tokens are labelled with, 0 elsewhere."""


@dataclass(frozen=True)
class PreparedExamples:
    """Usable examples, and why rows were left out."""

    examples: list[Example]
    skipped: list[str]
    """Reasons of `Rows.skipped`, then those found here; one per row."""
    annotators: tuple[str, ...] = ()
    """Who the label `annotator` numbers."""


def to_batch(examples: Sequence[Example]) -> Batch:
    """The sequences of at least one example, one after the other; `group_ids` are positions of examples.

    `token_labels` become the annotation `labels`.
    """
    assert all(set(e.labels) == set(examples[0].labels) for e in examples), "examples of one batch have the same labels"
    sequences = [s for example in examples for s in example.sequences]
    names = list(examples[0].labels)
    annotations = {}
    if examples[0].token_labels is not None:
        labels = [values for example in examples for values in example.token_labels or ()]
        annotations["labels"] = np.concatenate(labels).astype(np.float32)
    return Batch.offline(
        tokens=np.concatenate([s.tokens for s in sequences]).astype(np.int32),
        seq_lens=np.array([len(s.tokens) for s in sequences], np.int32),
        loss_mask=np.concatenate([s.mask for s in sequences]),
        group_ids=np.repeat(np.arange(len(examples)), [len(example.sequences) for example in examples]),
        labels={name: np.array([v for e in examples for v in e.labels[name]], np.float32) for name in names},
        annotations=annotations,
    )


def collect_examples(
    rows: Rows,
    build: Callable[[dict[str, Any]], list[Example]],
    *,
    what: str,
    data: DataConfig,
    max_length: int,
    score_last: bool = False,
) -> PreparedExamples:
    """The examples of all rows, cut to `max_length` where `data.on_long_row` says so.

    Args:
        build: the examples of one row, of any length; raises `RowError`.
        what: what the rows are, for messages, e.g. "preference pairs".
        max_length: longest sequence, in tokens.
        score_last: end each sequence at its last masked token, and mask that one alone (for reward models).

    Raises:
        UserError: a row cannot be used (unless `data.on_bad_row` is "skip"), also because the cut leaves no masked
            token, or no difference between a row's answers; a row is too long and `data.on_long_row` is "fail"; no
            example is left.
    """
    examples: list[Example] = []
    unusable: list[str] = []
    too_long: list[str] = []
    skipped: list[str] = []
    for place, row in zip(rows.places, rows.rows, strict=True):
        try:
            built = build(row)
            longest = max(len(s.tokens) for example in built for s in example.sequences)
            if longest > max_length and data.on_long_row != "truncate":
                too_long.append(f"{place}: {longest} tokens, the limit is {max_length}")
                skipped.append(too_long[-1])
                continue
            examples += [_fit(example, max_length, score_last) for example in built]
        except RowError as error:
            unusable.append(f"{place}: {error}")
            skipped.append(unusable[-1])
    if unusable and data.on_bad_row == "fail":
        raise bad_rows_error(what, unusable, len(rows.rows))
    if too_long and data.on_long_row == "fail":
        raise UserError(
            f"{len(too_long)} of {len(rows.rows)} {what} are too long; shorten them, raise training.max_length, or set "
            f"data.on_long_row: skip or truncate{_shown(too_long)}"
        )
    if not examples:
        raise UserError(f"{what}: no example is left: all {len(rows.rows)} rows were skipped{_shown(skipped)}")
    return PreparedExamples(examples, [*rows.skipped, *skipped])


def _shown(reasons: Sequence[str]) -> str:
    more = f"\n  ... and {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else ""
    return "".join(f"\n  {reason}" for reason in reasons[:_SHOWN]) + more


def _fit(example: Example, max_length: int, score_last: bool) -> Example:
    """The example with its sequences cut at their end; the prompt goes where nothing is left to continue it with."""
    sequences = tuple(TokenSequence(s.tokens[:max_length], s.mask[:max_length]) for s in example.sequences)
    is_cut = any(len(s.tokens) > max_length for s in example.sequences)
    cut = f"cut to {max_length} tokens, " if is_cut else ""
    if not all(s.mask.any() for s in sequences):
        raise RowError(f"{cut}nothing is left of an answer" if cut else "an answer gives no tokens")
    first = sequences[0].tokens
    if len(sequences) > 1 and all(np.array_equal(s.tokens, first) for s in sequences):
        raise RowError(f"{cut}its answers are all the same, so none is preferred")
    labels = example.token_labels
    return replace(
        example,
        sequences=tuple(_ending_scored(s) for s in sequences) if score_last else sequences,
        prompt=example.prompt if example.prompt and len(example.prompt.token_ids) < max_length else None,
        token_labels=None if labels is None else tuple(values[:max_length] for values in labels),
    )


def _ending_scored(sequence: TokenSequence) -> TokenSequence:
    end = int(np.flatnonzero(sequence.mask)[-1]) + 1
    return TokenSequence(sequence.tokens[:end], np.arange(end) == end - 1)


def with_annotators(prepared: PreparedExamples) -> PreparedExamples:
    """The label `annotator`: the position of the row's `annotator`, as text, among all of them in sorted order.

    It is set only where every row names one.
    """
    names = [example.row.get("annotator") for example in prepared.examples]
    if any(name is None for name in names):
        return prepared
    annotators = tuple(sorted({str(name) for name in names}))
    index = {name: float(i) for i, name in enumerate(annotators)}
    examples = [
        replace(e, labels=e.labels | {"annotator": (index[str(name)],) * len(e.sequences)})
        for e, name in zip(prepared.examples, names, strict=True)
    ]
    return PreparedExamples(examples, prepared.skipped, annotators)


def read_column(row: dict[str, Any], column: str) -> Any:
    """What the row has there.

    Raises:
        RowError: the column is missing or null.
    """
    if row.get(column) is None:
        present = ", ".join(row) or "none"
        why = f"is empty: {column!r}" if column in row else f"is missing: {column!r}; its columns: {present}"
        raise RowError(f"a column {why}")
    return row[column]


def read_text(value: Any, name: str, *, may_be_empty: bool = False) -> str:
    """Text, with more than white space unless it `may_be_empty`; `name` says in messages what it is.

    Raises:
        RowError: it is something else.
    """
    if not isinstance(value, str):
        raise RowError(f"{name} must be text, is of type {type(value).__name__}")
    if not value.strip() and not may_be_empty:
        raise RowError(f"{name} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(f"{name} has characters that are not valid Unicode") from None
    return value


def read_list(value: Any, name: str) -> list[Any]:
    """A list with something in it.

    Raises:
        RowError: it is something else.
    """
    if not isinstance(value, list | tuple):
        raise RowError(f"{name} must be a list, is of type {type(value).__name__}")
    if not value:
        raise RowError(f"{name} is empty")
    return list(value)


def read_messages(value: Any, name: str) -> list[dict[str, Any]]:
    """Messages with a role and text; the assistant's are not empty.

    Raises:
        RowError: it is something else.
    """
    messages = read_list(value, name)
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise RowError(f"{name}: message {i} must be an object with role and content")
        if message["role"] not in ROLES:
            raise RowError(f"{name}: message {i} has role {message['role']!r}; use one of {', '.join(ROLES)}")
        may_be_empty = message["role"] != "assistant"
        read_text(message["content"], f"{name}: the content of message {i}", may_be_empty=may_be_empty)
    return messages


def read_number(value: Any, name: str) -> float:
    """A finite number; truth values are 0 and 1, and text (of a csv file) that says either is taken.

    Raises:
        RowError: it is something else.
    """
    if isinstance(value, str):
        value = {"true": 1.0, "false": 0.0}.get(value.strip().lower(), value)
    try:
        number = float(value) if isinstance(value, str | Real | np.bool_) else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise RowError(f"{name} must be a number, is {value!r}")
    return number
