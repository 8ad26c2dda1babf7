"""A reward for programs: the response's code runs in the sandbox against the row's tests.

Three forms of tests are read, as public data sets have them:

    ["assert f(1) == 2", ...]                      statements (MBPP); one text of such statements is one test
    {"inputs": [...], "outputs": [...]}            stdin and stdout, or with `fn_name` arguments and results (APPS,
    [{"input": ..., "output": ...}, ...]           LiveCodeBench); also as JSON text
    "def check(candidate): ..." + entry point      a test program (HumanEval)

A solution is after the reward, so it never shares a process with what judges it: outputs are compared in the caller,
and statements run in a process of their own that calls the solution over a pipe and gets plain data back
(`code_child`). `sys.exit(0)`, a printed verdict, an `==` that always holds, a changed builtin, a look for the tests:
none reaches it. What remains: a solution may know public tests by heart, and a name that a test uses but neither
defines nor imports, and that Python lacks, is the solution's word.
"""

from __future__ import annotations

import functools
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Literal

from engine.config import UserError
from engine.rewards.contract import Sample
from engine.rewards.sandbox import Limits, check_limits, run_program

_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([^\s`]*)[^`]*$")
_PYTHON = {"python", "python3", "py", ""}


class TestsError(ValueError):
    """The row's tests cannot be used; nothing is said about the response."""

    __test__ = False  # for pytest


@dataclass(frozen=True)
class Tests:
    """A row's tests in one form: either stdin and stdout, or calls, or programs."""

    __test__ = False  # for pytest

    streams: tuple[tuple[str, str], ...] = ()
    """What goes in, and what is to come out."""
    calls: tuple[tuple[list[Any], Any], ...] = ()
    """Arguments, and the result, for `function`."""
    programs: tuple[str, ...] = ()
    """Each fails by raising. With `function`, each defines `check`, which is called with it."""
    function: str = ""
    """Name of the function under test; "" if the tests call it themselves."""

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.streams) + len(self.calls) + len(self.programs)


@dataclass(frozen=True)
class Code:
    """Share of the tests that the response's program passes, or 1 for all and else 0.

    The program is the last fenced block that is Python (or names no language), or all of a response without fences. A
    response without code has 0. Where the sandbox fails or the tests cannot be read, the reward is an error, never 0.
    """

    column: str = "tests"
    """Column with the tests."""
    entry_point: str = "entry_point"
    """Column with the name of the function that `check` is called with; only for test programs."""
    setup: str = "test_setup_code"
    """Column with code that runs before the tests, in their process; a row may lack it."""
    preamble: str | None = None
    """Column with text that is put before the response's code: `prompt` for HumanEval, for its imports and helpers."""
    score: Literal["all", "fraction"] = "all"
    """all: 1 if every test passes, else 0, and the first failure ends it; fraction: tests passed / tests."""
    seconds: float = 10.0
    """For one stdin, or for all calls and statements of a row together; those not reached have failed."""
    memory_mb: int = 512
    """Of one run."""
    allow_weaker: bool = False
    """Run on a machine that lacks a layer of the sandbox; see `Limits.allow_weaker`."""

    def __post_init__(self) -> None:
        if self.score not in ("all", "fraction"):
            raise UserError(f"reward code: score={self.score!r}: must be all or fraction")
        check_limits(self._limits)

    def __call__(self, sample: Sample) -> float:
        """The reward, 0 to 1.

        Raises:
            KeyError: the row lacks the column.
            TestsError: its tests have none of the forms, or do not compile.
            SandboxError: the sandbox could not be put up.
        """
        tests = read_tests(sample.row[self.column], str(sample.row.get(self.entry_point) or ""))
        code = extract_code(sample.completion)
        if code is None:
            return 0.0
        if self.preamble is not None:
            code = f"{sample.row[self.preamble]}\n\n{code}"
        if tests.streams:
            passed = self._passed_streams(code, tests)
        else:
            passed = self._passed_calls(code, tests, _joined(sample.row.get(self.setup)))
        return passed / tests.count if self.score == "fraction" else float(passed == tests.count)

    @property
    def _limits(self) -> Limits:
        return Limits(
            wall_seconds=self.seconds,
            cpu_seconds=self.seconds,
            memory_bytes=self.memory_mb << 20,
            output_bytes=8 << 20,
            allow_weaker=self.allow_weaker,
        )

    def _passed_streams(self, code: str, tests: Tests) -> int:
        passed = 0
        for given, expected in tests.streams:
            outcome = run_program(code, stdin=given, limits=self._limits)
            if outcome.kind == "ok" and same_output(outcome.stdout, expected):
                passed += 1
            elif self.score == "all":
                break
        return passed

    def _passed_calls(self, code: str, tests: Tests, setup: str) -> int:
        token = secrets.token_hex(16)
        told = {"token": token, "setup": setup, "function": tests.function, "stop": self.score == "all"}
        told |= {"calls": tests.calls, "programs": tests.programs}
        outcome = run_program(_child(), stdin=json.dumps(told), limits=self._limits, files={"solution.py": code})
        verdicts = [verdict for line in outcome.stdout.splitlines() if (verdict := _verdict(line, token))]
        broken = next((verdict["broken"] for verdict in verdicts if "broken" in verdict), None)
        if broken is not None:
            raise TestsError(f"column {self.column!r}: the tests do not compile: {broken}")
        return sum(verdict["passed"] for verdict in verdicts)


def extract_code(text: str) -> str | None:
    """The last fenced block of a response that is Python or names no language; without fences, all of it; else None.

    A block that names Python comes before one that names nothing. A block that the response's end cuts off counts.
    """
    blocks: list[tuple[str, list[str]]] = []
    fence = ""
    for line in text.splitlines():
        match = _FENCE.match(line)
        if match and not fence:
            fence = match[1]
            blocks.append((match[2].lower(), []))
        elif match and match[1].startswith(fence) and not match[2]:
            fence = ""
        elif fence:
            blocks[-1][1].append(line)
    if not blocks:
        return text if text.strip() else None
    found = [(bool(language), "\n".join(lines)) for language, lines in blocks if language in _PYTHON]
    found = [block for block in found if block[1].strip()]
    return max(reversed(found), key=lambda block: block[0])[1] if found else None


def read_tests(value: Any, entry_point: str = "") -> Tests:
    """A column of tests in one of the forms above.

    Raises:
        TestsError: it has none of them, is empty, or needs an entry point that is not there.
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise TestsError(f"the tests look like JSON but are not: {error}") from None
    if isinstance(value, str) and value.strip():
        if not re.search(r"^def check\(", value, re.MULTILINE):
            return Tests(programs=(value,))
        if not entry_point:
            raise TestsError("the tests define check(candidate), but the row names no function in its entry point")
        return Tests(programs=(value,), function=entry_point)
    if isinstance(value, Mapping) and "inputs" in value and "outputs" in value:
        return _pairs(value["inputs"], value["outputs"], str(value.get("fn_name") or ""))
    if isinstance(value, Sequence) and value and not isinstance(value, str | bytes):
        if all(isinstance(test, str) for test in value):
            return Tests(programs=tuple(value))
        if all(isinstance(test, Mapping) and {"input", "output"} <= set(test) for test in value):
            name = str(value[0].get("fn_name") or "")
            if not name and any(test.get("testtype") == "functional" for test in value):
                name = entry_point
            return _pairs([test["input"] for test in value], [test["output"] for test in value], name)
    raise TestsError(
        f"the tests are {str(value)[:80]!r}; they must be a list of assert statements, inputs and outputs, or a "
        "program that defines check(candidate)"
    )


def _pairs(inputs: Sequence[Any], outputs: Sequence[Any], function: str) -> Tests:
    if not inputs or len(inputs) != len(outputs):
        raise TestsError(f"the tests have {len(inputs)} inputs for {len(outputs)} outputs")
    if not function:
        return Tests(streams=tuple((_joined(a), _joined(b)) for a, b in zip(inputs, outputs, strict=True)))
    calls = []
    for arguments, result in zip(inputs, outputs, strict=True):
        try:
            if isinstance(arguments, str):  # LiveCodeBench: an argument a line
                arguments = [json.loads(line) for line in arguments.splitlines()]
                result = json.loads(result)
        except (json.JSONDecodeError, TypeError) as error:
            raise TestsError(f"arguments or result of {function} are not JSON: {error}") from None
        if not isinstance(arguments, Sequence):
            raise TestsError(f"the arguments of {function} must be a list, not {arguments!r}")
        calls.append((list(arguments), result))
    return Tests(calls=tuple(calls), function=function)


def _joined(text: Any) -> str:
    """Text, or a list of lines; "" for None."""
    if text is None or isinstance(text, str):
        return text or ""
    return "\n".join(map(str, text)) if isinstance(text, Sequence) else str(text)


def same_output(got: str, expected: str) -> bool:
    """The same lines but for blanks at their ends and empty lines at the end; numbers may be written otherwise."""
    left, right = ([line.rstrip() for line in text.rstrip().splitlines()] for text in (got, expected))
    if left == right:
        return True
    words = [[line.split() for line in lines] for lines in (left, right)]
    if [len(line) for line in words[0]] != [len(line) for line in words[1]]:
        return False
    pairs = [pair for lines in zip(*words, strict=True) for pair in zip(*lines, strict=True)]
    return all(a == b or _equal_numbers(a, b) for a, b in pairs)


def _equal_numbers(left: str, right: str) -> bool:
    try:
        return Decimal(left) == Decimal(right)
    except InvalidOperation:
        return False


def _verdict(line: str, token: str) -> dict[str, Any] | None:
    """What the tests' process said; None for anything else."""
    try:
        verdict = json.loads(line)
    except ValueError:
        return None
    return verdict if isinstance(verdict, dict) and verdict.get("token") == token else None


@functools.cache
def _child() -> str:
    return Path(__file__).with_name("code_child.py").read_text(encoding="utf-8")
