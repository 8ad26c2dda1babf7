"""Rewards that check a response by a rule: against an answer in the row, a form, a length, a language, a task.

Each is a frozen dataclass. Its fields are the entry's `arguments`; calling it with a sample gives the reward. A
response that cannot be read scores as wrong; a row that cannot be read (no such column, no number where one is due, a
gold answer that does not parse) is an error that says so, never a silent 0. Optional libraries are imported when the
reward that needs them is made.
"""

from __future__ import annotations

import ast
import ctypes
import functools
import importlib
import json
import math
import re
import string
import threading
import unicodedata
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from engine.config import UserError
from engine.rewards.contract import Sample

T = TypeVar("T")

_PUNCTUATION = str.maketrans("", "", string.punctuation + "“”‘’«»¿¡…。，、！？；：（）")  # noqa: RUF001
_FENCED = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)
_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*([^{}]+?)\s*\}\s*\{\s*([^{}]+?)\s*\}")
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)"
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w.)\]])[-+]\s?\$?)?(?<![\w.])(?P<whole>{_DIGITS})(?:[eE](?P<exponent>[-+]?\d{{1,9}})(?!\w))?"
    rf"(?:\s?/\s?(?P<divisor>{_DIGITS})(?!\s?/))?(?P<percent>\s?%)?"
)
_EVALUATES_LITERALS = {"string_insertion", "spiral_matrix", "binary_matrix", "n_queens"}
_EVALUATES_EXPRESSIONS = {
    "simple_integration",
    "intermediate_integration",
    "polynomial_multiplication",
    "puzzle24",
    "countdown",
}
_FUNCTIONS = {
    *[
        "sin",
        "cos",
        "tan",
        "sec",
        "csc",
        "cot",
        "asin",
        "acos",
        "atan",
        "sinh",
        "cosh",
        "tanh",
        "exp",
        "log",
        "ln",
        "sqrt",
        "Abs",
    ]
}
_MOST_EXPONENT = 400
_MOST_DIGITS = 1000


def _check_types(verifier: Any) -> None:
    """Raise UserError for the first field whose value is not of its annotated type."""
    hints = get_type_hints(type(verifier))
    for each in fields(verifier):
        value, allowed = getattr(verifier, each.name), hints[each.name]
        choices = get_args(allowed) if "Literal" in str(allowed) else ()
        if choices:
            _require(verifier, value in choices, each.name, f"must be one of {', '.join(map(str, choices))}")
        elif allowed is float:
            if isinstance(value, str) and re.fullmatch(
                r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value
            ):  # YAML reads 1e-6 as text
                value = float(value)
                object.__setattr__(verifier, each.name, value)
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            _require(verifier, number, each.name, "must be a finite number")
        elif allowed is bool or isinstance(allowed, type):
            right = isinstance(value, allowed) and (allowed is bool or not isinstance(value, bool))
            _require(verifier, right, each.name, f"must be a {allowed.__name__}")


def _require(verifier: Any, holds: bool, name: str, must: str) -> None:
    if not holds:
        where = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(verifier).__name__).lower()
        raise UserError(f"reward {where}: {name}={getattr(verifier, name)!r}: {must}")


def _require_one(verifier: Any, given: str, column: str) -> None:
    both = [getattr(verifier, name) is not None for name in (given, column)]
    _require(verifier, sum(both) == 1, given, f"give either {given} or {column}, the name of a column that holds it")


def _require_pattern(verifier: Any, name: str, groups: int | None = None) -> None:
    pattern = getattr(verifier, name)
    if pattern is None:
        return
    _require(verifier, isinstance(pattern, str), name, "must be a regular expression, as text")
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"reward {type(verifier).__name__.lower()}: {name}={pattern!r}: {error}") from None
    if groups is not None:
        _require(verifier, compiled.groups == groups, name, f"must have {groups} group, the part that is the answer")


def _optional(module: str, package: str, reward: str) -> Any:
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


def _column(sample: Sample, name: str) -> Any:
    """The row's value.

    Raises:
        KeyError: no such column.
        ValueError: it is empty (None).
    """
    value = sample.row[name]
    if value is None:
        raise ValueError(f"the row's column {name!r} is empty (None)")
    return value


def _extracted(pattern: str | None, text: str) -> str | None:
    """The group of the pattern's last match, all of the text without a pattern, None without a match."""
    if pattern is None:
        return text
    found = _last(re.finditer(pattern, text, re.DOTALL))
    return None if found is None else (found[1] or "")


def _last(matches: Iterator[re.Match[str]]) -> re.Match[str] | None:
    return next(iter(deque(matches, maxlen=1)), None)


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
        _check_types(self)
        _require_pattern(self, "extract", groups=1)

    def __call__(self, sample: Sample) -> float:
        value = _column(sample, self.column)
        accepted = value if isinstance(value, list | tuple) else [value]
        if not accepted or any(answer is None for answer in accepted):
            raise ValueError(f"the row's column {self.column!r} must hold an answer or a list of answers: {value!r}")
        answer = _extracted(self.extract, sample.completion)
        return float(answer is not None and self._normal(answer) in {self._normal(str(each)) for each in accepted})

    def _normal(self, text: str) -> str:
        text = unicodedata.normalize("NFKC", text)
        text = text.casefold() if self.ignore_case else text
        text = text.translate(_PUNCTUATION) if self.ignore_punctuation else text
        return " ".join(text.split()) if self.ignore_whitespace else text


def _last_number(text: str, percent: bool) -> Fraction | None:
    r"""The last number of a text, exactly: 1,234.5 -3 6.02e23 3/4 \frac{3}{4} 12%; None without a readable one."""
    text = _FRACTION.sub(r"\1/\2", text).replace("−", "-").replace(r"\%", "%").replace("{,}", ",")  # noqa: RUF001
    found = _last(_NUMBER.finditer(text))
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
        _check_types(self)
        _require(self, self.tolerance >= 0, "tolerance", "must not be negative")
        _require(self, self.relative_tolerance >= 0, "relative_tolerance", "must not be negative")
        _require_pattern(self, "extract", groups=1)

    def __call__(self, sample: Sample) -> float:
        value = _column(sample, self.column)
        gold = None if isinstance(value, bool) else self._read(str(value))
        if gold is None:
            raise ValueError(f"the row's column {self.column!r} holds no number: {value!r}")
        text = _extracted(self.extract, sample.completion)
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
        _check_types(self)
        _require_one(self, "pattern", "column")
        _require_pattern(self, "pattern")

    def __call__(self, sample: Sample) -> float:
        pattern: Any = self.pattern if self.column is None else _column(sample, self.column)
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
        _check_types(self)
        _optional("jsonschema", "jsonschema", "json_schema")
        _require_one(self, "schema", "column")
        if self.schema is not None:
            try:
                self._validator(self.schema)
            except ValueError as error:
                raise UserError(f"reward json_schema: schema: {error}") from None

    def __call__(self, sample: Sample) -> float:
        import referencing.exceptions

        schema = self.schema if self.column is None else _column(sample, self.column)
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
        _check_types(self)
        _require(self, 2 <= self.choices <= 26, "choices", "must be 2 to 26")

    def __call__(self, sample: Sample) -> float:
        return float(self._chosen(sample.completion) == self._gold(_column(sample, self.column)))

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


@dataclass(frozen=True)
class Length:
    """1 if the response's length is within bounds, falling linearly to 0 outside them."""

    minimum: int = 0
    """Shortest, in `unit`."""
    maximum: int | None = None
    """Longest, in `unit`; None: no bound."""
    unit: Literal["tokens", "words", "characters"] = "tokens"
    """What is counted; words are separated by whitespace."""
    falloff: int | None = None
    """Distance beyond a bound, in `unit`, at which the reward is 0; None: as large as that bound."""

    def __post_init__(self) -> None:
        _check_types(self)
        for name in ("maximum", "falloff"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
            _require(self, value is None or whole, name, "must be a whole number above 0, or null")
        _require(self, self.minimum >= 0, "minimum", "must not be negative")
        _require(self, self.maximum is None or self.minimum <= self.maximum, "maximum", "is below minimum")
        _require(self, self.maximum is not None or self.minimum > 0, "maximum", "give a maximum or a minimum above 0")

    def __call__(self, sample: Sample) -> float:
        text = sample.completion
        counts = {"tokens": sample.num_tokens, "characters": len(text), "words": len(text.split())}
        length = counts[self.unit]
        bound = self.minimum if length < self.minimum else self.maximum
        if bound is None or self.minimum <= length <= bound:
            return 1.0
        return max(0.0, 1.0 - abs(length - bound) / (self.falloff or bound))


@dataclass(frozen=True)
class Repetition:
    """-(1 - distinct n-grams / all n-grams) * scale: 0 without repetition, towards -scale where all is repeated.

    The penalty of arXiv:2502.03373 (section on reward hacking), as a ratio over the whole response. A response shorter
    than one n-gram scores 0.
    """

    size: int = 3
    """n, in `unit`."""
    scale: float = 1.0
    """The most that can be lost."""
    unit: Literal["words", "tokens", "characters"] = "words"
    """What n-grams are made of; for languages without spaces choose tokens or characters."""

    def __post_init__(self) -> None:
        _check_types(self)
        _require(self, self.size >= 1, "size", "must be 1 or more")
        _require(self, self.scale > 0, "scale", "must be above 0")

    def __call__(self, sample: Sample) -> float:
        pieces: Sequence[Any] = sample.completion.lower().split()
        if self.unit != "words":
            pieces = sample.completion_ids if self.unit == "tokens" else sample.completion
        ngrams = [tuple(pieces[start : start + self.size]) for start in range(len(pieces) - self.size + 1)]
        return -self.scale * (1 - len(set(ngrams)) / len(ngrams)) if ngrams else 0.0


_loading = threading.Lock()


@functools.cache
def _language_factory() -> Any:
    langdetect = _optional("langdetect", "langdetect", "language")
    factory = langdetect.DetectorFactory()
    factory.load_profile(langdetect.PROFILES_DIRECTORY)
    factory.seed = 0  # it samples: the same text must get the same answer
    return factory


def known_languages() -> list[str]:
    """Codes that `detect_language` can give (ISO 639-1; zh-cn and zh-tw).

    Raises:
        UserError: langdetect is not installed.
    """
    with _loading:
        return sorted(_language_factory().get_lang_list())


def detect_language(text: str) -> str | None:
    """The most likely language of a text, always the same for the same text; None if it has no letters.

    Raises:
        UserError: langdetect is not installed.
    """
    with _loading:
        factory = _language_factory()
    detector = factory.create()
    detector.append(text)
    langdetect = importlib.import_module("langdetect")
    try:
        return str(detector.detect())
    except langdetect.LangDetectException:
        return None


def is_language(detected: str | None, wanted: str) -> bool:
    """Whether a detected language is the wanted one; "zh" is any Chinese."""
    return detected is not None and wanted.lower() in (detected, detected.partition("-")[0])


@dataclass(frozen=True)
class Language:
    """1 if the response is in a language, as langdetect sees it, else 0; a response without letters is in none.

    Detection is by letter n-grams: unreliable below some 20 characters, and for code.

    Raises, when called:
        KeyError, ValueError: the column is missing, or names no known language.
    """

    language: str | None = None
    """ISO 639-1 code: en, de, zh (either script), zh-cn, zh-tw ..."""
    column: str | None = None
    """Column that holds the code, instead of `language`."""

    def __post_init__(self) -> None:
        _check_types(self)
        _require_one(self, "language", "column")
        known = known_languages()
        if self.language is not None:
            _require(self, _is_known(self.language, known), "language", f"must be one of {', '.join(known)}")

    def __call__(self, sample: Sample) -> float:
        wanted = self.language if self.column is None else str(_column(sample, self.column))
        assert wanted is not None
        if not _is_known(wanted, known_languages()):
            raise ValueError(f"the row's column {self.column!r} names no known language: {wanted!r}")
        return float(is_language(detect_language(sample.completion), wanted))


def _is_known(code: str, known: Sequence[str]) -> bool:
    return any(is_language(each, code) for each in known)


@dataclass(frozen=True)
class XmlFormat:
    """1 if the response is exactly these tags in order, each once, with text inside and nothing outside; else 0.

    With `partial`, each tag that opens and closes once around some text earns 1 / (tags + 1), and so does the order
    with nothing outside.
    """

    tags: Sequence[str] = ("think", "answer")
    """Names, without brackets, in order."""
    partial: bool = False
    """Give partial credit."""
    prefilled: bool = False
    """The prompt ends with the first opening tag, so the response begins inside it."""

    def __post_init__(self) -> None:
        _check_types(self)
        right = isinstance(self.tags, list | tuple) and all(
            isinstance(tag, str) and re.fullmatch(r"[A-Za-z_][\w.-]*", tag) for tag in self.tags
        )
        _require(self, right and len(self.tags) > 0, "tags", "must be a list of tag names, e.g. [think, answer]")
        _require(self, len(set(self.tags)) == len(self.tags), "tags", "must not name a tag twice")

    def __call__(self, sample: Sample) -> float:
        text = (f"<{self.tags[0]}>" if self.prefilled else "") + sample.completion
        good = [
            text.count(f"<{tag}>") == 1
            and text.count(f"</{tag}>") == 1
            and re.search(rf"<{tag}>.*?\S.*?</{tag}>", text, re.DOTALL) is not None
            and re.search(rf"<{tag}>\s*</{tag}>", text) is None
            for tag in self.tags
        ]
        whole = r"\s*".join(rf"<{tag}>.*?</{tag}>" for tag in self.tags)
        in_order = all(good) and re.fullmatch(rf"\s*{whole}\s*", text, re.DOTALL) is not None
        if not self.partial:
            return float(in_order)
        return (sum(good) + in_order) / (len(self.tags) + 1)


class _OutOfTimeError(BaseException):
    """Raised inside a computation; not an Exception, which the libraries in between would swallow."""


def _within(seconds: float, work: Callable[[], T]) -> T:
    """The result of some Python code that is interrupted after some seconds, in any thread (unlike by a signal).

    A single long operation in C, such as a huge power, ends first: for that is `rewards.timeout`, which ends the
    process.

    Raises:
        TimeoutError: the time ran out.
    """
    thread = ctypes.c_ulong(threading.get_ident())
    lock = threading.Lock()
    finished = False

    def interrupt() -> None:
        with lock:
            if not finished:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(_OutOfTimeError))

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    try:
        timer.start()
        try:
            return work()
        finally:
            with lock:
                finished = True
            timer.cancel()
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, None)  # if it is on its way, it must not strike later
    except _OutOfTimeError:
        raise TimeoutError(f"no verdict within {seconds} s; raise `arguments: {{seconds: ...}}`") from None


@dataclass(frozen=True)
class Math:
    r"""1 if the response's final expression equals the row's (math-verify), else 0.

    The last `\boxed{...}` counts first, then other LaTeX, then plain numbers; a response without any scores 0.

    Raises, when called:
        KeyError, ValueError: the column is missing, or its expression does not parse.
        TimeoutError: no verdict in time.
    """

    column: str = "answer"
    r"""Holds the gold LaTeX or expression: `\frac{1}{2}`, `$x^2$`, `(1, 2)`, `0.5`, or a number."""
    seconds: float = 5.0
    """Time for reading and comparing one response."""
    digits: int = 6
    """Decimal places that numbers are rounded to before they are compared."""

    def __post_init__(self) -> None:
        _check_types(self)
        _optional("math_verify", "math-verify", "math")
        _require(self, self.seconds > 0, "seconds", "must be above 0")
        _require(self, self.digits >= 0, "digits", "must not be negative")

    def __call__(self, sample: Sample) -> float:
        import math_verify

        gold = _column(sample, self.column)
        boxed_first = math_verify.LatexExtractionConfig(boxed_match_priority=0)

        def verdict() -> bool:
            expected = _gold_expression(str(gold))
            if not expected:
                raise ValueError(f"the row's column {self.column!r} does not parse as mathematics: {gold!r}")
            given = math_verify.parse(
                sample.completion,
                extraction_config=[boxed_first, math_verify.ExprExtractionConfig()],
                fallback_mode="no_fallback",
                parsing_timeout=None,  # its own is a signal, which only the main thread may use
            )
            return math_verify.verify(expected, given, float_rounding=self.digits, timeout_seconds=None)

        return float(_within(self.seconds, verdict))


def _gold_expression(text: str) -> list[Any]:
    """Parsed; empty if it cannot be. Bare LaTeX is read as if it stood between dollar signs."""
    import math_verify

    marked = any(mark in text for mark in ("$", r"\boxed", r"\(", r"\["))
    latex = text if marked else f"${text.replace('**', '^')}$"
    return list(math_verify.parse(latex, fallback_mode="no_fallback", parsing_timeout=None))


def reasoning_gym_rows(
    task: str, size: int = 500, seed: int = 0, config: Mapping[str, Any] | None = None
) -> Iterator[dict[str, Any]]:
    """Rows of a reasoning-gym task, a data source: `path: engine.rewards.verifiers:reasoning_gym_rows`.

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
    gym = _optional("reasoning_gym", "reasoning-gym", "reasoning_gym")
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
        _check_types(self)
        _optional("reasoning_gym", "reasoning-gym", "reasoning_gym")
        _require_pattern(self, "extract", groups=1)

    def __call__(self, sample: Sample) -> float:
        held = _column(sample, self.column)
        try:
            entry = json.loads(held, object_hook=_from_json)
            task, config, item = entry["task"], entry["config"], entry["item"]
        except (TypeError, ValueError, KeyError):
            raise ValueError(
                f"the row's column {self.column!r} is no entry of reasoning_gym_rows: {str(held)[:80]!r}"
            ) from None
        answer = _extracted(self.extract, sample.completion)
        if answer is None or not _harmless(item["metadata"].get("source_dataset", task), answer.strip()):
            return 0.0
        return float(_reasoning_gym_dataset(task, json.dumps(config)).score_answer(answer.strip(), item))
