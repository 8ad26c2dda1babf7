"""The verifier of mathematics, by math-verify, with a deadline that works in any thread."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from engine.rewards.checks import check_types, column_of, optional, require
from engine.rewards.contract import Sample

T = TypeVar("T")


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
        check_types(self)
        optional("math_verify", "math-verify", "math")
        require(self, self.seconds > 0, "seconds", "must be above 0")
        require(self, self.digits >= 0, "digits", "must not be negative")

    def __call__(self, sample: Sample) -> float:
        import math_verify

        gold = column_of(sample, self.column)
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
