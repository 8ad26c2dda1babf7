"""Rows from files, callables and Hugging Face datasets; every bad row is reported with its place and the reason.

file, glob, callable, dataset -> _Read (place, row or problem) -> checked, columns renamed
    stream_rows: one (place, row) at a time, for more rows than memory holds
    load_rows: all of them
"""

from __future__ import annotations

import csv
import glob
import gzip
import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from engine.config import SourceConfig, UserError
from engine.user_code import describe_error, load_object

_SHOWN = 10
_LISTED = 1000
_CALLABLE = re.compile(r"([^:]+\.py|[A-Za-z_][\w.]*):[A-Za-z_][\w.]*")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
ROLES = ("system", "user", "assistant", "tool")
_PARQUET_ROWS = 1024  # read at once
_CSV_CELL = 2**30  # bytes; the limit of the csv module, 128 KiB, is below the size of many documents


@dataclass(frozen=True)
class Rows:
    """Usable rows, with the columns renamed, and why others were left out."""

    rows: list[dict[str, Any]]
    places: list[str]
    """Where each of `rows` came from: `file:line`, `file: row N`, `callable: row N`, `dataset [split]: row N`."""
    skipped: list[str]
    """One `place: reason` for each bad row, in order."""


@dataclass(frozen=True)
class _Read:
    """One row as read (None: unreadable), the place it came from, and what was wrong with it."""

    place: str
    row: Any
    problem: str | None = None


@dataclass
class RowStream:
    """The usable rows of a source, read anew each time it is iterated and never all held; made by `stream_rows`.

    Iterating gives (place, row). At the end of the source, and not before, it raises what `check` raises.
    """

    source: SourceConfig
    columns: dict[str, str]
    on_bad_row: str
    required: tuple[str, ...]
    most_listed: int | None
    """Longest `problems` may get."""
    num_rows: int = 0
    """Usable rows of this pass so far."""
    num_bad: int = 0
    """Bad rows of this pass so far."""
    problems: list[str] = field(default_factory=list)
    """One `place: reason` for each of the first bad rows, in order."""

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        self.num_rows, self.num_bad, self.problems = 0, 0, []
        for read in _read_source(self.source):
            row, problem = (None, read.problem) if read.problem else _check(read.row, self.columns, self.required)
            self.num_rows += 1
            if row is None:
                self.reject(read.place, str(problem))
            else:
                yield read.place, row
        self.check()

    def reject(self, place: str, reason: str) -> None:
        """Count a row that this stream gave as a bad one after all, for a reason that its consumer found.

        After the last row, `check` must be called again.
        """
        self.num_rows -= 1
        self.num_bad += 1
        if self.most_listed is None or len(self.problems) < self.most_listed:
            self.problems.append(f"{place}: {reason}")

    def check(self) -> None:
        """Judge the pass that is over.

        Raises:
            UserError: a row is bad and `on_bad_row` is "fail", or no row is usable.
        """
        where = f"data source {self.source.path!r}"
        if self.num_bad and self.on_bad_row == "fail":
            raise bad_rows_error(where, self.problems, self.num_rows + self.num_bad, num_bad=self.num_bad)
        if not self.num_rows:
            detail = "".join(f"\n  {p}" for p in self.problems[:_SHOWN])
            why = f"all {self.num_bad} are bad; mend them" if self.num_bad else "it is empty; give it at least one"
            raise UserError(f"{where}: there are no usable rows: {why}{detail}")


def stream_rows(
    source: SourceConfig, *, columns: dict[str, str], on_bad_row: str, required: tuple[str, ...] = ("prompt",)
) -> RowStream:
    """The rows of a source one by one, checked, for a source that may be larger than memory.

    Files of one document (.txt) or one list (.json) are held whole, one at a time; the others are read piece by piece.
    Arguments as in `load_rows`. Nothing is read, and no error raised, before the result is iterated.
    """
    return RowStream(source, columns, on_bad_row, required, most_listed=_LISTED)


def load_rows(
    source: SourceConfig, *, columns: dict[str, str], on_bad_row: str, required: tuple[str, ...] = ("prompt",)
) -> Rows:
    """Read and check all rows of a source.

    Args:
        source: a jsonl, json, csv, txt (also gzipped) or parquet file or glob; `pkg.mod:fn` or `file.py:fn`, called
            with `source.arguments`, returning an iterable of dicts; else a local dataset folder or a Hugging Face
            name. Values read from csv are strings; a txt file is one row with the one column `text`.
        columns: renames, our name -> the name in the rows.
        on_bad_row: "fail", or "skip" to leave bad rows out and say why in `Rows.skipped`.
        required: columns (ours) that every row must have. Of these, `prompt` is also checked for its form, a non-empty
            string or a list of messages that does not end with the assistant's, and `text`, a non-empty string.

    Raises:
        UserError: the source cannot be read, a row is bad and `on_bad_row` is "fail", or no row is usable.
    """
    stream = RowStream(source, columns, on_bad_row, required, most_listed=None)
    rows: list[dict[str, Any]] = []
    places: list[str] = []
    for place, row in stream:
        rows.append(row)
        places.append(place)
    return Rows(rows, places, stream.problems)


def bad_rows_error(where: str, problems: Sequence[str], total: int, *, num_bad: int | None = None) -> UserError:
    """The one error for all bad rows: the first few, the count, the remedy.

    Args:
        problems: one `place: reason` for each bad row, or for the first of them.
        total: rows, bad and usable.
        num_bad: bad rows; None is one for each of `problems`.
    """
    count = len(problems) if num_bad is None else num_bad
    shown = "".join(f"\n  {p}" for p in problems[:_SHOWN])
    more = f"\n  ... and {count - _SHOWN} more" if count > _SHOWN else ""
    return UserError(
        f"{where}: {count} bad of {total} rows; mend them, or set data.on_bad_row: skip to leave them out{shown}{more}"
    )


def source_files(source: SourceConfig) -> list[str]:
    """The files that decide what the rows are, as far as that is known without reading them.

    Of a callable, the file that defines it; what that reads, and a Hugging Face name, have none here.

    Raises:
        UserError: there is no such file, or the callable cannot be imported.
    """
    path = source.path
    if _CALLABLE.fullmatch(path):
        load_object(path, what="data source")
        module = path.rpartition(":")[0]
        file = module if module.endswith(".py") else getattr(sys.modules[module], "__file__", None)
        return [file] if file else []
    if Path(path).is_dir():
        return sorted(str(file) for file in Path(path).rglob("*") if file.is_file())
    return _find_files(path)


def _read_source(source: SourceConfig) -> Iterator[_Read]:
    path = source.path
    if _CALLABLE.fullmatch(path):
        return _read_callable(path, source.arguments)
    if Path(path).is_dir():
        return _read_dataset(path, source)
    files = _find_files(path)
    if not files:
        return _read_dataset(path, source)
    readers = [(file, _reader_of(file)) for file in files]
    return (read for file, reader in readers for read in _read_file(file, reader))


def _find_files(path: str) -> list[str]:
    """The files that a path or glob names, in order of name; none when it can only be a Hugging Face name."""
    found = [path] if Path(path).is_file() else sorted(glob.glob(path, recursive=True))
    files = [file for file in found if Path(file).is_file()]
    if not files and (not _HUB_NAME.fullmatch(path) or _suffix(path) in _READERS):
        raise UserError(f"data source {path!r}: no such file; paths start at the working directory {Path.cwd()}")
    return files


def _suffix(path: str) -> str:
    suffixes = Path(path).suffixes
    return "".join(suffixes[-2:]).lower() if suffixes[-1:] == [".gz"] else "".join(suffixes[-1:]).lower()


def _reader_of(file: str) -> Any:
    reader = _READERS.get(_suffix(file))
    if reader is None:
        raise UserError(f"data source {file!r}: unknown kind of file; known: {', '.join(_READERS)}")
    return reader


def _read_file(file: str, reader: Any) -> Iterator[_Read]:
    try:
        yield from reader(file)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"data source {file!r}: cannot be read: {error}") from error


def _open(file: str) -> IO[bytes]:
    return gzip.open(file) if file.lower().endswith(".gz") else open(file, "rb")  # type: ignore[return-value]


def _read_jsonl(file: str) -> Iterator[_Read]:
    with _open(file) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _parse_json(line, f"{file}:{number}")


def _parse_json(raw: bytes, place: str) -> _Read:
    try:
        return _Read(place, json.loads(raw.decode("utf-8-sig")))
    except UnicodeDecodeError as error:
        return _Read(place, None, f"not UTF-8 text (byte {error.start})")
    except ValueError as error:
        return _Read(place, None, f"not valid JSON: {error}")
    except RecursionError:
        return _Read(place, None, "not valid JSON: nested too deeply")


def _read_json(file: str) -> Iterator[_Read]:
    with _open(file) as stream:
        whole = _parse_json(stream.read(), file)
    if whole.problem:
        yield whole
    elif not isinstance(whole.row, list):
        yield _Read(file, None, f"must be a list of objects, is {_kind(whole.row)}; one object per line is .jsonl")
    else:
        yield from (_Read(f"{file}: item {i}", row) for i, row in enumerate(whole.row, start=1))


def _read_csv(file: str) -> Iterator[_Read]:
    def text() -> Iterator[str]:
        with _open(file) as lines:
            for i, line in enumerate(lines):
                yield line.decode("utf-8-sig" if i == 0 else "utf-8", errors="surrogateescape")

    csv.field_size_limit(_CSV_CELL)
    reader = csv.reader(text(), strict=True)
    header = next(reader, [])
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield _Read(f"{file}:{line}", None, f"not valid CSV: {error}")
            continue
        if cells is None:
            return
        if not cells:
            continue
        if len(cells) != len(header):
            yield _Read(f"{file}:{line}", None, f"has {len(cells)} cells, the header has {len(header)}")
        elif any(_is_broken_text(cell) for cell in cells):
            yield _Read(f"{file}:{line}", None, "not UTF-8 text")
        else:
            yield _Read(f"{file}:{line}", dict(zip(header, cells, strict=True)))


def _read_text(file: str) -> Iterator[_Read]:
    with _open(file) as stream:
        raw = stream.read()
    try:
        yield _Read(file, {"text": raw.decode("utf-8").removeprefix("\ufeff")})
    except UnicodeDecodeError as error:
        yield _Read(file, None, f"not UTF-8 text (byte {error.start})")


def _read_parquet(file: str) -> Iterator[_Read]:
    import pyarrow  # slow to import, needed for parquet only
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            number = 0
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield _Read(f"{file}: row {number}", row)
    except pyarrow.ArrowException as error:
        yield _Read(file, None, f"not a valid parquet file: {error}")


_READERS = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".json": _read_json,
    ".json.gz": _read_json,
    ".csv": _read_csv,
    ".csv.gz": _read_csv,
    ".txt": _read_text,
    ".txt.gz": _read_text,
    ".parquet": _read_parquet,
}


def _read_callable(spec: str, arguments: dict[str, Any]) -> Iterator[_Read]:
    function = load_object(spec, what="data source")
    try:
        produced = function(**arguments)
        if not isinstance(produced, Iterable) or isinstance(produced, str | bytes | dict):
            raise UserError(f"data source {spec!r}: returned {_kind(produced)}, must return an iterable of dicts")
        for number, row in enumerate(produced, start=1):
            yield _Read(f"{spec}: row {number}", row)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"data source {spec!r}: raised {describe_error(error)}") from error


def _read_dataset(path: str, source: SourceConfig) -> Iterator[_Read]:
    import datasets  # slow to import, needed for Hugging Face datasets only

    try:
        dataset = datasets.load_dataset(path, source.subset, split=source.split)
        for number, row in enumerate(dataset, start=1):
            yield _Read(f"{path} [{source.split}]: row {number}", row)
    except Exception as error:  # the hub, its cache, parsers and the network raise dozens of unrelated types
        reason = " ".join(str(error).split())[:500]
        raise UserError(
            f"data source {path!r}: is no local file, and loading it as a Hugging Face dataset (subset "
            f"{source.subset!r}, split {source.split!r}) failed: {type(error).__name__}: {reason}; check the name, "
            "subset and split and the network, or give a file"
        ) from error


def _check(row: Any, columns: dict[str, str], required: Sequence[str]) -> tuple[dict[str, Any] | None, str | None]:
    """The row with columns renamed, or None and the reason why it is unusable."""
    if not isinstance(row, dict):
        return None, f"must be an object with columns, is {_kind(row)}"
    if not all(isinstance(name, str) for name in row):
        return None, "its column names must be strings"
    present = ", ".join(row) or "none"
    for ours, theirs in columns.items():
        if theirs not in row:
            return None, f"has no column {theirs!r} (data.columns renames it to {ours!r}); its columns: {present}"
    renamed = {name: value for name, value in row.items() if name not in columns.values()}
    renamed |= {ours: row[theirs] for ours, theirs in columns.items()}
    for name in required:
        if name not in renamed:
            return None, (
                f"has no column {name!r}; its columns: {present}; rename one with data.columns: {{{name}: ...}}"
            )
        if renamed[name] is None:
            return None, f"column {name!r} is empty"
    for name, problem_of in _FORMS.items():
        problem = problem_of(renamed[name]) if name in required else None
        if problem:
            return None, problem
    return renamed, None


def _text_problem(text: Any) -> str | None:
    if not isinstance(text, str):
        return f"column 'text' must be text, is {_kind(text)}"
    if not text.strip():
        return "column 'text' is empty"
    return "column 'text' has characters that are not valid Unicode" if _is_broken_text(text) else None


def _prompt_problem(prompt: Any) -> str | None:
    if isinstance(prompt, str):
        if not prompt.strip():
            return "column 'prompt' is empty"
        return "column 'prompt' has characters that are not valid Unicode" if _is_broken_text(prompt) else None
    if not isinstance(prompt, list):
        return f"column 'prompt' must be text or a list of messages, is {_kind(prompt)}"
    if not prompt:
        return "column 'prompt' is empty"
    for i, message in enumerate(prompt):
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            return f"column 'prompt': message {i} must be an object with role and content"
        if message["role"] not in ROLES:
            return f"column 'prompt': message {i} has role {message['role']!r}; use one of {', '.join(ROLES)}"
        if not isinstance(message["content"], str):
            return f"column 'prompt': message {i} must have text as content, has {_kind(message['content'])}"
        if _is_broken_text(message["content"]):
            return f"column 'prompt': message {i} has characters that are not valid Unicode"
    if prompt[-1]["role"] == "assistant":
        return "column 'prompt': the last message is the assistant's; end with the one to be answered"
    return None


_FORMS = {"prompt": _prompt_problem, "text": _text_problem}
"""Columns whose form is checked when they are required."""


def _is_broken_text(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number", bool: "true or false"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")
