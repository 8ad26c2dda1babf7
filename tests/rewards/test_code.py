"""Solutions, right, wrong and sly, against tests in the forms that public data sets have."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.rewards.code import Code, TestsError, extract_code, read_tests, same_output
from engine.rewards.contract import Sample
from engine.rewards.sandbox import protections
from engine.row import Row

needs_sandbox = pytest.mark.skipif(not all(protections().values()), reason="this machine lacks a layer of the sandbox")

MBPP = {"tests": ["assert add(1, 2) == 3", "assert add(-1, 1) == 0", "assert add(0, 0) == 0"]}
STREAMS = {"tests": {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]}}
CALLS = {"tests": json.dumps({"fn_name": "add", "inputs": [[1, 2], [3, 4]], "outputs": [3, 7]})}
HUMAN_EVAL = {"tests": "def check(candidate):\n    assert candidate(1, 2) == 3\n", "entry_point": "add"}
FORMS = {"statements": MBPP, "calls": CALLS, "check": HUMAN_EVAL}
RIGHT = "Here it is:\n```python\ndef add(a, b):\n    return a + b\n```\nDone."
STREAM_RIGHT = "```python\nprint(sum(map(int, input().split())))\n```"


def score(completion: str, row: dict[str, Any], **arguments: Any) -> float:
    return Code(seconds=3.0, **arguments)(Sample(id=0, prompt="", completion=completion, row=Row(row)))


@needs_sandbox
@pytest.mark.parametrize("form", FORMS)
def test_a_right_solution_has_1_and_a_wrong_one_0(form: str) -> None:
    assert score(RIGHT, FORMS[form]) == 1.0
    assert score(RIGHT.replace("+", "-"), FORMS[form]) == 0.0


@needs_sandbox
def test_programs_that_read_and_print_are_compared_by_their_output() -> None:
    assert score(STREAM_RIGHT, STREAMS) == 1.0
    assert score("```\nprint(3)\n```", STREAMS) == 0.0
    assert score("```\nprint(3)\n```", STREAMS, score="fraction") == 0.5


@needs_sandbox
def test_fraction_counts_the_tests_that_pass() -> None:
    assert score("```python\ndef add(a, b): return 0\n```", MBPP, score="fraction") == pytest.approx(2 / 3)


SLY = {
    "exits": "import sys; sys.exit(0)",
    "exits when called": "def add(a, b):\n    import os\n    os._exit(0)",
    "is equal to everything": "class A(int):\n    def __eq__(self, o): return True\n    __hash__ = None\n"
    "def add(a, b): return A(9)",
    "prints a verdict": 'print(\'{"passed": true, "token": ""}\')\ndef add(a, b): return 9',
    "changes assert": "import builtins\nbuiltins.AssertionError = Exception\ndef add(a, b): return 9",
    "changes its caller": "import sys\ndef add(a, b):\n    sys._getframe(1).f_globals['add'] = None\n    return 9",
    "floods its pipe": "import os\nfor f in range(3, 20):\n    try: os.write(f, b'{\"value\": 3}\\n' * 9)\n"
    "    except OSError: pass\ndef add(a, b): return 9",
    "hangs": "while True: pass",
    "does not compile": "def add(a, b: return 3",
}


@needs_sandbox
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SLY)
def test_no_trick_passes_for_a_solution(name: str, form: str) -> None:
    assert score(f"```python\n{SLY[name]}\n```", FORMS[form]) == 0.0


@needs_sandbox
def test_arguments_changed_in_place_objects_and_exceptions_arrive() -> None:
    program = (
        "```python\nclass Box:\n    def __init__(self): self.n = 1\n    def more(self): self.n += 1; return self.n\n"
        "def put(x): x.append(4)\ndef bad(): raise KeyError('k')\n```"
    )
    tests = [
        "x = [1]; put(x); assert x == [1, 4]",
        "b = Box(); assert b.more() == 2 and b.n == 2",
        "try:\n    bad()\n    ok = False\nexcept KeyError:\n    ok = True\nassert ok",
    ]
    assert score(program, {"tests": tests}) == 1.0


@needs_sandbox
def test_the_prompt_may_come_before_the_code() -> None:
    row = {"prompt": "import math", "tests": ["assert f(4) == 2"]}
    assert score("```python\ndef f(x): return math.isqrt(x)\n```", row, preamble="prompt") == 1.0


@needs_sandbox
def test_tests_that_do_not_compile_are_an_error_and_no_score() -> None:
    with pytest.raises(TestsError, match="do not compile"):
        score(RIGHT, {"tests": ["assert add(1, 2 =="]})
    with pytest.raises(KeyError):
        score(RIGHT, {})


@pytest.mark.parametrize(
    "value", [[], "", None, 5, {"inputs": [1], "outputs": []}, "[1,", [{"input": 1}], "def check(c): pass"]
)
def test_unusable_tests_are_refused(value: Any) -> None:
    with pytest.raises(TestsError):
        read_tests(value)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("x = 1", "x = 1"),
        ("  ", None),
        ("```python\nx = 1\n```\nor\n```py\nx = 2\n```", "x = 2"),
        ("```python\nx = 1\n```\nOutput:\n```\n1\n```", "x = 1"),
        ("```\nx = 1\n```", "x = 1"),
        ("```bash\nls\n```", None),
        ("```python\nx = 1", "x = 1"),
        ("~~~python\ns = '```'\n~~~", "s = '```'"),
    ],
)
def test_the_last_python_block_is_the_program(text: str, code: str | None) -> None:
    assert extract_code(text) == code


@pytest.mark.parametrize(
    ("got", "expected", "same"),
    [("1\n", "1", True), ("1 \n\n", "1", True), ("1.0", "1", True), ("1\n2", "1 2", False), ("Yes", "YES", False)],
)
def test_outputs_are_compared_line_by_line(got: str, expected: str, same: bool) -> None:
    assert same_output(got, expected) is same
