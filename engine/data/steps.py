"""Rows for process reward models: `prompt`, `steps` (texts; TRL's `completions` too) and `labels`, one per step."""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.config import DataConfig
from engine.data.encoder import Encoder, build_examples, context_column
from engine.data.examples import Example, PreparedExamples
from engine.data.prompts import RowError
from engine.data.sources import Rows


def build_steps(rows: Rows, tokenizer: Any, *, data: DataConfig, separator: str, max_length: int) -> PreparedExamples:
    """One sequence per row; the mask is on the last token of each step and its separator, labelled with the step's.

    Raises:
        UserError: a row is bad or too long and that is not to be skipped, or none is left.
    """
    encoder = Encoder(tokenizer, data, max_length)

    def make(row: dict[str, Any]) -> list[Example]:
        steps, labels = row.get("steps", row.get("completions")), row.get("labels")
        if not isinstance(steps, list) or not steps or any(not isinstance(s, str) or not s.strip() for s in steps):
            raise RowError("column 'steps' must be a list of texts, none of them empty")
        if not isinstance(labels, list) or len(labels) != len(steps):
            raise RowError("column 'labels' must be a list with one label per step")
        if any(not isinstance(label, bool | int | float) or not 0 <= label <= 1 for label in labels):
            raise RowError("column 'labels' must hold true or false, or numbers from 0 to 1")
        prompt = encoder.prompt(context_column(row), row)
        sequence = encoder.steps(prompt, [step + separator for step in steps])
        values = np.zeros(len(sequence.tokens), np.float32)
        values[sequence.mask] = np.array(labels, np.float32)[: int(sequence.mask.sum())]
        return [Example((sequence,), {}, row, prompt, token_labels=(values,))]

    return build_examples(rows, data, make)
