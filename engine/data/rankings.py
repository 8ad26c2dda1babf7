"""Ranking rows: several answers to one prompt, and which is better than which."""

from __future__ import annotations

from typing import Any

from engine.config import DataConfig
from engine.data.conversations import AnswerTokenizer, read_prompt
from engine.data.examples import (
    Example,
    PreparedExamples,
    collect_examples,
    read_column,
    read_list,
    read_number,
    read_text,
    with_annotators,
)
from engine.data.prompts import RowError
from engine.data.sources import Rows


def build_rankings(
    rows: Rows, tokenizer: Any, *, data: DataConfig, max_length: int, score_last: bool = False
) -> PreparedExamples:
    """One sequence for each of a row's `responses` (texts), with the answers masked.

    Labels: `rank` (column `ranks`: one number per response, 1 is best, ties are allowed), and `annotator` (see
    `with_annotators`).

    Args:
        tokenizer: a fast transformers tokenizer.
        max_length: longest sequence, in tokens; `data.on_long_row` "truncate" cuts answers at their end.
        score_last: end each answer with its end token and mask that one alone, for reward models.

    Raises:
        UserError: as `collect_examples` and `AnswerTokenizer`.
    """
    answers = AnswerTokenizer(tokenizer, data)

    def build(row: dict[str, Any]) -> list[Example]:
        prompt, (responses, ranks) = read_prompt(row), _read_ranked(row)
        answered = [answers.encode(prompt, response) for response in responses]
        return [Example(tuple(a.sequence for a in answered), {"rank": ranks}, row, answered[0].first_prompt(row))]

    return with_annotators(
        collect_examples(rows, build, what="rankings", data=data, max_length=max_length, score_last=score_last)
    )


def _read_ranked(row: dict[str, Any]) -> tuple[list[str], tuple[float, ...]]:
    listed = read_list(read_column(row, "responses"), "column 'responses'")
    responses = [read_text(response, f"column 'responses': response {i}") for i, response in enumerate(listed)]
    listed = read_list(read_column(row, "ranks"), "column 'ranks'")
    ranks = tuple(read_number(rank, f"column 'ranks': rank {i}") for i, rank in enumerate(listed))
    if len(responses) < 2:
        raise RowError("column 'responses' must hold at least two responses")
    if len(ranks) != len(responses):
        raise RowError(f"column 'ranks' has {len(ranks)} numbers for {len(responses)} responses")
    if len(set(ranks)) == 1:
        raise RowError("column 'ranks': all responses have the same rank, so none is preferred")
    return responses, ranks
