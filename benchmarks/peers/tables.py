"""Numbers of several runs as a table: medians, spreads, and the ratios of the pairs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Several measurements of one thing."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return Spread(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{shown(self.median)} ({shown(self.low)}..{shown(self.high)})"


def shown(value: float) -> str:
    """Three significant digits, no exponent, nothing cut off above the point."""
    size = abs(value)
    if size >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if size >= 10 else f"{value:.2f}" if size >= 1 else f"{value:.3f}"


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Ours by theirs, pair by pair.

    Raises:
        ValueError: the sides have not been measured equally often.
    """
    return Spread.of([mine / other for mine, other in zip(ours, theirs, strict=True)])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """As Markdown, columns aligned."""
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    drawn = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([drawn[0], rule, *drawn[1:]])


def comparison(measures: Mapping[str, tuple[Sequence[float | None], Sequence[float | None]]]) -> str:
    """name -> (ours, theirs), a value for each repeat; None where a run has none, and the pair is left out."""
    rows = []
    for name, (ours, theirs) in measures.items():
        pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
        columns = [spread_of(ours), spread_of(theirs)]
        ratio = str(ratios([a for a, _ in pairs], [b for _, b in pairs])) if pairs and all(b for _, b in pairs) else "-"
        rows.append([name, *columns, ratio])
    return table(["", "Gnomon", "TRL", "Gnomon / TRL"], rows)


def spread_of(values: Sequence[float | None]) -> str:
    """A spread, and how many runs had no value."""
    there = [value for value in values if value is not None]
    if not there:
        return "-"
    missing = f", {len(values) - len(there)} of {len(values)} never" if len(there) < len(values) else ""
    return f"{Spread.of(there)}{missing}"
