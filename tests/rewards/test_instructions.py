"""IFEval's 25 instructions: for each, a response that follows it and one that does not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.config import RewardConfig, RewardsConfig, UserError
from engine.rewards.contract import Row, Sample, resolve
from engine.rewards.instructions import CHECKS, Instructions, count_sentences, follows

ENGLISH = "the quick brown fox jumps over the lazy dog and then it runs home to the old house"
GERMAN = "Der schnelle braune Fuchs springt über den faulen Hund und läuft dann nach Hause."

LEAST, LESS = {"relation": "at least"}, {"relation": "less than"}

EXAMPLES: list[tuple[str, dict[str, Any], str, str]] = [
    ("keywords:existence", {"keywords": ["mom", "c++"]}, "Mom codes in C++.", "Mom codes in C."),
    ("keywords:frequency", LEAST | {"keyword": "war ", "frequency": 2}, "War and postwar", "war"),
    ("keywords:frequency", LESS | {"keyword": "war", "frequency": 2}, "war", "war war"),
    ("keywords:forbidden_words", {"forbidden_words": ["rock"]}, "rocket", "I Rock!"),
    ("keywords:letter_frequency", {"let_relation": "at least", "letter": "#", "let_frequency": 2}, "#a #b", "#a b"),
    ("keywords:letter_frequency", {"let_relation": "less than", "letter": "T", "let_frequency": 2}, "to", "tot"),
    ("language:response_language", {"language": "de"}, GERMAN, ENGLISH),
    ("length_constraints:number_sentences", LEAST | {"num_sentences": 2}, "Yes. No!", "Yes, e.g. Dr. No."),
    ("length_constraints:number_sentences", LESS | {"num_sentences": 2}, "Only 3.5 of them", "One. Two"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "***\na\n***\nb\n***", "a\n\nb"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a *** b", "a\n***\n***\nb"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 1}, "a", "a *** b"),
    ("length_constraints:number_words", LEAST | {"num_words": 3}, "one two three", "one, two!"),
    ("length_constraints:number_words", LESS | {"num_words": 3}, "one two", "one two-three"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Firmly"},
        'a b\n\n"firmly, c',
        "a b\n\nc firmly",
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 1, "first_word": "a"},
        "a b\n\nc\n\n",
        "a b\n\nc\n\nd",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] and [b]", "[a]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye\np. s. More", "Bye\nPS More"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye\nP.P.S more", "Bye\nP.S. more"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "Two:\n* a\n  - b", "* a\n* b\n* c"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 1}, "**bold**\n* a", "**bold**"),
    ("detectable_format:constrained_response", {}, "Well. My answer is no.", "My answer is nothing."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and *b c*", "*a* and * *"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        "SECTION 1 a SECTION 2",
        "Section 1 Section 2",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', 'Sure: {"a": 1}'),
    ("detectable_format:title", {}, "<<joy>>\ntext", "<< >> <joy>"),
    ("combination:two_responses", {}, "one ****** two", "one ****** one"),
    ("combination:two_responses", {}, "one\n******\ntwo\n******", "one ****** two ****** three"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi. "}, " say hi. Hi!", "Sure: say hi. Hi!"),
    ("startend:end_checker", {"end_phrase": "The end?"}, 'So: "the end?"\n', "The end? Yes"),
    ("startend:quotation", {}, ' "all of it" ', '"'),
    (
        "change_case:capital_word_frequency",
        {"capital_relation": "at least", "capital_frequency": 2},
        "A WELL-KNOWN fact",
        "WELL-KNOWN fact",
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_relation": "less than", "capital_frequency": 2},
        "ONE 2 3",
        "ONE TWO",
    ),
    ("change_case:english_capital", {}, "THIS IS WHAT THE WEATHER IS LIKE WITH THE WIND", ENGLISH),
    ("change_case:english_lowercase", {}, ENGLISH, GERMAN.lower()),
    ("punctuation:no_comma", {}, "one; two", "one, two"),
]


def sample(completion: str, ids: Any, kwargs: Any) -> Sample:
    return Sample(0, "prompt", completion, Row({"instruction_id_list": ids, "kwargs": kwargs}))


@pytest.mark.parametrize(("instruction", "arguments", "good", "bad"), EXAMPLES)
def test_an_instruction_is_followed_or_not(instruction: str, arguments: dict[str, Any], good: str, bad: str) -> None:
    if instruction.startswith("language:") or "english" in instruction:
        pytest.importorskip("langdetect")
    assert follows(instruction, good, arguments)
    assert not follows(instruction, bad, arguments)
    assert not follows(instruction, " \n", arguments)


def test_all_25_instructions_have_an_example() -> None:
    assert len(CHECKS) == 25
    assert {name for name, *_ in EXAMPLES} == set(CHECKS)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("...", 0),
        ("One", 1),
        ("One. Two? Three!", 3),
        ('He said "Stop!" and left.', 2),
        ("Mr. Smith paid 3.50 at www.a.com today.", 1),
        ("J. R. Smith vs. the U.S. team. Done.", 2),
        ("今天很好。我们走吧！", 2),  # noqa: RUF001
    ],
)
def test_sentences_are_counted(text: str, count: int) -> None:
    assert count_sentences(text) == count


TWO = (["punctuation:no_comma", "startend:end_checker"], [{"end_phrase": None}, {"end_phrase": "Bye"}])
"""As the public data set has it: arguments that an instruction does not have are None."""


def test_the_reward_is_the_share_of_instructions_followed_or_all_of_them() -> None:
    assert Instructions()(sample("Well Bye", *TWO)) == 1
    assert Instructions()(sample("Well, Bye", *TWO)) == 0.5
    assert Instructions(every=True)(sample("Well Bye", *TWO)) == 1
    assert Instructions(every=True)(sample("Well, Bye", *TWO)) == 0


@pytest.mark.parametrize(
    "completion", ["Sure, here:\nWell Bye", "Well Bye\nHope that helps, ok", "Sure, ok:\nWell Bye\nok,", "Well *B*ye"]
)
def test_loosely_a_first_line_a_last_line_and_asterisks_are_forgiven(completion: str) -> None:
    assert Instructions(mode="strict", every=True)(sample(completion, *TWO)) == 0
    assert Instructions(mode="loose", every=True)(sample(completion, *TWO)) == 1


def test_strict_and_loose_can_share_the_reward_as_its_parts() -> None:
    assert Instructions(mode="both")(sample("Well *B*ye", *TWO)) == {"strict": 0.25, "loose": 0.5}


def test_arguments_may_be_json_text_and_columns_have_other_names() -> None:
    row = Row({"ids": TWO[0], "how": json.dumps(TWO[1])})
    assert Instructions(ids_column="ids", arguments_column="how")(Sample(0, "", "Bye", row)) == 1


@pytest.mark.parametrize(
    ("ids", "kwargs", "message"),
    [
        ([], [], "must list instructions"),
        (["punctuation:no_comma"], [], "one mapping for each"),
        (["punctuation:no_comma"], ["x"], "must hold mappings"),
        (["punctuation:commas"], [{}], "no instruction 'punctuation:commas'"),
        (["startend:end_checker"], [None], "its kwargs lack end_phrase"),
        (["startend:end_checker"], [{"end_phrase": None}], "its kwargs lack end_phrase"),
        (["startend:end_checker"], [{"end_phrase": 3}], "startend:end_checker: kwargs"),
        (["length_constraints:number_words"], [{"num_words": 3, "relation": "more than"}], "'less than' or 'at least'"),
    ],
)
def test_a_row_that_cannot_be_used_is_an_error_and_not_a_zero(ids: Any, kwargs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Instructions()(sample("text", ids, kwargs))


def test_a_missing_column_is_named() -> None:
    with pytest.raises(KeyError, match="no column 'instruction_id_list'"):
        Instructions()(Sample(0, "", "text", Row({})))


@pytest.mark.parametrize(("name", "value"), [("mode", "lax"), ("every", "yes"), ("ids_column", 3)])
def test_wrong_arguments_are_refused_before_the_run_starts(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"reward instructions: {name}="):
        resolve(RewardConfig(function="instructions", arguments={name: value}), RewardsConfig())
