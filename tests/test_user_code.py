"""Finding the functions that a configuration names."""

from __future__ import annotations

import importlib
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.config import UserError
from engine.user_code import describe_error, load_object, location_of

USER_FILE = """
from dataclasses import dataclass

@dataclass
class Point:
    x: int

class Tools:
    @staticmethod
    def double(x):
        return 2 * x

def make(x):
    return Point(x)

LIMIT = 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a user's file in it; what is imported from it is forgotten afterwards."""
    (tmp_path / "mine.py").write_text(USER_FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_function_of_a_module_is_found() -> None:
    assert load_object("json:dumps", what="reward function")({"a": 1}) == '{"a": 1}'


def test_a_module_in_the_working_directory_is_found_without_being_installed() -> None:
    assert load_object("mine:make", what="reward function")(2).x == 2


def test_a_function_of_a_file_is_found_relative_to_the_working_directory() -> None:
    assert load_object("mine.py:make", what="reward function")(2).x == 2


def test_a_dotted_attribute_is_followed() -> None:
    assert load_object("mine.py:Tools.double", what="reward function")(4) == 8


def test_loading_a_file_twice_gives_the_same_module_whatever_way_the_path_is_written(folder: Path) -> None:
    first = load_object("mine.py:Point", what="x")
    assert load_object(f"{folder}/./mine.py:Point", what="x") is first


def test_objects_of_a_users_file_pickle() -> None:
    point = load_object("mine.py:make", what="x")(5)
    assert pickle.loads(pickle.dumps(point)) == point


def test_files_of_the_same_name_in_two_folders_do_not_mix(folder: Path) -> None:
    for name in ("a", "b"):
        (folder / name).mkdir()
        (folder / name / "score.py").write_text(f"def which():\n    return {name!r}\n")
    assert [load_object(f"{n}/score.py:which", what="x")() for n in ("a", "b")] == ["a", "b"]


def test_a_file_can_import_its_neighbour(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "neighbour_of_score.py").write_text("VALUE = 7\n")
    (folder / "sub" / "score.py").write_text("from neighbour_of_score import VALUE\n\ndef value():\n    return VALUE\n")
    assert load_object("sub/score.py:value", what="x")() == 7


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mine.make", "must look like pkg.mod:function or path/file.py:function"),
        ("mine.py:", "must look like"),
        (":make", "must look like"),
        ("absent.py:make", "no such file: .*absent.py"),
        ("no_such_package.mod:make", "no module named 'no_such_package'"),
        ("json.no_such_part:make", "no module named 'json.no_such_part'"),
        ("some/folder:make", "neither a module .* nor a Python file"),
        ("mine.py:mak", "mine.py has no 'mak'; did you mean 'make'\\?"),
        ("mine.py:zzzzzz", "it defines .*Point, Tools, make, LIMIT"),
        ("mine:Tools.dubble", "did you mean 'double'"),
        ("mine.py:LIMIT", "is a int, not a function"),
    ],
)
def test_a_spec_that_leads_nowhere_is_explained(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_object(spec, what="reward function")
    assert str(caught.value).startswith(f"reward function '{spec}': ")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("x = 1\ny = x / 0\n", "ZeroDivisionError: division by zero \\(.*broken.py:2\\)"),
        ("def f(:\n", "SyntaxError: invalid syntax \\(.*broken.py:1\\)"),
        ("import json\n\njson.loads('{')\n", "JSONDecodeError: .* \\(.*broken.py:3\\)"),
        ("import no_such_package\n", "ModuleNotFoundError: No module named 'no_such_package' \\(.*broken.py:1\\)"),
        ("import sys\nsys.exit(3)\n", "SystemExit: 3 \\(.*broken.py:2\\)"),
    ],
)
@pytest.mark.parametrize("spec", ["broken.py:f", "broken:f"])
def test_an_error_while_importing_shows_itself_and_its_line(folder: Path, spec: str, body: str, message: str) -> None:
    (folder / "broken.py").write_text(body)
    with pytest.raises(UserError, match=f"importing .* failed: {message}"):
        load_object(spec, what="data source")


def test_a_file_that_failed_to_import_can_be_mended_and_loaded_again(folder: Path) -> None:
    (folder / "broken.py").write_text("1 / 0\n")
    with pytest.raises(UserError):
        load_object("broken.py:f", what="x")
    (folder / "broken.py").write_text("def f():\n    return 'mended, and longer'\n")
    assert load_object("broken.py:f", what="x")() == "mended, and longer"


def test_an_exception_whose_message_cannot_be_shown_is_still_described() -> None:
    class MuteError(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert describe_error(MuteError()) == "MuteError: (its message cannot be shown)"


def test_a_function_of_a_package_is_located_by_its_module_and_one_of_a_lone_file_by_the_file(folder: Path) -> None:
    sys.path.insert(0, str(folder))
    mine = importlib.import_module("mine")
    assert location_of(json.dumps) == "json:dumps"
    assert location_of(Path) == f"{Path.__module__}:Path"
    assert location_of(mine.Tools.double) == f"{folder}/mine.py:Tools.double"
    loaded = load_object("mine.py:make", what="x")
    assert load_object(location_of(loaded), what="x") is loaded


def test_what_other_processes_cannot_import_has_no_location() -> None:
    def inner() -> None: ...

    for function in (inner, lambda: 0, json.JSONEncoder().encode, type("Made", (), {})()):
        with pytest.raises(UserError, match="other processes cannot import it; define it by its own name"):
            location_of(function)


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from engine import load_config, run
from engine.user_code import load_object, location_of

def correct(sample):
    return 1.0

print(location_of(correct))
raw = {{"model": {{"path": "m"}}, "data": {{"train": "rows.jsonl"}}}}
config = load_config(raw | {{"rewards": {{"functions": [correct]}}}})
{end}
"""


def script(folder: Path, end: str) -> subprocess.CompletedProcess[str]:
    (folder / "my_run.py").write_text(SCRIPT.format(root=str(Path(__file__).parents[1]), end=end))
    command = [sys.executable, "my_run.py"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_a_function_of_the_main_script_is_located_by_its_file(folder: Path) -> None:
    done = script(folder, "print(config.rewards.functions[0].function)")
    assert done.stdout.splitlines() == [f"{folder}/my_run.py:correct"] * 2, done.stderr


def test_a_script_that_runs_when_it_is_imported_is_told_to_guard_its_call(folder: Path) -> None:
    done = script(folder, "load_object(location_of(correct), what='reward') if __name__ == '__main__' else run(config)")
    assert "run() was called while" in done.stderr
    assert "call it under `if __name__ == '__main__':`" in done.stderr
