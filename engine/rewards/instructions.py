"""Instructions that a program can check: the 25 kinds of IFEval (arXiv:2311.07911).

A row carries `instruction_id_list` (names such as `length_constraints:number_words`) and `kwargs` (for each its
arguments), exactly as in the public data set; arguments that are None are left out, as its columnar form has them.

Where we differ from the paper's own program, on purpose: what it would fill in at random (an argument that the row
does not give) is an error; a letter to count may be any character ("#"), not only a to z; keywords, section marks and
postscript marks are plain text, never patterns; `zh` is any Chinese. Sentences and words in capitals are counted by
rule rather than by NLTK's trained tokenizers, so that counts can differ where a text is full of abbreviations.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from engine.config import UserError
from engine.rewards.contract import Sample
from engine.rewards.language import detect_language, is_language, known_languages

Arguments = Mapping[str, Any]

_ABBREVIATION = re.compile(r"(?:\b(?:[A-Za-z]|Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|Inc|Ltd|Co|approx|No)|[ei]\.[eg])\.$")
_SENTENCE_END = re.compile(r"[.!?。！？]+[\"'”’)\]]*(?=\s|$)|[。！？]")  # noqa: RUF001
_POSTSCRIPTS = {"p.s.": r"p\.\s?s\.", "p.p.s": r"p\.\s?p\.\s?s"}
_OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def count_sentences(text: str) -> int:
    """Sentences, which end in . ! ? (or their CJK forms) and whitespace; a period after an abbreviation ends none."""
    count, start = 0, 0
    for end in _SENTENCE_END.finditer(text):
        piece = text[start : end.end()]
        if end[0] == "." and end.end() < len(text.rstrip()) and _ABBREVIATION.search(piece):
            continue
        count += bool(re.search(r"\w", piece))
        start = end.end()
    return count + bool(re.search(r"\w", text[start:]))


def _compared(count: int, relation: str, threshold: int) -> bool:
    if relation not in ("less than", "at least"):
        raise ValueError(f"relation {relation!r}: must be 'less than' or 'at least'")
    return count < threshold if relation == "less than" else count >= threshold


def _occurrences(keyword: str, text: str) -> int:
    return len(re.findall(re.escape(keyword.strip()), text, re.IGNORECASE))


def _in_english(text: str) -> bool:
    return detect_language(text) in ("en", None)


def _keywords_exist(text: str, given: Arguments) -> bool:
    return all(_occurrences(keyword, text) for keyword in given["keywords"])


def _keyword_frequency(text: str, given: Arguments) -> bool:
    return _compared(_occurrences(given["keyword"], text), given["relation"], given["frequency"])


def _forbidden_words(text: str, given: Arguments) -> bool:
    words = (re.escape(word.strip()) for word in given["forbidden_words"])
    return not any(re.search(rf"(?<!\w){word}(?!\w)", text, re.IGNORECASE) for word in words)


def _letter_frequency(text: str, given: Arguments) -> bool:
    return _compared(text.lower().count(given["letter"].strip().lower()), given["let_relation"], given["let_frequency"])


def _response_language(text: str, given: Arguments) -> bool:
    wanted = given["language"]
    detected = detect_language(text)
    if not any(is_language(known, wanted) for known in known_languages()):
        raise ValueError(f"language {wanted!r}: not one of {', '.join(known_languages())}")
    return detected is None or is_language(detected, wanted)


def _number_sentences(text: str, given: Arguments) -> bool:
    return _compared(count_sentences(text), given["relation"], given["num_sentences"])


def _number_words(text: str, given: Arguments) -> bool:
    return _compared(len(re.findall(r"\w+", text)), given["relation"], given["num_words"])


def _number_paragraphs(text: str, given: Arguments) -> bool:
    """Between dividers `***`; only the first and the last may be empty, and then count for none."""
    first, *rest = (bool(paragraph.strip()) for paragraph in re.split(r"\s?\*\*\*\s?", text))
    inner, last = rest[:-1], rest[-1:]
    return all(inner) and first + len(inner) + sum(last) == given["num_paragraphs"]


def _nth_paragraph_first_word(text: str, given: Arguments) -> bool:
    """Between blank lines; an empty one counts for none, but keeps its place."""
    paragraphs = text.split("\n\n")
    count = sum(bool(paragraph.strip()) for paragraph in paragraphs)
    nth = given["nth_paragraph"]
    if nth < 1:
        raise ValueError(f"nth_paragraph={nth}: paragraphs are counted from 1")
    if count != given["num_paragraphs"] or nth > count or not paragraphs[nth - 1].strip():
        return False
    word = paragraphs[nth - 1].split()[0].lstrip("'").lstrip('"')
    return re.split(r"[.,?!'\"]", word)[0].lower() == given["first_word"].lower()


def _number_placeholders(text: str, given: Arguments) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= given["num_placeholders"]


def _postscript(text: str, given: Arguments) -> bool:
    marker = given["postscript_marker"].strip().lower()
    return re.search(_POSTSCRIPTS.get(marker, re.escape(marker)), text.lower()) is not None


def _number_bullet_lists(text: str, given: Arguments) -> bool:
    bullets = re.findall(r"^\s*(?:\*[^*]|-).*$", text, re.MULTILINE)
    return len(bullets) == given["num_bullets"]


def _constrained_response(text: str, given: Arguments) -> bool:
    return any(option in text for option in _OPTIONS)


def _number_highlights(text: str, given: Arguments) -> bool:
    """`*one*` and `**two**` asterisks; empty ones do not count."""
    single = [found.strip("*") for found in re.findall(r"\*[^\n*]*\*", text)]
    double = [found[2:-2] for found in re.findall(r"\*\*[^\n*]*\*\*", text)]
    return sum(bool(found.strip()) for found in single + double) >= given["num_highlights"]


def _multiple_sections(text: str, given: Arguments) -> bool:
    mark = re.escape(given["section_spliter"].strip())
    return len(re.findall(rf"{mark}\s?\d+", text)) >= given["num_sections"]


def _json_format(text: str, given: Arguments) -> bool:
    inner = re.sub(r"^```(?:json|Json|JSON)?|```$", "", text.strip()).strip()
    try:
        json.loads(inner)
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str, given: Arguments) -> bool:
    return any(title.lstrip("<").rstrip(">").strip() for title in re.findall(r"<<[^\n]+>>", text))


def _two_responses(text: str, given: Arguments) -> bool:
    parts = [part.strip() for part in text.split("******")]
    inner_empty = any(not part for part in parts[1:-1])
    responses = [part for part in parts if part]
    return not inner_empty and len(responses) == 2 and responses[0] != responses[1]


def _repeat_prompt(text: str, given: Arguments) -> bool:
    return text.strip().lower().startswith(given["prompt_to_repeat"].strip().lower())


def _ends_with(text: str, given: Arguments) -> bool:
    return text.strip().strip('"').lower().endswith(given["end_phrase"].strip().lower())


def _quotation(text: str, given: Arguments) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def _capital_words(text: str, given: Arguments) -> bool:
    """A hyphenated word is one, a contraction (IT'S) two, as NLTK has it."""
    words = re.findall(r"\w+(?:[-.’&]\w+)*", text)  # noqa: RUF001
    return _compared(sum(map(str.isupper, words)), given["capital_relation"], given["capital_frequency"])


def _english_capital(text: str, given: Arguments) -> bool:
    return text.isupper() and _in_english(text)


def _english_lowercase(text: str, given: Arguments) -> bool:
    return text.islower() and _in_english(text)


def _no_comma(text: str, given: Arguments) -> bool:
    return "," not in text


CHECKS: dict[str, tuple[Callable[[str, Arguments], bool], tuple[str, ...]]] = {
    "keywords:existence": (_keywords_exist, ("keywords",)),
    "keywords:frequency": (_keyword_frequency, ("keyword", "relation", "frequency")),
    "keywords:forbidden_words": (_forbidden_words, ("forbidden_words",)),
    "keywords:letter_frequency": (_letter_frequency, ("letter", "let_relation", "let_frequency")),
    "language:response_language": (_response_language, ("language",)),
    "length_constraints:number_sentences": (_number_sentences, ("relation", "num_sentences")),
    "length_constraints:number_paragraphs": (_number_paragraphs, ("num_paragraphs",)),
    "length_constraints:number_words": (_number_words, ("relation", "num_words")),
    "length_constraints:nth_paragraph_first_word": (
        _nth_paragraph_first_word,
        ("num_paragraphs", "nth_paragraph", "first_word"),
    ),
    "detectable_content:number_placeholders": (_number_placeholders, ("num_placeholders",)),
    "detectable_content:postscript": (_postscript, ("postscript_marker",)),
    "detectable_format:number_bullet_lists": (_number_bullet_lists, ("num_bullets",)),
    "detectable_format:constrained_response": (_constrained_response, ()),
    "detectable_format:number_highlighted_sections": (_number_highlights, ("num_highlights",)),
    "detectable_format:multiple_sections": (_multiple_sections, ("section_spliter", "num_sections")),
    "detectable_format:json_format": (_json_format, ()),
    "detectable_format:title": (_title, ()),
    "combination:two_responses": (_two_responses, ()),
    "combination:repeat_prompt": (_repeat_prompt, ("prompt_to_repeat",)),
    "startend:end_checker": (_ends_with, ("end_phrase",)),
    "startend:quotation": (_quotation, ()),
    "change_case:capital_word_frequency": (_capital_words, ("capital_relation", "capital_frequency")),
    "change_case:english_capital": (_english_capital, ()),
    "change_case:english_lowercase": (_english_lowercase, ()),
    "punctuation:no_comma": (_no_comma, ()),
}
"""Instruction id -> its check, and the arguments that the check needs."""


def follows(instruction: str, response: str, arguments: Arguments) -> bool:
    """Whether a response follows one instruction, to the letter; an empty response follows none.

    Raises:
        ValueError: no such instruction, an argument is missing, or it cannot be used.
        UserError: the instruction is about the language, and langdetect is not installed.
    """
    if instruction not in CHECKS:
        raise ValueError(f"there is no instruction {instruction!r}; there are {', '.join(CHECKS)}")
    check, needed = CHECKS[instruction]
    missing = [name for name in needed if arguments.get(name) is None]
    if missing:
        raise ValueError(f"instruction {instruction}: its kwargs lack {', '.join(missing)}: {dict(arguments)!r}")
    try:
        return bool(response.strip()) and check(response, arguments)
    except UserError:
        raise
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"instruction {instruction}: kwargs {dict(arguments)!r}: {error}") from None


def loosened(response: str) -> list[str]:
    """The response, without its first, its last and both lines, and each of these without asterisks (section 2.2)."""
    lines = response.split("\n")
    cuts = [response, *("\n".join(kept).strip() for kept in (lines[1:], lines[:-1], lines[1:-1]))]
    return [variant for cut in cuts for variant in (cut, cut.replace("*", ""))]


@dataclass(frozen=True)
class Instructions:
    """The share of the row's instructions that the response follows (IFEval), or 1 for all of them and else 0.

    Raises, when called:
        KeyError, ValueError: a column is missing, names an unknown instruction, or lacks an argument of one.
        UserError: an instruction is about the language, and langdetect is not installed.
    """

    mode: Literal["strict", "loose", "both"] = "strict"
    """To the letter; or also without the first line, the last line or asterisks (whichever helps); or half of either,
    logged as the parts `strict` and `loose`."""
    every: bool = False
    """1 if all instructions are followed, else 0, instead of the share."""
    ids_column: str = "instruction_id_list"
    """Holds the instructions' ids."""
    arguments_column: str = "kwargs"
    """Holds for each instruction a mapping of its arguments, or JSON text of this list."""

    def __post_init__(self) -> None:
        if self.mode not in ("strict", "loose", "both"):
            raise UserError(f"reward instructions: mode={self.mode!r}: must be strict, loose or both")
        if not isinstance(self.every, bool):
            raise UserError(f"reward instructions: every={self.every!r}: must be true or false")
        for name in ("ids_column", "arguments_column"):
            if not isinstance(getattr(self, name), str):
                raise UserError(f"reward instructions: {name}={getattr(self, name)!r}: must be a column's name")

    def __call__(self, sample: Sample) -> float | dict[str, float]:
        asked = self._asked(sample)
        if self.mode == "both":
            return {mode: self._score(asked, variants) / 2 for mode, variants in _variants(sample.completion).items()}
        return self._score(asked, _variants(sample.completion)[self.mode])

    def _score(self, asked: list[tuple[str, Arguments]], variants: list[str]) -> float:
        followed = [any(follows(name, variant, given) for variant in variants) for name, given in asked]
        return float(all(followed)) if self.every else sum(followed) / len(followed)

    def _asked(self, sample: Sample) -> list[tuple[str, Arguments]]:
        ids, arguments = sample.row[self.ids_column], sample.row[self.arguments_column]
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        if not isinstance(ids, list | tuple) or not ids:
            raise ValueError(f"the row's column {self.ids_column!r} must list instructions: {ids!r}")
        if not isinstance(arguments, list | tuple) or len(arguments) != len(ids):
            raise ValueError(f"the row's column {self.arguments_column!r} must have one mapping for each of {ids}")
        if not all(each is None or isinstance(each, Mapping) for each in arguments):
            raise ValueError(f"the row's column {self.arguments_column!r} must hold mappings: {arguments!r}")
        return [(name, given or {}) for name, given in zip(ids, arguments, strict=True)]


def _variants(response: str) -> dict[str, list[str]]:
    return {"strict": [response], "loose": loosened(response)}
