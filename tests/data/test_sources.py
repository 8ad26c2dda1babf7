"""Rows from every kind of source, and what is said about the bad ones."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from engine.config import SourceConfig, UserError
from engine.data.sources import Rows, RowStream, load_rows, source_files, stream_rows

ROWS = [{"prompt": "1 + 1 = ?", "answer": "2"}, {"prompt": "äöü 中", "answer": "3"}]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with no network for Hugging Face libraries."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


def load(path: str, *, on_bad_row: str = "fail", columns: dict[str, str] | None = None, **source: Any) -> Rows:
    return load_rows(SourceConfig(path=path, **source), columns=columns or {}, on_bad_row=on_bad_row)


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows in the format of the file's suffix."""
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        return pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    if name.endswith(".jsonl"):
        data = lines(rows)
    elif name.endswith(".json"):
        data = json.dumps(rows).encode()
    else:
        cells = [list(rows[0])] + [list(row.values()) for row in rows]
        data = "".join(",".join(f'"{c}"' for c in row) + "\r\n" for row in cells).encode()
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "json", "json.gz", "csv", "csv.gz", "parquet"])
def test_every_file_format_gives_the_same_rows(folder: Path, suffix: str) -> None:
    write(folder / f"train.{suffix}", ROWS)
    loaded = load(f"train.{suffix}")
    assert (loaded.rows, loaded.skipped) == (ROWS, [])


def test_a_glob_reads_its_files_in_order_of_name(folder: Path) -> None:
    write(folder / "part-2.jsonl", ROWS[1:])
    write(folder / "part-1.parquet", ROWS[:1])
    assert load("part-*").rows == ROWS


def test_blank_lines_and_a_byte_order_mark_are_no_errors(folder: Path) -> None:
    (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines(ROWS[:1]) + b"\n  \n" + lines(ROWS[1:]).rstrip())
    (folder / "a.csv").write_bytes(b"\xef\xbb\xbfprompt,answer\n1 + 1 = ?,2\n\n")
    assert load("a.jsonl").rows == ROWS
    assert load("a.csv").rows == ROWS[:1]


def test_a_quoted_csv_cell_may_hold_commas_and_line_breaks(folder: Path) -> None:
    (folder / "a.csv").write_text('prompt,answer\n"a, b\nc",1\n')
    assert load("a.csv").rows == [{"prompt": "a, b\nc", "answer": "1"}]


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        ("a.jsonl", b'{"prompt": "x"}\n\n{}\n{"prompt": "y"}\n', ["a.jsonl:1", "a.jsonl:4"]),
        ("a.json", b'[{"prompt": "x"}, 3, {"prompt": "y"}]', ["a.json: item 1", "a.json: item 3"]),
        ("a.csv", b'prompt\n"x\nx"\n""\ny\n', ["a.csv:2", "a.csv:5"]),
    ],
)
def test_usable_rows_keep_their_places_in_the_file(folder: Path, name: str, content: bytes, places: list[str]) -> None:
    (folder / name).write_bytes(content)
    assert load(name, on_bad_row="skip").places == places


def test_rows_of_parquet_callables_and_datasets_are_numbered_from_one(folder: Path) -> None:
    write(folder / "a.parquet", [{"prompt": "x"}, {"prompt": ""}, {"prompt": "y"}])
    (folder / "source.py").write_text("def make():\n    return [{'prompt': 'x'}, {'prompt': ''}, {'prompt': 'y'}]\n")
    (folder / "things").mkdir()
    write(folder / "things" / "train.jsonl", ROWS)
    assert load("a.parquet", on_bad_row="skip").places == ["a.parquet: row 1", "a.parquet: row 3"]
    assert load("source.py:make", on_bad_row="skip").places == ["source.py:make: row 1", "source.py:make: row 3"]
    assert load("things").places == ["things [train]: row 1", "things [train]: row 2"]


def test_a_tilde_is_the_home_folder_for_files_datasets_and_callables(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(folder / "home"))
    (folder / "home" / "things").mkdir(parents=True)
    write(folder / "home" / "a.jsonl", ROWS)
    write(folder / "home" / "things" / "train.jsonl", ROWS)
    (folder / "home" / "source.py").write_text("def make():\n    return [{'prompt': 'x'}]\n")
    assert load("~/a.jsonl").places[0] == f"{folder}/home/a.jsonl:1"
    assert load("~/*.jsonl").rows == load("~/things").rows == ROWS
    assert load("~/source.py:make").rows == [{"prompt": "x"}]


def test_a_message_list_is_a_prompt(folder: Path) -> None:
    rows = [{"prompt": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]}]
    write(folder / "a.jsonl", rows)
    write(folder / "a.parquet", rows)
    assert load("a.jsonl").rows == load("a.parquet").rows == rows


@pytest.mark.parametrize("spec", ["source.py:make", "source_module_of_test:make"])
def test_a_callable_is_called_with_its_arguments(folder: Path, spec: str) -> None:
    code = "def make(n, word='x'):\n    return ({'prompt': f'{word} {i}'} for i in range(n))\n"
    (folder / "source.py").write_text(code)
    (folder / "source_module_of_test.py").write_text(code)
    assert load(spec, arguments={"n": 2, "word": "y"}).rows == [{"prompt": "y 0"}, {"prompt": "y 1"}]


def test_a_dataset_folder_is_loaded_with_its_split(folder: Path) -> None:
    (folder / "things").mkdir()
    write(folder / "things" / "train.jsonl", ROWS[:1])
    write(folder / "things" / "test.jsonl", ROWS[1:])
    assert load("things").rows == ROWS[:1]
    assert load(str(folder / "things"), split="test").rows == ROWS[1:]


def test_columns_are_renamed_and_the_others_kept(folder: Path) -> None:
    write(folder / "a.jsonl", [{"question": "q", "answer": "a", "level": 3}])
    assert load("a.jsonl", columns={"prompt": "question"}).rows == [{"prompt": "q", "answer": "a", "level": 3}]


def test_two_columns_can_change_places(folder: Path) -> None:
    write(folder / "a.jsonl", [{"prompt": "answer", "answer": "prompt"}])
    columns = {"prompt": "answer", "answer": "prompt"}
    assert load("a.jsonl", columns=columns).rows == [{"prompt": "prompt", "answer": "answer"}]


BAD_LINES = [
    ('{"prompt": "x"', "not valid JSON"),
    ('["x"]', "must be an object with columns, is a list"),
    ('"x"', "must be an object with columns, is text"),
    ("null", "must be an object with columns, is null"),
    ('{"question": "x"}', "has no column 'prompt'; its columns: question; rename one with data.columns"),
    ('{"prompt": null}', "column 'prompt' is empty"),
    ('{"prompt": " "}', "column 'prompt' is empty"),
    ('{"prompt": []}', "column 'prompt' is empty"),
    ('{"prompt": 3}', "must be text or a list of messages, is a number"),
    ('{"prompt": {"role": "user"}}', "must be text or a list of messages, is an object"),
    ('{"prompt": ["hi"]}', "message 0 must be an object with role and content"),
    ('{"prompt": [{"role": "user"}]}', "message 0 must be an object with role and content"),
    ('{"prompt": [{"role": "human", "content": "hi"}]}', "message 0 has role 'human'; use one of system, user"),
    ('{"prompt": [{"role": "user", "content": 1}]}', "message 0 must have text as content, has a number"),
    ('{"prompt": [{"role": "assistant", "content": "hi"}]}', "the last message is the assistant's"),
    ('{"prompt": "\\ud800"}', "characters that are not valid Unicode"),
    ("[" * 100_000, "not valid JSON"),
    ("9" * 5_000, "not valid JSON"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD_LINES)
def test_a_bad_row_is_reported_with_file_line_and_reason(folder: Path, bad: str, reason: str) -> None:
    (folder / "a.jsonl").write_text(f'{{"prompt": "fine"}}\n{bad}\n')
    with pytest.raises(UserError) as caught:
        load("a.jsonl")
    message = str(caught.value)
    assert "'a.jsonl': 1 bad of 2 rows; mend them, or set data.on_bad_row: skip" in message
    assert "\n  a.jsonl:2: " in message
    assert reason in message


@pytest.mark.parametrize(("bad", "reason"), BAD_LINES)
def test_a_bad_row_is_skipped_with_the_same_report(folder: Path, bad: str, reason: str) -> None:
    (folder / "a.jsonl").write_text(f'{bad}\n{{"prompt": "fine"}}\n')
    loaded = load("a.jsonl", on_bad_row="skip")
    assert loaded.rows == [{"prompt": "fine"}]
    assert len(loaded.skipped) == 1
    assert loaded.skipped[0].startswith("a.jsonl:1: ")
    assert reason in loaded.skipped[0]


def test_text_that_is_not_utf8_is_a_bad_row_and_not_the_end_of_the_file(folder: Path) -> None:
    (folder / "a.jsonl").write_bytes(b'{"prompt": "\xff"}\n{"prompt": "fine"}\n')
    (folder / "a.csv").write_bytes(b"prompt\n\xff\nfine\n")
    for name, line in [("a.jsonl", 1), ("a.csv", 2)]:
        loaded = load(name, on_bad_row="skip")
        assert loaded.rows == [{"prompt": "fine"}]
        assert loaded.skipped[0].startswith(f"{name}:{line}: not UTF-8 text")


def test_csv_rows_of_the_wrong_width_are_bad_rows(folder: Path) -> None:
    (folder / "a.csv").write_text("prompt,answer\nq\nq,1\nq,1,2\n")
    loaded = load("a.csv", on_bad_row="skip")
    assert loaded.rows == [{"prompt": "q", "answer": "1"}]
    assert loaded.skipped == [
        "a.csv:2: has 1 cells, the header has 2",
        "a.csv:4: has 3 cells, the header has 2",
    ]


def test_only_the_first_ten_of_many_bad_rows_are_listed(folder: Path) -> None:
    (folder / "a.jsonl").write_text("{}\n" * 25)
    with pytest.raises(UserError, match="25 bad of 25 rows") as caught:
        load("a.jsonl")
    assert str(caught.value).count("has no column 'prompt'") == 10
    assert str(caught.value).endswith("... and 15 more")


def test_a_missing_source_of_a_rename_names_the_columns_there_are(folder: Path) -> None:
    write(folder / "a.jsonl", ROWS)
    with pytest.raises(UserError, match=r"a.jsonl:1: has no column 'question' .*its columns: prompt, answer"):
        load("a.jsonl", columns={"prompt": "question"})


def test_items_of_a_json_list_are_counted(folder: Path) -> None:
    (folder / "a.json").write_text('[{"prompt": "x"}, 3]')
    assert load("a.json", on_bad_row="skip").skipped == ["a.json: item 2: must be an object with columns, is a number"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b"", "there are no usable rows: it is empty"),
        ("a.csv", b"", "there are no usable rows"),
        ("a.json", b"[]", "there are no usable rows"),
        ("a.json", b"{}", "must be a list of objects, is an object"),
        ("a.json", b"[", "not valid JSON"),
        ("a.parquet", b"PAR?", "not a valid parquet file"),
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "x"}' * 99)[:-9], "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b"")[:10] + b"\xff" * 20, "cannot be read"),
        ("a.xlsx", b"x", "unknown kind of file; known: .jsonl"),
    ],
)
def test_a_file_without_usable_rows_is_explained(folder: Path, name: str, content: bytes, reason: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=reason):
        load(name, on_bad_row="skip")


@pytest.mark.parametrize("path", ["train.jsonl", "data/x/train", "./train", "part-*", "/x/y", "owner/train.parquet"])
def test_a_file_that_is_not_there_is_never_looked_for_on_the_hub(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match="no such file; paths start at the working directory"):
        load(path)


def test_a_python_file_that_is_not_there_is_no_such_file() -> None:
    with pytest.raises(UserError, match=r"data source 'absent.py:make': no such file"):
        load("absent.py:make")


@pytest.mark.parametrize("name", ["no_such_dataset", "owner/no_such_dataset"])
def test_a_dataset_that_cannot_be_loaded_is_explained(name: str) -> None:
    with pytest.raises(
        UserError, match=f"{name}.*as a Hugging Face dataset .*split 'train'.* failed: .*check the name"
    ):
        load(name)


def test_a_split_that_does_not_exist_is_explained(folder: Path) -> None:
    (folder / "things").mkdir()
    write(folder / "things" / "train.jsonl", ROWS)
    with pytest.raises(UserError, match=r"split 'validation'.* failed"):
        load("things", split="validation")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise ValueError('no disk')", "raised ValueError: no disk \\(.*source.py:2\\)"),
        ("yield {'prompt': 'x'}; 1 / 0", "raised ZeroDivisionError: .*source.py:2"),
        ("return 3", "returned a number, must return an iterable of dicts"),
        ("return {'prompt': 'x'}", "returned an object, must return an iterable of dicts"),
        ("return ['x']", "source.py:make: row 1: must be an object"),
        ("return [{1: 'x'}]", "column names must be strings"),
    ],
)
def test_a_callable_that_fails_is_explained(folder: Path, body: str, reason: str) -> None:
    (folder / "source.py").write_text(f"def make():\n    {body}\n")
    with pytest.raises(UserError, match=reason):
        load("source.py:make")


def test_arguments_that_the_callable_does_not_take_are_explained(folder: Path) -> None:
    (folder / "source.py").write_text("def make():\n    return []\n")
    with pytest.raises(UserError, match="unexpected keyword argument 'n'"):
        load("source.py:make", arguments={"n": 1})


def test_other_required_columns_can_be_asked_for(folder: Path) -> None:
    write(folder / "a.jsonl", [{"text": "hello"}, {"text": None}])
    source = SourceConfig(path="a.jsonl")
    assert load_rows(source, columns={}, on_bad_row="skip", required=("text",)) == Rows(
        [{"text": "hello"}], ["a.jsonl:1"], ["a.jsonl:2: column 'text' is empty"]
    )


def texts(path: str, *, on_bad_row: str = "fail") -> RowStream:
    return stream_rows(SourceConfig(path=path), columns={}, on_bad_row=on_bad_row, required=("text",))


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "A.TXT"])
def test_a_text_file_is_one_document_kept_as_it_is(folder: Path, name: str) -> None:
    text = "One.\r\n\n\nTwo: äöü 中\n"
    (folder / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    assert list(texts(name)) == [(name, {"text": text})]


def test_a_glob_of_text_files_gives_a_row_for_each(folder: Path) -> None:
    (folder / "2.txt").write_text("two")
    (folder / "1.txt").write_bytes(b"\xef\xbb\xbfone")
    assert list(texts("*.txt")) == [("1.txt", {"text": "one"}), ("2.txt", {"text": "two"})]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_text_file_that_is_not_utf8_is_reported_with_the_byte(folder: Path, mark: bytes) -> None:
    (folder / "1.txt").write_bytes(mark + b"caf\xe9")
    (folder / "2.txt").write_text("two")
    with pytest.raises(
        UserError, match=rf"'\*.txt': 1 bad of 2 rows.*\n  1.txt: not UTF-8 text \(byte {len(mark) + 3}\)"
    ):
        list(texts("*.txt"))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": ""}, "column 'text' is empty"),
        ({"text": " \n"}, "column 'text' is empty"),
        ({"text": None}, "column 'text' is empty"),
        ({"text": ["a"]}, "column 'text' must be text, is a list"),
        ({"text": "\ud800"}, "column 'text' has characters that are not valid Unicode"),
        ({"prompt": "a"}, "has no column 'text'; its columns: prompt; rename one with data.columns: {text: ...}"),
    ],
)
def test_a_required_text_is_checked_for_its_form(folder: Path, row: dict[str, Any], reason: str) -> None:
    (folder / "a.jsonl").write_text(json.dumps(row) + '\n{"text": "fine"}\n')
    stream = texts("a.jsonl", on_bad_row="skip")
    assert [place for place, _ in stream] == ["a.jsonl:2"]
    assert stream.problems == [f"a.jsonl:1: {reason}"]


def test_columns_that_are_not_required_are_not_checked_for_their_form(folder: Path) -> None:
    row = {"prompt": 3, "text": ["a"], "answer": "2"}
    write(folder / "a.jsonl", [row])
    source = SourceConfig(path="a.jsonl")
    assert load_rows(source, columns={}, on_bad_row="fail", required=("answer",)).rows == [row]


def test_a_stream_gives_rows_before_it_has_read_the_others(folder: Path) -> None:
    (folder / "source.py").write_text("def make():\n    yield {'text': 'x'}\n    raise ValueError('far away')\n")
    rows = iter(texts("source.py:make"))
    assert next(rows) == ("source.py:make: row 1", {"text": "x"})
    with pytest.raises(UserError, match="far away"):
        next(rows)


def test_a_stream_gives_all_usable_rows_before_it_fails_for_the_bad_ones(folder: Path) -> None:
    (folder / "a.jsonl").write_text('{"text": "x"}\n{}\n{"text": "y"}\n')
    rows = iter(texts("a.jsonl"))
    assert [next(rows)[0], next(rows)[0]] == ["a.jsonl:1", "a.jsonl:3"]
    with pytest.raises(UserError, match=r"'a.jsonl': 1 bad of 3 rows; mend them"):
        next(rows)


def test_a_stream_is_read_anew_each_time(folder: Path) -> None:
    (folder / "a.jsonl").write_text('{}\n{"text": "x"}\n')
    stream = texts("a.jsonl", on_bad_row="skip")
    assert list(stream) == list(stream) == [("a.jsonl:2", {"text": "x"})]
    assert (stream.num_rows, stream.num_bad, len(stream.problems)) == (1, 1, 1)


def test_a_stream_lists_a_thousand_problems_and_counts_the_others(folder: Path) -> None:
    (folder / "a.jsonl").write_text("{}\n" * 2_500 + '{"text": "x"}\n')
    stream = texts("a.jsonl", on_bad_row="skip")
    assert len(list(stream)) == 1
    assert (stream.num_bad, len(stream.problems)) == (2_500, 1_000)
    with pytest.raises(UserError, match=r"2500 bad of 2501 rows(.|\n)*and 2490 more$"):
        list(texts("a.jsonl"))
    (folder / "a.jsonl").write_text("{}\n" * 2_500)
    with pytest.raises(UserError, match="no usable rows: all 2500 are bad"):
        list(texts("a.jsonl", on_bad_row="skip"))


def test_loading_lists_every_problem(folder: Path) -> None:
    (folder / "a.jsonl").write_text("{}\n" * 1_500 + '{"prompt": "x"}\n')
    assert len(load("a.jsonl", on_bad_row="skip").skipped) == 1_500


def test_a_row_that_its_consumer_rejects_is_a_bad_row(folder: Path) -> None:
    write(folder / "a.jsonl", [{"text": "x"}, {"text": "y"}])
    skipping, failing = texts("a.jsonl", on_bad_row="skip"), texts("a.jsonl")
    for stream in (skipping, failing):
        last, _ = list(stream)[-1]
        stream.reject(last, "is too odd")
    skipping.check()
    assert (skipping.num_rows, skipping.problems) == (1, ["a.jsonl:2: is too odd"])
    with pytest.raises(UserError, match=r"1 bad of 2 rows.*\n  a.jsonl:2: is too odd"):
        failing.check()


def test_a_csv_cell_may_hold_a_long_document(folder: Path) -> None:
    long = "word " * 100_000
    (folder / "a.csv").write_text(f'text\n"{long}"\n')
    assert list(texts("a.csv")) == [("a.csv:2", {"text": long})]


def test_parquet_rows_are_counted_over_more_than_one_read(folder: Path) -> None:
    write(folder / "a.parquet", [{"text": f"t{i}"} for i in range(3_000)])
    assert list(texts("a.parquet"))[-1] == ("a.parquet: row 3000", {"text": "t2999"})


def test_the_files_of_a_source_are_known_without_reading_it(folder: Path) -> None:
    for name in ("b.txt", "a.txt", "c.jsonl", "things/train.jsonl", "make_rows.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("def make():\n    return []\n")

    def files(path: str) -> list[str]:
        return [os.path.relpath(file, folder) for file in source_files(SourceConfig(path=path))]

    assert files("*.txt") == ["a.txt", "b.txt"]
    assert files("c.jsonl") == ["c.jsonl"]
    assert files("things") == ["things/train.jsonl"]
    assert files("make_rows.py:make") == files("make_rows:make") == ["make_rows.py"]
    assert files("owner/name") == files("builtins:list") == []
    with pytest.raises(UserError, match="no such file"):
        files("d.txt")
