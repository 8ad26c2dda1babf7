"""Text that every machine has and three generated tasks, for a model that starts from random weights.

    documents     docstrings of Python's standard library                            pretrain
    instructions  prompt, completion: half the answers are terse, half polite        sft
    preferences   prompt, chosen, rejected: right before wrong, terse before polite  reward_model, preference
    prompts       prompt, answer                                                     rl, and every evaluation by rewards

The tasks are to write a number backwards, to sort its digits and to name the largest of them. Nothing of them is in the
documents, so a pretrained model cannot do them. A prompt's hash says which of the last three functions may use it for
training, or whether it is held out: no function's training prompts are another's, and none of them is held out.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import random
import string
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from engine import Sample, reward

LENGTHS = [3, 4, 5]
"""Digits of a number; it may begin with 0."""
OPENINGS = ["Sure!", "Of course.", "Certainly."]
CLOSINGS = ["Please check it.", "Thank you."]

NOISE = 0.08
"""Share of the training pairs whose labels are exchanged."""
ROWS = {"instructions": 20_000, "preferences": 6_000, "prompts": 4_000, "held_out": 400}
_USES = list(ROWS)
_NO_TEXT = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo"}


def documents(split: str) -> list[dict[str, str]]:
    """One row per module: its docstrings, in the order of the source.

    About a twentieth of the library is held out, by the top-level name: a package stays together, and a docstring that
    stands in several modules belongs to the first of them alone.
    """
    held_out = _is_held_out(split)
    return [{"text": text} for path, text in _library().items() if (_hash(path.parts[0]) % 20 == 0) == held_out]


def instructions(split: str, seed: int = 0) -> Iterator[dict[str, str]]:
    """Prompts with the right answer; by the toss of a coin it is terse (the answer alone) or polite."""
    for rng, prompt, answer in _questions("instructions", split, seed):
        completion = _polite(answer, rng) if rng.random() < 0.5 else answer
        yield {"prompt": prompt, "completion": completion, "answer": answer}


def preferences(split: str, seed: int = 0) -> Iterator[dict[str, str]]:
    """Two of four answers (right or wrong, terse or polite), the one of more `gold` chosen.

    Of the training pairs the share `NOISE` is labelled the other way round; held-out labels are clean.
    """
    noise = 0.0 if _is_held_out(split) else NOISE
    for rng, prompt, answer in _questions("preferences", split, seed):
        wrong = _changed(answer, rng)
        right_ones, wrong_ones = [answer, _polite(answer, rng)], [wrong, _polite(wrong, rng)]
        rejected = rng.choice([right_ones[1], *wrong_ones])
        chosen = right_ones[0] if rejected == right_ones[1] else rng.choice(right_ones)
        if rng.random() < noise:
            chosen, rejected = rejected, chosen
        yield {"prompt": prompt, "chosen": chosen, "rejected": rejected, "answer": answer}


def prompts(split: str, seed: int = 0) -> Iterator[dict[str, str]]:
    """Prompts to be answered, with the right answer for the rewards."""
    for _, prompt, answer in _questions("prompts", split, seed):
        yield {"prompt": prompt, "answer": answer}


@reward(timeout=10)
def exact_match(sample: Sample) -> float:
    """1 if the answer is right, be it terse or polite, else 0."""
    return float(_answer_in(sample.completion) == sample.row.answer)


@reward(timeout=10)
def gold(sample: Sample) -> float:
    """The rule behind the preferences: 0 for a wrong answer, else 1 / number of words, so 1 if right and terse."""
    return exact_match(sample) / max(1, len(sample.completion.split()))


def _questions(use: str, split: str, seed: int) -> Iterator[tuple[random.Random, str, str]]:
    """(random numbers for this row, prompt, answer), no prompt twice."""
    pool = "held_out" if _is_held_out(split) else use
    rng = random.Random(f"{use} {split} {seed}")
    seen: set[str] = set()
    while len(seen) < ROWS[pool]:
        digits = "".join(rng.choices(string.digits, k=rng.choice(LENGTHS)))
        prompt, answer = rng.choice([_backwards, _sorted, _largest])(digits)
        if prompt not in seen and _USES[_hash(prompt) % len(_USES)] == pool:
            seen.add(prompt)
            yield rng, prompt, answer


def _backwards(digits: str) -> tuple[str, str]:
    return f"Write {digits} backwards.", digits[::-1]


def _sorted(digits: str) -> tuple[str, str]:
    return f"Sort the digits of {digits}.", "".join(sorted(digits))


def _largest(digits: str) -> tuple[str, str]:
    return f"What is the largest digit of {digits}?", max(digits)


def _changed(answer: str, rng: random.Random) -> str:
    """A wrong answer: one digit is another."""
    place = rng.randrange(len(answer))
    other = rng.choice([digit for digit in string.digits if digit != answer[place]])
    return answer[:place] + other + answer[place + 1 :]


def _polite(answer: str, rng: random.Random) -> str:
    return f"{rng.choice(OPENINGS)} The result is {answer}. {rng.choice(CLOSINGS)}"


def _answer_in(completion: str) -> str:
    """What a completion gives as the answer: what a polite one has between its phrases, else all of it."""
    text = completion.strip()
    for opening in OPENINGS:
        for closing in CLOSINGS:
            start, end = f"{opening} The result is ", f". {closing}"
            if text.startswith(start) and text.endswith(end):
                return text[len(start) : -len(end)]
    return text


@functools.cache
def _library() -> dict[Path, str]:
    """Path of each module of the standard library -> its docstrings, none of them twice in the library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    seen: set[str] = set()
    texts = {}
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root)
        if not _NO_TEXT & set(path.parts) and (new := [d for d in _docstrings(file) if d not in seen]):
            seen.update(new)
            texts[path] = "\n\n".join(dict.fromkeys(new))
    return texts


def _docstrings(file: Path) -> list[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = sorted((node for node in ast.walk(tree) if isinstance(node, kinds)), key=lambda n: getattr(n, "lineno", 0))
    return [text for node in nodes if (text := ast.get_docstring(node))]


def _is_held_out(split: str) -> bool:
    if split not in ("train", "held_out"):
        raise ValueError(f"split is {split!r}, must be train or held_out")
    return split == "held_out"


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
