"""Products of two numbers, too large for a tiny model's head, and a calculator that knows them."""

from __future__ import annotations

import ast
import json
import operator
import random
import re
from collections.abc import Iterator

from engine import Sample, reward

OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def calculate(expression: str) -> str:
    """Evaluate whole numbers joined by +, - and *.

    Args:
        expression: for instance 1 2 * 3 4, which is 4 0 8: this model reads digit by digit.
    """
    if len(expression) > 50:
        raise ValueError("the expression is too long")

    def value(node: ast.AST) -> int:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
            return OPERATIONS[type(node.op)](value(node.left), value(node.right))
        raise ValueError(f"cannot evaluate {expression!r}")

    return spaced(value(ast.parse(expression.replace(" ", ""), mode="eval").body))


def spaced(number: int) -> str:
    """A number digit by digit, so that each digit is a token."""
    return "".join(f" {digit}" for digit in str(number))


def problems(split: str, size: int = 400) -> Iterator[dict]:
    """Prompts with their answers; the splits share none."""
    chosen = random.Random(7).sample([(a, b) for a in range(11, 100) for b in range(11, 100)], 2 * size)
    for a, b in chosen[:size] if split == "train" else chosen[size:]:
        yield {"prompt": f"{spaced(a)} *{spaced(b)} is", "answer": a * b}


def transcripts(size: int = 20_000) -> Iterator[dict]:
    """What the model has read: some guess, some ask the calculator, and half of those ask for something else."""
    draw = random.Random(1)
    for _ in range(size):
        a, b = draw.randint(11, 99), draw.randint(11, 99)
        if draw.random() < 0.5:
            yield {"text": f"{spaced(a)} *{spaced(b)} is{spaced(draw.randint(100, 9999))} ."}
            continue
        expression = f"{spaced(a)} {'*' if draw.random() < 0.5 else '+'}{spaced(b)}"
        call = json.dumps({"name": "calculate", "arguments": {"expression": expression}})
        result = calculate(expression)
        yield {"text": f"{spaced(a)} *{spaced(b)} is <tool_call>{call}</tool_call>{result} so{result} ."}


@reward
def right(sample: Sample) -> float:
    """1 if the last number of the last message is the answer."""
    numbers = re.findall(r"\d+", sample.completion.replace(" ", ""))
    return float(bool(numbers) and int(numbers[-1]) == sample.row.answer)
