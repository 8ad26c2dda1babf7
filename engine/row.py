"""A data row as user code sees it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any


class Row:
    """A data row whose columns are attributes: `row.answer`, `row["answer"]`, `row.get("answer", default)`."""

    __slots__ = ("_columns",)

    def __init__(self, columns: Mapping[str, Any]) -> None:
        self._columns = dict(columns)

    def __getattr__(self, name: str) -> Any:
        try:
            return self._columns[name]
        except KeyError:
            raise AttributeError(self._no_column(name)) from None

    def __getitem__(self, name: str) -> Any:
        try:
            return self._columns[name]
        except KeyError:
            raise KeyError(self._no_column(name)) from None

    def get(self, name: str, default: Any = None) -> Any:
        """The column, or `default` if this row has none of that name."""
        return self._columns.get(name, default)

    def __contains__(self, name: object) -> bool:
        return name in self._columns

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Row) and self._columns == other._columns

    def __repr__(self) -> str:
        return f"Row({self._columns!r})"

    def __reduce__(self) -> tuple[type[Row], tuple[dict[str, Any]]]:
        return Row, (self._columns,)

    def _no_column(self, name: str) -> str:
        close = difflib.get_close_matches(name, self._columns, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"the row has no column {name!r}; {hint}its columns: {', '.join(self._columns) or 'none'}"
