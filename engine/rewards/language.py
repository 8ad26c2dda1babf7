"""The language of a text, by langdetect, and the verifier of it."""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.rewards.checks import check_types, column_of, optional, require, require_one
from engine.rewards.contract import Sample

_loading = threading.Lock()


@functools.cache
def _language_factory() -> Any:
    langdetect = optional("langdetect", "langdetect", "language")
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
        check_types(self)
        require_one(self, "language", "column")
        known = known_languages()
        if self.language is not None:
            require(self, _is_known(self.language, known), "language", f"must be one of {', '.join(known)}")

    def __call__(self, sample: Sample) -> float:
        wanted = self.language if self.column is None else str(column_of(sample, self.column))
        assert wanted is not None
        if not _is_known(wanted, known_languages()):
            raise ValueError(f"the row's column {self.column!r} names no known language: {wanted!r}")
        return float(is_language(detect_language(sample.completion), wanted))


def _is_known(code: str, known: Sequence[str]) -> bool:
    return any(is_language(each, code) for each in known)
