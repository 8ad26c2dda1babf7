"""Verifiers of how a response is written: its length, its repetitions, its tags."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from engine.rewards.checks import check_types, require
from engine.rewards.contract import Sample


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
        check_types(self)
        for name in ("maximum", "falloff"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
            require(self, value is None or whole, name, "must be a whole number above 0, or null")
        require(self, self.minimum >= 0, "minimum", "must not be negative")
        require(self, self.maximum is None or self.minimum <= self.maximum, "maximum", "is below minimum")
        require(self, self.maximum is not None or self.minimum > 0, "maximum", "give a maximum or a minimum above 0")

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
        check_types(self)
        require(self, self.size >= 1, "size", "must be 1 or more")
        require(self, self.scale > 0, "scale", "must be above 0")

    def __call__(self, sample: Sample) -> float:
        pieces: Sequence[Any] = sample.completion.lower().split()
        if self.unit != "words":
            pieces = sample.completion_ids if self.unit == "tokens" else sample.completion
        ngrams = [tuple(pieces[start : start + self.size]) for start in range(len(pieces) - self.size + 1)]
        return -self.scale * (1 - len(set(ngrams)) / len(ngrams)) if ngrams else 0.0


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
        check_types(self)
        right = isinstance(self.tags, list | tuple) and all(
            isinstance(tag, str) and re.fullmatch(r"[A-Za-z_][\w.-]*", tag) for tag in self.tags
        )
        require(self, right and len(self.tags) > 0, "tags", "must be a list of tag names, e.g. [think, answer]")
        require(self, len(set(self.tags)) == len(self.tags), "tags", "must not name a tag twice")

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
