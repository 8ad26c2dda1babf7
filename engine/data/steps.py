"""Process rows: a solution step by step, and whether each step is right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.config import DataConfig, UserError
from engine.data.conversations import AnswerTokenizer, read_prompt
from engine.data.examples import (
    Example,
    PreparedExamples,
    TokenSequence,
    collect_examples,
    read_column,
    read_list,
    read_number,
    read_text,
)
from engine.data.prompts import Prompt, RowError
from engine.data.sources import Rows
from engine.user_code import load_object


def build_steps(rows: Rows, tokenizer: Any, *, data: DataConfig, separator: str, max_length: int) -> PreparedExamples:
    """One sequence per row: `prompt`, then each of `steps` (or `completions`) with the separator after it.

    Steps and separators are tokenised on their own. The mask is on the last token of each step, its separator
    included; `token_labels` hold the step's number of the column `labels` there (true or false, or 0 to 1).

    Args:
        tokenizer: a fast transformers tokenizer.
        separator: may be empty.
        max_length: longest sequence, in tokens; `data.on_long_row` "truncate" cuts steps off at the end.

    Raises:
        UserError: as `collect_examples` and `AnswerTokenizer`.
    """
    answers = AnswerTokenizer(tokenizer, data)
    separator_ids = answers.pieces.continuing(separator)

    def build(row: dict[str, Any]) -> list[Example]:
        prompt, (steps, labels) = read_prompt(row), _read_steps(row)
        prompt_ids = answers.prompt(prompt)
        ids, ends = list(prompt_ids), []
        for i, step in enumerate(steps):
            step_ids = answers.pieces.continuing(step)
            if not step_ids:
                raise RowError(f"step {i} gives no tokens")
            ids += [*step_ids, *separator_ids]
            ends.append(len(ids) - 1)
        mask, labels_T = np.zeros(len(ids), bool), np.zeros(len(ids), np.float32)
        mask[ends], labels_T[ends] = True, labels
        sequence = TokenSequence(np.array(ids, np.int32), mask)
        return [Example((sequence,), {}, row, Prompt(tuple(prompt_ids), prompt, row), (labels_T,))]

    return collect_examples(rows, build, what="process rows", data=data, max_length=max_length)


def _read_steps(row: dict[str, Any]) -> tuple[list[str], list[float]]:
    column = "completions" if row.get("steps") is None and row.get("completions") is not None else "steps"
    listed = read_list(read_column(row, column), f"column {column!r}")
    steps = [read_text(step, f"column {column!r}: step {i}") for i, step in enumerate(listed)]
    listed = read_list(read_column(row, "labels"), "column 'labels'")
    labels = [read_number(label, f"column 'labels': label {i}") for i, label in enumerate(listed)]
    if len(labels) != len(steps):
        raise RowError(f"column 'labels' has {len(labels)} labels for {len(steps)} steps")
    for i, label in enumerate(labels):
        if not 0 <= label <= 1:
            raise RowError(f"column 'labels': label {i} must be true or false, or from 0 to 1, is {listed[i]!r}")
    return steps, labels


class StepCutter:
    """Cuts responses into steps, where a text or the user's own function says."""

    def __init__(self, tokenizer: Any, boundary: str) -> None:
        """`boundary` is as `rewards.steps`.

        Raises:
            UserError: the function cannot be loaded.
        """
        self.tokenizer = tokenizer
        self.boundary = boundary
        function = boundary.rpartition(":")[0].endswith(".py")
        self._cut = load_object(boundary, what="rewards.steps") if function else None

    def ends(self, token_ids: Sequence[int]) -> list[int]:
        """Positions of the last token of each step of a response, at least one.

        Raises:
            UserError: the user's function returned no list of texts that together are the response.
        """
        if self._cut is None:
            return step_ends(token_ids, self.tokenizer, self.boundary)
        pieces = _pieces(token_ids, self.tokenizer)
        text = "".join(pieces)
        texts = self._cut(text)
        if not isinstance(texts, list) or not all(isinstance(t, str) and t for t in texts) or "".join(texts) != text:
            raise UserError(
                f"rewards.steps: {self.boundary} must cut {text[:60]!r} into a list of texts that together are the "
                f"response; it returned {str(texts)[:80]}"
            )
        after_T = np.cumsum([len(piece) for piece in pieces])
        ends = [int(np.searchsorted(after_T, end)) for end in np.cumsum([len(t) for t in texts])]
        return list(dict.fromkeys(ends)) or [len(token_ids) - 1]

    def texts(self, token_ids: Sequence[int], ends: Sequence[int]) -> tuple[str, ...]:
        """The text of each step."""
        pieces = _pieces(token_ids, self.tokenizer)
        starts = [0, *(end + 1 for end in ends[:-1])]
        return tuple("".join(pieces[start : end + 1]) for start, end in zip(starts, ends, strict=True))


def _pieces(token_ids: Sequence[int], tokenizer: Any) -> list[str]:
    """Each token's own text; none of special ones."""
    special = set(tokenizer.all_special_ids)
    return ["" if token in special else tokenizer.decode([token]) for token in token_ids]


def step_ends(token_ids: Sequence[int], tokenizer: Any, separator: str) -> list[int]:
    """Positions of the last token of each step of a response, at least one.

    A step ends with the token that completes a separator; what follows the last one is a step too, unless it is blank
    or special tokens.
    """
    pieces = _pieces(token_ids, tokenizer)
    text = "".join(pieces)
    after_T = np.cumsum([len(piece) for piece in pieces])
    ends, start = [], 0
    while separator and (found := text.find(separator, start)) >= 0:
        start = found + len(separator)
        ends.append(int(np.searchsorted(after_T, start)))
    if text[start:].strip():
        ends.append(int(np.searchsorted(after_T, len(text.rstrip()))))
    return list(dict.fromkeys(ends)) or [len(token_ids) - 1]
