"""What the verifiers share: arguments that are checked, columns that are read, libraries that may be missing."""

from __future__ import annotations

import importlib
import math
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, get_args, get_type_hints

from engine.config import UserError
from engine.rewards.contract import Sample


def check_types(verifier: Any) -> None:
    """Raise UserError for the first field whose value is not of its annotated type."""
    hints = get_type_hints(type(verifier))
    for each in fields(verifier):
        value, allowed = getattr(verifier, each.name), hints[each.name]
        choices = get_args(allowed) if "Literal" in str(allowed) else ()
        if choices:
            require(verifier, value in choices, each.name, f"must be one of {', '.join(map(str, choices))}")
        elif allowed is float:
            # YAML reads 1e-6 as text.
            if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
                value = float(value)
                object.__setattr__(verifier, each.name, value)
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            require(verifier, number, each.name, "must be a finite number")
        elif allowed is bool or isinstance(allowed, type):
            right = isinstance(value, allowed) and (allowed is bool or not isinstance(value, bool))
            require(verifier, right, each.name, f"must be a {allowed.__name__}")


def require(verifier: Any, holds: bool, name: str, must: str) -> None:
    if not holds:
        where = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(verifier).__name__).lower()
        raise UserError(f"reward {where}: {name}={getattr(verifier, name)!r}: {must}")


def require_one(verifier: Any, given: str, column: str) -> None:
    both = [getattr(verifier, name) is not None for name in (given, column)]
    require(verifier, sum(both) == 1, given, f"give either {given} or {column}, the name of a column that holds it")


def require_pattern(verifier: Any, name: str, groups: int | None = None) -> None:
    pattern = getattr(verifier, name)
    if pattern is None:
        return
    require(verifier, isinstance(pattern, str), name, "must be a regular expression, as text")
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"reward {type(verifier).__name__.lower()}: {name}={pattern!r}: {error}") from None
    if groups is not None:
        require(verifier, compiled.groups == groups, name, f"must have {groups} group, the part that is the answer")


def optional(module: str, package: str, reward: str) -> Any:
    """Import an optional library.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        raise UserError(f"reward {reward}: needs the package {package}; install it: pip install {package}") from None


def column_of(sample: Sample, name: str) -> Any:
    """The row's value.

    Raises:
        KeyError: no such column.
        ValueError: it is empty (None).
    """
    value = sample.row[name]
    if value is None:
        raise ValueError(f"the row's column {name!r} is empty (None)")
    return value


def extracted(pattern: str | None, text: str) -> str | None:
    """The group of the pattern's last match, all of the text without a pattern, None without a match."""
    if pattern is None:
        return text
    found = last(re.finditer(pattern, text, re.DOTALL))
    return None if found is None else (found[1] or "")


def last(matches: Iterator[re.Match[str]]) -> re.Match[str] | None:
    return next(iter(deque(matches, maxlen=1)), None)
