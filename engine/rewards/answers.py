"""Verifiers of what a response says: text, number, pattern, JSON, choice.

Like all verifiers they are frozen dataclasses: the fields are the entry's `arguments`, calling one with a sample gives
the reward. A response that cannot be read scores as wrong; a row that cannot be read (no such column, no number where
one is due) is an error that says so, never a silent 0.
"""

from __future__ import annotations

import json
import re
import string
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from engine.config import UserError
from engine.rewards.checks import (
    check_types,
    column_of,
    extracted,
    last,
    optional,
    require,
    require_one,
    require_pattern,
)
from engine.rewards.contract import Sample

_PUNCTUATION = str.maketrans("", "", string.punctuation + "“”‘’«»¿¡…。，、！？；：（）")  # noqa: RUF001
_FENCED = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)
_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*([^{}]+?)\s*\}\s*\{\s*([^{}]+?)\s*\}")
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)"
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w.)\]])[-+]\s?\$?)?(?<![\w.])(?P<whole>{_DIGITS})(?:[eE](?P<exponent>[-+]?\d{{1,9}})(?!\w))?"
    rf"(?:\s?/\s?(?P<divisor>{_DIGITS})(?!\s?/))?(?P<percent>\s?%)?"
)
_MOST_EXPONENT = 400
_MOST_DIGITS = 1000


@dataclass(frozen=True)
class Exact:
    """1 if the response is the row's answer, or one of its list of accepted answers, once both are normalised; else 0.

    Raises, when called:
        KeyError, ValueError: the column is missing, empty, or an empty list.
    """

    column: str = "answer"
    """Holds the accepted answer (text, number, bool), or a list of them."""
    ignore_case: bool = True
    """Compare without upper and lower case."""
    ignore_whitespace: bool = True
    """Runs of whitespace count as one space, and none at the ends."""
    ignore_punctuation: bool = False
    """Leave out punctuation."""
    extract: str | None = None
    """Regular expression with one group; its last match in the response is compared instead of the whole response."""

    def __post_init__(self) -> None:
        check_types(self)
        require_pattern(self, "extract", groups=1)

    def __call__(self, sample: Sample) -> float:
        value = column_of(sample, self.column)
        accepted = value if isinstance(value, list | tuple) else [value]
        if not accepted or any(answer is None for answer in accepted):
            raise ValueError(f"the row's column {self.column!r} must hold an answer or a list of answers: {value!r}")
        answer = extracted(self.extract, sample.completion)
        return float(answer is not None and self._normal(answer) in {self._normal(str(each)) for each in accepted})

    def _normal(self, text: str) -> str:
        text = unicodedata.normalize("NFKC", text)
        text = text.casefold() if self.ignore_case else text
        text = text.translate(_PUNCTUATION) if self.ignore_punctuation else text
        return " ".join(text.split()) if self.ignore_whitespace else text


def _last_number(text: str, percent: bool) -> Fraction | None:
    r"""The last number of a text, exactly: 1,234.5 -3 6.02e23 3/4 \frac{3}{4} 12%; None without a readable one."""
    text = _FRACTION.sub(r"\1/\2", text).replace("−", "-").replace(r"\%", "%").replace("{,}", ",")  # noqa: RUF001
    found = last(_NUMBER.finditer(text))
    if found is None:
        return None
    exponent = int(found["exponent"] or 0)
    if abs(exponent) > _MOST_EXPONENT or len(found[0]) > _MOST_DIGITS:
        return None
    number = Fraction(found["whole"].replace(",", "")) * Fraction(10) ** exponent
    divisor = Fraction((found["divisor"] or "1").replace(",", ""))
    if divisor == 0:
        return None
    number = number / divisor / (100 if percent and found["percent"] else 1)
    return -number if (found["sign"] or "").startswith("-") else number


@dataclass(frozen=True)
class Numeric:
    r"""1 if the last number of the response is the row's, within a tolerance; else 0.

    Reads thousands separators (1,234.5), fractions (3/4, \frac{3}{4}), percentages and scientific notation, and
    compares exactly (as fractions) when the tolerances are 0. Mixed numbers (1 1/2) are read as their last part.

    Raises, when called:
        KeyError, ValueError: the column is missing, or holds no number.
    """

    column: str = "answer"
    """Holds the number, or text whose last number is the answer (`... #### 42`)."""
    tolerance: float = 1e-6
    """Largest absolute difference."""
    relative_tolerance: float = 0.0
    """Largest difference as a share of the row's number; the wider of the two tolerances counts."""
    extract: str | None = None
    """Regular expression with one group: look for the last number in the group of its last match."""
    percent: Literal["fraction", "ignore"] = "fraction"
    """50% is 0.5 ("fraction"), or 50 ("ignore")."""

    def __post_init__(self) -> None:
        check_types(self)
        require(self, self.tolerance >= 0, "tolerance", "must not be negative")
        require(self, self.relative_tolerance >= 0, "relative_tolerance", "must not be negative")
        require_pattern(self, "extract", groups=1)

    def __call__(self, sample: Sample) -> float:
        value = column_of(sample, self.column)
        gold = None if isinstance(value, bool) else self._read(str(value))
        if gold is None:
            raise ValueError(f"the row's column {self.column!r} holds no number: {value!r}")
        text = extracted(self.extract, sample.completion)
        number = None if text is None else self._read(text)
        if number is None:
            return 0.0
        allowed = max(Fraction(self.tolerance), Fraction(self.relative_tolerance) * abs(gold))
        return float(abs(number - gold) <= allowed)

    def _read(self, text: str) -> Fraction | None:
        return _last_number(text, percent=self.percent == "fraction")


@dataclass(frozen=True)
class Regex:
    """1 if the response matches a regular expression (Python's `re`), else 0.

    Raises, when called:
        KeyError, ValueError: the column is missing, or holds no regular expression.
    """

    pattern: str | None = None
    """The regular expression; flags are written inside it: `(?is)...`."""
    column: str | None = None
    """Column that holds it, instead of `pattern`."""
    match: Literal["search", "full"] = "search"
    """It occurs somewhere, or is all of the response (whitespace at the ends left out)."""

    def __post_init__(self) -> None:
        check_types(self)
        require_one(self, "pattern", "column")
        require_pattern(self, "pattern")

    def __call__(self, sample: Sample) -> float:
        pattern: Any = self.pattern if self.column is None else column_of(sample, self.column)
        try:
            compiled: re.Pattern[str] = re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"the row's column {self.column!r}: {pattern!r} is no pattern: {error}") from None
        text = sample.completion
        return float(bool(compiled.fullmatch(text.strip()) if self.match == "full" else compiled.search(text)))


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


@dataclass(frozen=True)
class JsonSchema:
    """1 if the response is JSON that satisfies a JSON Schema, `partial` if it is JSON that does not, 0 if it is none.

    Read is the last fenced block, or the whole response if there is none. A `$ref` into the network is never followed.

    Raises, when called:
        KeyError, ValueError: the column is missing or holds no schema; a `$ref` leads nowhere.
    """

    schema: Mapping[str, Any] | None = None
    """The schema; its `$schema` says which draft it is, default 2020-12."""
    column: str | None = None
    """Column that holds the schema, as a mapping or as JSON text, instead of `schema`."""
    partial: float = 0.0
    """Reward of valid JSON that does not satisfy the schema."""

    def __post_init__(self) -> None:
        check_types(self)
        optional("jsonschema", "jsonschema", "json_schema")
        require_one(self, "schema", "column")
        if self.schema is not None:
            try:
                self._validator(self.schema)
            except ValueError as error:
                raise UserError(f"reward json_schema: schema: {error}") from None

    def __call__(self, sample: Sample) -> float:
        import referencing.exceptions

        schema = self.schema if self.column is None else column_of(sample, self.column)
        validator = self._validator(schema)
        blocks = _FENCED.findall(sample.completion)
        try:
            value = json.loads(blocks[-1] if blocks else sample.completion, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            return 0.0
        try:
            return 1.0 if validator.is_valid(value) else float(self.partial)
        except referencing.exceptions.Unresolvable as error:
            raise ValueError(f"the schema's $ref leads nowhere: {error}") from None

    def _validator(self, schema: Any) -> Any:
        import jsonschema
        import referencing

        where = "the schema" if self.column is None else f"the row's column {self.column!r}"
        try:
            read = json.loads(schema) if isinstance(schema, str) else schema
        except ValueError as error:
            raise ValueError(f"{where} is not JSON: {error}") from None
        if not isinstance(read, Mapping):
            raise ValueError(f"{where} is no schema but a {type(read).__name__}")
        kind = jsonschema.validators.validator_for(read, default=jsonschema.Draft202012Validator)
        try:
            kind.check_schema(read)
        except jsonschema.SchemaError as error:
            raise ValueError(f"{where} is not a valid schema: {error.message} at {error.json_path}") from None
        return kind(read, registry=referencing.Registry())


@dataclass(frozen=True)
class Choice:
    r"""1 if the letter that the response chooses is the row's, else 0.

    Looked for, in this order, the last of its kind: `\boxed{B}`; "answer/choice/option (is) (:) B"; a response or a
    last line that is or begins with the letter ("B", "(b)", "**B.** Paris"); one letter in brackets, if no other is.
    The "A" and "I" of prose ("the answer is a bit ...") are not letters, nor is one of several ("A or B").

    Raises, when called:
        KeyError, ValueError: the column is missing, or names no choice.
    """

    column: str = "answer"
    """Holds the letter ("B", "(b)"), or the choice's number (1, "1")."""
    choices: int = 10
    """There are this many choices, A, B, C ...; at most 26."""
    first_index: int = 0
    """The number of choice A, where the column holds numbers."""

    def __post_init__(self) -> None:
        check_types(self)
        require(self, 2 <= self.choices <= 26, "choices", "must be 2 to 26")

    def __call__(self, sample: Sample) -> float:
        return float(self._chosen(sample.completion) == self._gold(column_of(sample, self.column)))

    def _gold(self, value: Any) -> str:
        letters = string.ascii_uppercase[: self.choices]
        text = str(value).strip().strip("().[]").upper()
        if re.fullmatch(r"-?\d{1,9}", text) and not isinstance(value, bool):
            place = int(text) - self.first_index
            if 0 <= place < self.choices:
                return letters[place]
        elif len(text) == 1 and text in letters:
            return text
        raise ValueError(f"the row's column {self.column!r} names none of the choices {letters}: {value!r}")

    def _chosen(self, text: str) -> str | None:
        upper = f"[A-{string.ascii_uppercase[self.choices - 1]}]"
        either = f"[{upper[1:-1]}{upper[1:-1].lower()}]"
        boxed = re.findall(rf"\\boxed\s*{{\s*(?:\\(?:text|mathrm|textbf|mathbf)\s*{{)?\s*\(?({either})\b", text)
        if boxed:
            return str(boxed[-1]).upper()
        several = rf"(?!\W*(?:\s(?:or|and)\s|[,/&])\W*{upper}\b)"
        prose = r"(?!(?<=[AI])\s+(?!because\b|since\b|as\b)[a-z])"
        stated = re.findall(
            rf"(?i:\b(?:answer|choice|option)\b)[\s*_]*(?i:\bis\b)?[\s*_:=]*(?i:\b(?:option|choice)\b)?[\s*_$]*"
            rf"(?:[(\[]\s*({either})\s*[)\]]|({upper})(?![\w'’]){prose}){several}",  # noqa: RUF001
            text,
        )
        if stated:
            return (stated[-1][0] or stated[-1][1]).upper()
        lines = [line for line in text.splitlines() if line.strip()]
        line = lines[-1].strip() if lines else ""
        alone = re.fullmatch(rf"[\s*_(\[$]*({either})[\s*_)\].:$]*", line)
        leading = re.match(rf"[*_(\[]*({upper})(?:[).:\]]|\*\*)[*_]*\s{several}", line)
        if found := alone or leading:
            return found[1].upper()
        bracketed = {letter.upper() for letter in re.findall(rf"[(\[]({either})[)\]]", text)}
        return bracketed.pop() if len(bracketed) == 1 else None
