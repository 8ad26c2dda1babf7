"""The built-in verifiers: what each accepts, what it refuses, and which rows it complains about."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from engine.config import RewardConfig, RewardsConfig, UserError
from engine.rewards import checks, mathematics, procedural
from engine.rewards.answers import Choice, Exact, JsonSchema, Numeric, Regex
from engine.rewards.contract import Row, Sample, resolve
from engine.rewards.form import Length, Repetition, XmlFormat
from engine.rewards.language import Language
from engine.rewards.mathematics import Math
from engine.rewards.procedural import ReasoningGym, reasoning_gym_rows

SCHEMA = {"type": "object", "required": ["age"], "properties": {"age": {"type": "integer"}}}
UNANSWERED = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
"""Tasks of reasoning-gym whose entries name no answer, because there are many."""


def sample(completion: str, **row: Any) -> Sample:
    return Sample(
        0, "prompt", completion, Row(row), num_tokens=len(completion), completion_ids=tuple(map(ord, completion))
    )


@pytest.mark.parametrize(
    ("arguments", "completion", "answer", "expected"),
    [
        ({}, " PARIS\n", "paris", 1),
        ({}, "New \n York", "new york", 1),
        ({}, "Paris!", "Paris", 0),
        ({"ignore_punctuation": True}, "“Paris!”", "Paris", 1),
        ({"ignore_case": False}, "PARIS", "Paris", 0),
        ({"ignore_whitespace": False}, "Paris ", "Paris", 0),
        ({}, "b", ["a", "b"], 1),
        ({}, "c", ["a", "b"], 0),
        ({}, "7", 7, 1),
        ({"extract": "<a>(.*?)</a>"}, "<a>no</a> <a>yes\n</a>", "yes", 1),
        ({"extract": "<a>(.*?)</a>"}, "yes", "yes", 0),
    ],
)
def test_an_exact_answer_is_compared_once_normalised(
    arguments: dict[str, Any], completion: str, answer: Any, expected: float
) -> None:
    assert Exact(**arguments)(sample(completion, answer=answer)) == expected


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("I had 3 and now 1,234.5.", 1234.5, 1),
        ("it is 10,000,000", "10000000", 1),
        ("x = -3", -3, 1),
        ("10-3", 3, 1),
        ("about 6.02e23", "6.02e23", 1),
        (r"\boxed{\frac{3}{4}}", 0.75, 1),
        ("3/4", 0.75, 1),
        (r"12\%", 0.12, 1),
        ("$5", "So it is $5 #### 5", 1),
        ("no number", 0, 0),
        ("1/0", 0, 0),
        ("1e999999999", 0, 0),
        ("9" * 5000, 9, 0),
        ("12345678901234567890", "12345678901234567891", 0),
        ("4", 5, 0),
    ],
)
def test_the_last_number_counts(completion: str, answer: Any, expected: float) -> None:
    assert Numeric()(sample(completion, answer=answer)) == expected


def test_a_number_may_differ_by_the_wider_tolerance() -> None:
    assert Numeric(tolerance=0.5)(sample("100.5", answer=100)) == 1
    assert Numeric(tolerance=0.5)(sample("100.6", answer=100)) == 0
    assert Numeric(tolerance=0, relative_tolerance=0.01)(sample("101", answer=100)) == 1
    assert Numeric(tolerance=0, relative_tolerance=0.01)(sample("101.1", answer=100)) == 0
    assert Numeric(tolerance="1e-2")(sample("1.009", answer=1)) == 1  # type: ignore[arg-type]  # as YAML reads 1e-2


def test_a_percentage_can_be_read_without_its_sign() -> None:
    assert Numeric(percent="ignore")(sample("50%", answer=50)) == 1
    assert Numeric()(sample("50%", answer=50)) == 0


def test_a_number_is_looked_for_in_what_was_extracted() -> None:
    assert Numeric(extract="Answer: (.*?)\n")(sample("Answer: 4 eggs\nDone in 9 steps", answer=4)) == 1
    assert Numeric(extract="Answer: (.*?)\n")(sample("4", answer=4)) == 0


def test_a_pattern_is_searched_or_must_be_all_of_the_response() -> None:
    assert Regex(pattern="a+")(sample("caat")) == 1
    assert Regex(pattern="a+", match="full")(sample("caat")) == 0
    assert Regex(pattern="a+", match="full")(sample(" aaa\n")) == 1
    assert Regex(column="form")(sample("x1", form=r"\d")) == 1
    assert Regex(column="form")(sample("x", form=r"\d")) == 0


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ('{"age": 3}', 1),
        ('Here:\n```json\n{"age": 3}\n```\nDone.', 1),
        ('```json\n{}\n```\n```json\n{"age": 3}\n```', 1),
        ('{"age": "3"}', 0.25),
        ("[]", 0.25),
        ('{"age": 3', 0),
        ('The age: {"age": 3}', 0),
        ('{"age": NaN}', 0),
        ("[" * 100_000, 0),
        ("", 0),
    ],
)
def test_json_satisfies_its_schema_or_is_at_least_json(completion: str, expected: float) -> None:
    assert JsonSchema(schema=SCHEMA, partial=0.25)(sample(completion)) == expected
    assert JsonSchema(column="schema", partial=0.25)(sample(completion, schema=json.dumps(SCHEMA))) == expected
    assert JsonSchema(column="schema", partial=0.25)(sample(completion, schema=SCHEMA)) == expected


@pytest.mark.parametrize(
    ("completion", "letter"),
    [
        (r"A ... so \boxed{B}", "B"),
        (r"\boxed{\text{(b)}}", "B"),
        ("Answer: (B)", "B"),
        ("**Answer: B**", "B"),
        ("The answer is (b).", "B"),
        ("The answer is B because A is wrong", "B"),
        ("Option (A) is tempting. The correct option is (B)", "B"),
        ("The correct answer is **B**.", "B"),
        ("Answer:\nB", "B"),
        ("The answer is A. No: the answer is B", "B"),
        ("b", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        ("**B.** Paris", "B"),
        ("Let me think.\nB) Paris", "B"),
        ("I am sure it is (B) here", "B"),
        ("The answer is A because it fits", "A"),
        ("The answer is A bit harder than that", None),
        ("Answer: Banana", None),
        ("The answer is A or B", None),
        ("Answer: A, B, C", None),
        ("Neither (A) nor (B) convinces me", None),
        ("A dog barks", None),
        ("I am not sure", None),
        ("Answer: Z", None),
        ("", None),
    ],
)
def test_the_chosen_letter_is_told_from_the_letters_of_prose(completion: str, letter: str | None) -> None:
    scores = {gold: Choice(choices=9)(sample(completion, answer=gold)) for gold in "ABCDI"}
    assert [gold for gold, score in scores.items() if score] == ([letter] if letter else [])


def test_the_right_choice_is_named_by_letter_or_number() -> None:
    for gold in ("B", "b", "(B)", 1, "1"):
        assert Choice()(sample("B", answer=gold)) == 1
        assert Choice()(sample("C", answer=gold)) == 0
    assert Choice(first_index=1)(sample("A", answer=1)) == 1


def test_a_length_within_bounds_is_right_and_falls_off_outside() -> None:
    score = Length(minimum=10, maximum=20, unit="characters")
    assert [score(sample("x" * n)) for n in (0, 5, 10, 20, 25, 40, 99)] == [0, 0.5, 1, 1, 0.75, 0, 0]
    sharp = Length(maximum=4, unit="words", falloff=2)
    assert [sharp(sample("w " * n)) for n in (0, 4, 5, 6, 9)] == [1, 1, 0.5, 0, 0]
    assert Length(maximum=2)(Sample(0, "", "a long text", Row({}), num_tokens=3)) == 0.5


def test_repetition_costs_the_share_of_ngrams_seen_before() -> None:
    assert Repetition(size=2)(sample("a b c d")) == 0
    assert Repetition(size=2, scale=2)(sample("a b a B a b")) == pytest.approx(-2 * (1 - 2 / 5))
    assert Repetition(size=1, unit="characters")(sample("abab")) == -0.5
    assert Repetition(size=1, unit="tokens")(sample("aaaa")) == -0.75
    assert Repetition(size=3)(sample("too short")) == 0


@pytest.mark.parametrize(
    ("completion", "full", "partial"),
    [
        ("<think>a</think>\n<answer>b</answer>\n", 1, 1),
        ("<think>a</think> so <answer>b</answer>", 0, 2 / 3),
        ("<answer>b</answer><think>a</think>", 0, 2 / 3),
        ("<think>a</think><answer> </answer>", 0, 1 / 3),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0, 1 / 3),
        ("<think>a<answer>b</answer>", 0, 1 / 3),
        ("b", 0, 0),
    ],
)
def test_tags_come_once_in_order_with_nothing_outside(completion: str, full: float, partial: float) -> None:
    assert XmlFormat()(sample(completion)) == full
    assert XmlFormat(partial=True)(sample(completion)) == pytest.approx(partial)


def test_the_first_tag_may_have_been_opened_by_the_prompt() -> None:
    assert XmlFormat(prefilled=True)(sample("a</think><answer>b</answer>")) == 1
    assert XmlFormat()(sample("a</think><answer>b</answer>")) == 0


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("en", "The quick brown fox jumps over the lazy dog and runs away."),
        ("de", "Der schnelle braune Fuchs springt über den faulen Hund."),
        ("fr", "Le renard brun saute par-dessus le chien paresseux."),
        ("zh", "今天天气很好，我们去公园散步吧。"),  # noqa: RUF001
        ("zh-cn", "今天天气很好，我们去公园散步吧。"),  # noqa: RUF001
        ("kn", "ನಾನು ಮನೆಗೆ ಹೋಗುತ್ತಿದ್ದೇನೆ"),
    ],
)
def test_the_language_of_a_response_is_recognised(language: str, text: str) -> None:
    pytest.importorskip("langdetect")
    assert Language(language=language)(sample(text)) == 1
    assert Language(column="to")(sample(text, to="it")) == 0
    assert Language(language=language)(sample("12 + 4")) == 0


@pytest.mark.parametrize(
    ("completion", "gold", "expected"),
    [
        (r"First 7, then \boxed{\frac12}", "0.5", 1),
        ("The answer is 1/2", r"\frac{1}{2}", 1),
        (r"It is $x^2 + 2x + 1$", "(x+1)**2", 1),
        (r"\boxed{(3, \frac{\pi}{2})}", r"$\left(3,\frac{\pi}{2}\right)$", 1),
        (r"\boxed{6}", r"\boxed{5}", 0),
        ("5", 5, 1),
        (r"\boxed{\frac{}", 5, 0),
        ("I do not know", 5, 0),
        ("", 5, 0),
    ],
)
def test_mathematics_is_compared_by_meaning_in_any_thread(completion: str, gold: Any, expected: float) -> None:
    pytest.importorskip("math_verify")
    asked = sample(completion, answer=gold)
    with ThreadPoolExecutor(1) as other:
        assert [Math()(asked), other.submit(Math(), asked).result()] == [expected, expected]


def test_a_gold_answer_that_is_no_mathematics_is_an_error() -> None:
    pytest.importorskip("math_verify")
    with pytest.raises(ValueError, match="column 'answer' does not parse as mathematics"):
        Math()(sample("5", answer=r"\text{"))


def test_a_comparison_that_takes_too_long_ends_with_an_error_in_any_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    math_verify = pytest.importorskip("math_verify")

    def endless(*_: Any, **__: Any) -> bool:
        while True:
            try:
                sum(range(10))
            except Exception:
                return False  # as libraries do

    monkeypatch.setattr(math_verify, "verify", endless)
    hard = Math(seconds=0.1)
    with pytest.raises(TimeoutError, match=r"0\.1 s"):
        hard(sample("5", answer=5))
    with ThreadPoolExecutor(1) as other:
        assert isinstance(other.submit(hard, sample("5", answer=5)).exception(), TimeoutError)


def test_a_deadline_that_is_met_leaves_nothing_behind() -> None:
    before = threading.active_count()
    assert [mathematics._within(0.05, partial(sum, [n])) for n in range(20)] == list(range(20))
    threading.Event().wait(0.1)  # no interrupt strikes later
    assert threading.active_count() <= before


def test_every_reasoning_gym_task_accepts_its_own_answer() -> None:
    pytest.importorskip("reasoning_gym")
    from reasoning_gym.factory import DATASETS

    part_of_others = {"config": {"datasets": [{"name": "chain_sum"}, {"name": "rearc", "weight": 2}]}}
    scores: dict[str, list[float]] = {}
    unanswered = set()
    for task in DATASETS:
        for row in reasoning_gym_rows(task, size=2, seed=7, **(part_of_others if task == "composite" else {})):
            assert json.loads(json.dumps(row)) == row
            if row["answer"]:
                scores.setdefault(task, []).append(ReasoningGym()(sample(row["answer"], **row)))
            else:
                unanswered.add(task)
    assert unanswered == UNANSWERED
    assert {task: got for task, got in scores.items() if min(got) < 0.99} == {}
    assert len(scores) + len(unanswered) == len(DATASETS) > 100


def test_reasoning_gym_rows_are_those_of_their_seed_and_settings() -> None:
    pytest.importorskip("reasoning_gym")

    def rows(seed: int, **config: Any) -> list[dict[str, Any]]:
        return list(reasoning_gym_rows("chain_sum", size=3, seed=seed, config=config))

    assert rows(1) == rows(1) != rows(2)
    assert all(row["prompt"].count("+") + row["prompt"].count("-") >= 6 for row in rows(1, min_terms=7, max_terms=7))


def test_a_reasoning_gym_answer_can_be_extracted() -> None:
    pytest.importorskip("reasoning_gym")
    (row,) = reasoning_gym_rows("leg_counting", size=1)
    tagged = ReasoningGym(extract="<answer>(.*?)</answer>")
    assert tagged(sample(f"<answer>1</answer> no, <answer> {row['answer']} </answer>.", **row)) == 1
    assert tagged(sample(row["answer"], **row)) == 0
    assert ReasoningGym()(sample("no idea", **row)) < 0.1


@pytest.mark.parametrize(
    "task",
    sorted(procedural._EVALUATES_LITERALS | procedural._EVALUATES_EXPRESSIONS),
)
def test_a_response_is_never_run_as_code_by_a_task_that_evaluates_it(task: str, tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    witness = tmp_path / "ran"
    for attack in (
        f"__import__('pathlib').Path('{witness}').touch()",
        f"[open('{witness}', 'w')]",
        f"(open#,\n('{witness}', 'w'))",
        f"open\\\n('{witness}', 'w')",
        f"3 + sin(\"open('{witness}', 'w')\")",
        f"3! + open ('{witness}', 'w')",
    ):
        for row in reasoning_gym_rows(task, size=2):
            assert ReasoningGym()(sample(attack, **row)) == 0
    assert not witness.exists()


@pytest.mark.parametrize(
    ("verifier", "row", "message"),
    [
        (Exact(), {"anser": 1}, "no column 'answer'; did you mean 'anser'"),
        (Exact(), {"answer": None}, "column 'answer' is empty"),
        (Exact(), {"answer": []}, "must hold an answer or a list"),
        (Numeric(), {"answer": "many"}, "holds no number: 'many'"),
        (Numeric(), {"answer": True}, "holds no number: True"),
        (Regex(column="form"), {"form": "("}, "column 'form': .* is no pattern"),
        (Regex(column="form"), {"form": 3}, "column 'form': 3 is no pattern"),
        (JsonSchema(column="schema"), {"schema": "{"}, "column 'schema' is not JSON"),
        (JsonSchema(column="schema"), {"schema": {"type": "wrong"}}, "not a valid schema"),
        (JsonSchema(column="schema"), {"schema": {"$ref": "http://localhost:9/x"}}, r"\$ref leads nowhere"),
        (Choice(choices=4), {"answer": "E"}, "none of the choices ABCD: 'E'"),
        (Choice(choices=4), {"answer": 4}, "none of the choices ABCD: 4"),
        (Choice(), {"answer": True}, "none of the choices"),
        (ReasoningGym(), {"entry": "{}"}, "no entry of reasoning_gym_rows"),
    ],
)
def test_a_row_that_cannot_be_used_is_an_error_and_not_a_zero(
    verifier: Callable[[Sample], float], row: dict[str, Any], message: str
) -> None:
    with pytest.raises((KeyError, ValueError), match=message):
        verifier(sample("1", **row))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("exact", {"colum": "a"}, "unexpected keyword argument 'colum'"),
        ("exact", {"column": 3}, "column=3: must be a str"),
        ("exact", {"ignore_case": "no"}, "ignore_case='no': must be a bool"),
        ("exact", {"extract": "("}, "extract='\\('"),
        ("exact", {"extract": "a"}, "must have 1 group"),
        ("numeric", {"tolerance": -1}, "must not be negative"),
        ("numeric", {"tolerance": "small"}, "must be a finite number"),
        ("numeric", {"percent": "yes"}, "must be one of fraction, ignore"),
        ("regex", {}, "give either pattern or column"),
        ("regex", {"pattern": "a", "column": "b"}, "give either pattern or column"),
        ("json_schema", {"schema": {"type": "wrong"}}, "json_schema: schema: .*not a valid schema"),
        ("choice", {"choices": 27}, "must be 2 to 26"),
        ("length", {}, "give a maximum or a minimum"),
        ("length", {"minimum": 5, "maximum": 4}, "is below minimum"),
        ("length", {"maximum": 1.5}, "whole number"),
        ("repetition", {"size": 0}, "must be 1 or more"),
        ("repetition", {"unit": "lines"}, "must be one of words, tokens, characters"),
        ("xml_format", {"tags": "think"}, "must be a list of tag names"),
        ("xml_format", {"tags": ["a", "a"]}, "twice"),
        ("language", {}, "give either language or column"),
    ],
)
def test_wrong_arguments_are_refused_before_the_run_starts(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(RewardConfig(function=name, arguments=arguments), RewardsConfig())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"task": "chain_sums"}, "no task 'chain_sums'"), ({"task": "chain_sum", "config": {"x": 1}}, "config: .*'x'")],
)
def test_a_task_or_setting_that_reasoning_gym_lacks_is_refused(arguments: dict[str, Any], message: str) -> None:
    pytest.importorskip("reasoning_gym")
    with pytest.raises(UserError, match=message):
        next(reasoning_gym_rows(**arguments))


def test_an_unknown_language_is_refused() -> None:
    pytest.importorskip("langdetect")
    with pytest.raises(UserError, match="language='english': must be one of af, ar"):
        Language(language="english")
    with pytest.raises(ValueError, match="names no known language: 'xx'"):
        Language(column="to")(sample("text", to="xx"))


def test_a_missing_library_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(checks.importlib, "import_module", missing)
    with pytest.raises(UserError, match=r"reward math: needs the package math-verify; .* pip install math-verify"):
        Math()
