"""Procedural tasks of reasoning-gym: rows of a task, and the task's own score as a verifier."""

from __future__ import annotations

import ast
import functools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from engine.config import UserError
from engine.rewards.checks import check_types, column_of, extracted, optional, require_pattern
from engine.rewards.contract import Sample

_EVALUATES_LITERALS = {"string_insertion", "spiral_matrix", "binary_matrix", "n_queens"}
_EVALUATES_EXPRESSIONS = {
    "simple_integration",
    "intermediate_integration",
    "polynomial_multiplication",
    "puzzle24",
    "countdown",
}
_FUNCTIONS = {
    "sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh", "exp", "log", "ln",
    "sqrt", "Abs",
}  # fmt: skip


def reasoning_gym_rows(
    task: str, size: int = 500, seed: int = 0, config: Mapping[str, Any] | None = None
) -> Iterator[dict[str, Any]]:
    """Rows of a reasoning-gym task, a data source: `path: engine.rewards.procedural:reasoning_gym_rows`.

    Args:
        task: registered name, e.g. `chain_sum`.
        size: rows.
        seed: the same seed gives the same rows.
        config: further settings of the task; of `composite`, `datasets` is a list of {name, weight, config}.

    Yields:
        `prompt`, `answer` (text; empty where the task has several solutions and names none) and `entry` (JSON text that
        `ReasoningGym` reads: task, config and the package's own entry).

    Raises:
        UserError: the package is missing, or there is no such task or setting.
    """
    settings = dict(config or {}) | {"size": size, "seed": seed}
    for item in _reasoning_gym_dataset(task, json.dumps(settings)):
        kept = {"task": task, "config": dict(config or {}) | {"seed": seed}, "item": _to_json(item)}
        yield {"prompt": item["question"], "answer": item["answer"] or "", "entry": json.dumps(kept)}


def _to_json(value: Any) -> Any:
    """JSON that remembers tuples and keys that are not text, on which some tasks' scoring depends."""
    if isinstance(value, tuple):
        return {"__tuple__": [_to_json(each) for each in value]}
    if isinstance(value, list):
        return [_to_json(each) for each in value]
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {key: _to_json(each) for key, each in value.items()}
        return {"__items__": [[_to_json(key), _to_json(each)] for key, each in value.items()]}
    return value


def _from_json(value: dict[str, Any]) -> Any:
    """`object_hook` that undoes `_to_json`."""
    if value.keys() == {"__tuple__"}:
        return tuple(value["__tuple__"])
    return dict(value["__items__"]) if value.keys() == {"__items__"} else value


@functools.lru_cache(maxsize=128)
def _reasoning_gym_dataset(task: str, config: str) -> Any:
    gym = optional("reasoning_gym", "reasoning-gym", "reasoning_gym")
    from reasoning_gym.composite import DatasetSpec
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        raise UserError(f"reasoning-gym has no task {task!r}; it has {', '.join(sorted(DATASETS))}")
    settings = json.loads(config)
    try:
        if task == "composite":
            settings["datasets"] = [
                DatasetSpec(**{"weight": 1, "config": {}} | s) for s in settings.get("datasets", [])
            ]
        return gym.create_dataset(task, **settings)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"reasoning-gym task {task!r}: config: {error}") from None


def _harmless(task: str, answer: str) -> bool:
    """False for text that must not reach a task whose scoring evaluates it as Python: what could call a function."""
    if task in _EVALUATES_LITERALS and "(" in answer:
        try:
            ast.literal_eval(answer)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return False
    if task in _EVALUATES_EXPRESSIONS:
        plain = re.fullmatch(r"[\w\s+\-*/^().,]*", answer, re.ASCII) is not None and "__" not in answer
        return plain and set(re.findall(r"([\w.)]+)\s*\(", answer)) <= _FUNCTIONS
    return True


@dataclass(frozen=True)
class ReasoningGym:
    """The score that a reasoning-gym task gives the response, from 0 to 1, for rows of `reasoning_gym_rows`.

    Nine tasks evaluate the response as Python (`eval`, sympy's `parse_expr`). There, text that is not a plain literal
    or a formula of known functions scores 0 and is not evaluated.

    Raises, when called:
        KeyError, ValueError: the column is missing, or does not hold such an entry.
    """

    column: str = "entry"
    """Holds the entry, as `reasoning_gym_rows` wrote it."""
    extract: str | None = None
    """Regular expression with one group, e.g. `<answer>(.*?)</answer>`: its last match is the answer, and without a
    match the score is 0. None: the whole response. Either is scored without whitespace at its ends."""

    def __post_init__(self) -> None:
        check_types(self)
        optional("reasoning_gym", "reasoning-gym", "reasoning_gym")
        require_pattern(self, "extract", groups=1)

    def __call__(self, sample: Sample) -> float:
        held = column_of(sample, self.column)
        try:
            entry = json.loads(held, object_hook=_from_json)
            task, config, item = entry["task"], entry["config"], entry["item"]
        except (TypeError, ValueError, KeyError):
            raise ValueError(
                f"the row's column {self.column!r} is no entry of reasoning_gym_rows: {str(held)[:80]!r}"
            ) from None
        answer = extracted(self.extract, sample.completion)
        if answer is None or not _harmless(item["metadata"].get("source_dataset", task), answer.strip()):
            return 0.0
        return float(_reasoning_gym_dataset(task, json.dumps(config)).score_answer(answer.strip(), item))
