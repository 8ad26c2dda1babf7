"""Rows of rankings: `prompt`, `responses` (texts) and `ranks` (1 is best, ties allowed)."""

from __future__ import annotations

import math
from typing import Any

from engine.config import DataConfig
from engine.data.encoder import Encoder, build_examples, context_column
from engine.data.examples import Example, PreparedExamples
from engine.data.preferences import last_only, number_annotators
from engine.data.prompts import RowError
from engine.data.sources import Rows


def build_rankings(
    rows: Rows, tokenizer: Any, *, data: DataConfig, max_length: int, score_last: bool = False
) -> PreparedExamples:
    """One sequence per response, with the label `rank`; the rest as `build_pairs` does.

    Raises:
        UserError: a row is bad or too long and that is not to be skipped, or none is left.
    """
    encoder = Encoder(tokenizer, data, max_length)

    def make(row: dict[str, Any]) -> list[Example]:
        context = context_column(row)
        responses, ranks = row.get("responses"), row.get("ranks")
        if not isinstance(responses, list) or len(responses) < 2:
            raise RowError("column 'responses' must be a list of two or more texts")
        if any(not isinstance(text, str) or not text.strip() for text in responses):
            raise RowError("column 'responses' must hold texts, none of them empty")
        if not isinstance(ranks, list) or len(ranks) != len(responses):
            raise RowError("column 'ranks' must be a list with one number per response")
        if any(isinstance(r, bool) or not isinstance(r, int | float) or not math.isfinite(r) for r in ranks):
            raise RowError("column 'ranks' must hold numbers; 1 is best")
        if len(set(ranks)) == 1:
            raise RowError("column 'ranks': all are equal, so nothing is preferred")
        sequences = tuple(encoder.answer(context, text) for text in responses)
        if score_last:
            sequences = tuple(last_only(sequence) for sequence in sequences)
        return [Example(sequences, {"rank": tuple(map(float, ranks))}, row, encoder.prompt(context, row))]

    return number_annotators(build_examples(rows, data, make))
