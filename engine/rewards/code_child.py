"""Runs tests on a solution, inside the sandbox: a program for `engine.rewards.code` to send, never imported.

Two processes, so that the code under test never meets what judges it:

    tests (this process)  --call f(1, 2)-->   solution (a fork from before the tests were read)
                          <--[3] as JSON---

The solution gets the arguments of one call at a time. What it gives back is rebuilt here from plain data, so that a
type of its own, with an `==` that is always true, never arrives. It holds neither the tests, nor the token that every
verdict carries, nor this process's stdout; modules are never imported from the folder that it can write to.
"""

from __future__ import annotations

import ast
import builtins
import functools
import importlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

_MOST_ITEMS = 100_000
"""Of an iterator that a solution returns."""
_PLAIN: tuple[Callable[..., Any], ...] = (bool, int, float, str)
_GROUPS: dict[str, Callable[..., Any]] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


def encode(value: Any, keep: Callable[[Any], int]) -> Any:
    """A value as JSON can hold it; what is no plain data becomes a number that `keep` gives for it."""
    if value is None:
        return None
    for kind in _PLAIN:
        if isinstance(value, kind):  # type: ignore[arg-type]
            return kind(value)
    for name, group in _GROUPS.items():
        if isinstance(value, group):  # type: ignore[arg-type]
            return {name: [encode(item, keep) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key, keep), encode(item, keep)] for key, item in value.items()]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, Iterator | range | map | filter | zip | type({}.keys()) | type({}.values())):
        return {"iterator": [encode(item, keep) for item in itertools.islice(value, _MOST_ITEMS)]}
    return {"object": keep(value)}


def decode(value: Any, find: Callable[[int], Any]) -> Any:
    """The other way round; `find` gives what a number stands for."""
    if not isinstance(value, dict):
        return value
    ((name, held),) = value.items()
    if name in _GROUPS:
        return _GROUPS[name](decode(item, find) for item in held)
    if name == "dict":
        return {decode(key, find): decode(item, find) for key, item in held}
    if name == "iterator":
        return iter([decode(item, find) for item in held])
    if name == "bytes":
        return bytes.fromhex(held)
    return complex(*held) if name == "complex" else find(held)


# The solution's side


def serve(source: str, requests: Any, answers: Any) -> None:
    """Run the solution, then do what the tests ask for: ["name", n], ["get", o, n], ["set", o, n, v], ["call", ...]."""
    scope: dict[str, Any] = {"__name__": "solution"}
    objects: list[Any] = []

    def keep(value: Any) -> int:
        number = next((i for i, held in enumerate(objects) if held is value), len(objects))
        if number == len(objects):
            objects.append(value)
        return number

    def reply(request: list[Any]) -> dict[str, Any]:
        action, *rest = request
        if action == "name":
            return {"value": encode(named(rest[0]), keep)}
        if action == "get":
            return {"value": encode(getattr(objects[rest[0]], rest[1]), keep)}
        if action == "set":
            setattr(objects[rest[0]], rest[1], decode(rest[2], objects.__getitem__))
            return {"value": None}
        positional, keywords = (decode(part, objects.__getitem__) for part in rest[1:])
        value = encode(objects[rest[0]](*positional, **keywords), keep)
        return {"value": value, "arguments": encode(positional, keep)}

    def named(name: str) -> Any:
        if name not in scope and "Solution" in scope:
            return getattr(scope["Solution"](), name)
        return scope[name]

    trouble: dict[str, Any] = {}
    try:
        exec(compile(source, "solution.py", "exec"), scope)
    except BaseException as error:
        trouble = {"error": [type(error).__name__, str(error)]}
    for line in requests:
        try:
            answer = trouble or reply(json.loads(line))
            text = json.dumps(answer)
        except BaseException as error:
            text = json.dumps({"error": [type(error).__name__, str(error)]})
        answers.write(text + "\n")
        answers.flush()


# The tests' side


class SolutionError(Exception):
    """The solution raised an exception of its own, or is gone."""


class Remote:
    """Something that lives with the solution: it can be called, and its attributes read and set; equal only to itself,
    so that the solution has no say in a comparison."""

    def __init__(self, solution: Solution, number: int) -> None:
        object.__setattr__(self, "_where", (solution, number))

    def __call__(self, *positional: Any, **keywords: Any) -> Any:
        solution, number = object.__getattribute__(self, "_where")
        return solution.call(number, positional, keywords)

    def __getattr__(self, name: str) -> Any:
        solution, number = object.__getattribute__(self, "_where")
        return solution.ask("get", number, name)

    def __setattr__(self, name: str, value: Any) -> None:
        solution, number = object.__getattribute__(self, "_where")
        solution.ask("set", number, name, encode(value, solution.number))


class Solution:
    """The other end of the two pipes."""

    def __init__(self, requests: Any, answers: Any) -> None:
        self._requests, self._answers = requests, answers
        self._remotes: dict[int, Remote] = {}

    def ask(self, *request: Any) -> Any:
        """Have the solution do something; what it gives back, or raises."""
        return decode(self._exchange(request)["value"], self._remote)

    def call(self, function: int, positional: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Call something of the solution's; what it did to its arguments is done to ours."""
        answer = self._exchange(["call", function, *(encode(part, self.number) for part in (positional, keywords))])
        for before, after in zip(positional, decode(answer["arguments"], self._remote), strict=True):
            change(before, after)
        return decode(answer["value"], self._remote)

    def number(self, value: Any) -> int:
        """What the solution calls a thing that it lent."""
        if type(value) is not Remote:
            raise TypeError(f"a {type(value).__name__} cannot be passed to the solution")
        return object.__getattribute__(value, "_where")[1]

    def _exchange(self, request: Any) -> dict[str, Any]:
        try:
            self._requests.write(json.dumps(request) + "\n")
            self._requests.flush()
            line = self._answers.readline()
        except OSError:
            line = ""
        if not line:
            raise SolutionError("the solution has ended")
        answer = json.loads(line)
        if "error" in answer:
            kind = getattr(builtins, str(answer["error"][0]), None)
            ordinary = isinstance(kind, type) and issubclass(kind, Exception)
            raise (kind if ordinary and kind else SolutionError)(str(answer["error"][1]))
        return answer

    def _remote(self, number: int) -> Remote:
        return self._remotes.setdefault(number, Remote(self, number))


def change(before: Any, after: Any) -> None:
    """Do to an argument what the solution did to its copy."""
    if type(before) is type(after) is list:
        before[:] = after
    elif type(before) is type(after) and isinstance(before, dict | set):
        before.clear()
        before.update(after)


class Names(dict[str, Any]):
    """The globals of the tests: their own, then builtins and the standard library, and only then the solution's, so
    that no `sorted` or `math` of the solution's judges it; `tested` are the solution's in any case."""

    def __init__(self, solution: Solution, tested: set[str]) -> None:
        super().__init__({"__name__": "tests"})
        self._solution, self._tested = solution, tested

    def __missing__(self, name: str) -> Any:
        if name not in self._tested:
            if name.startswith("__") or hasattr(builtins, name):
                raise KeyError(name)
            if name in sys.stdlib_module_names:
                return importlib.import_module(name)
        self[name] = self._solution.ask("name", name)
        return self[name]


def tested_names(tests: dict[str, Any]) -> set[str]:
    """The function that is named; else, where the tests use nothing but names that Python has, those (`def sum`)."""
    if tests["function"]:
        return {tests["function"]}
    trees = [ast.walk(ast.parse(text)) for text in (tests["setup"], *tests["programs"])]
    used = {node.id for tree in trees for node in tree if isinstance(node, ast.Name)}
    known = {name for name in used if hasattr(builtins, name) or name in sys.stdlib_module_names}
    return used if used == known else set()


def same(got: Any, expected: Any) -> bool:
    """Equal; a tuple is a list, as in JSON, and a list with one thing in it also stands for that thing (APPS)."""
    return listed(got) == expected or (isinstance(expected, list) and len(expected) == 1 and listed(got) == expected[0])


def listed(value: Any) -> Any:
    """The same with lists for tuples."""
    if isinstance(value, list | tuple):
        return [listed(item) for item in value]
    return {key: listed(item) for key, item in value.items()} if isinstance(value, dict) else value


def checks(tests: dict[str, Any], names: Names) -> Iterator[Callable[[], None]]:
    """Each test as something that raises if it fails."""

    def calls(arguments: list[Any], expected: Any) -> None:
        assert same(names[tests["function"]](*arguments), expected)

    def run(text: str) -> None:
        exec(compile(text, "tests.py", "exec"), names)
        if tests["function"]:
            names["check"](names[tests["function"]])

    yield from (functools.partial(calls, arguments, expected) for arguments, expected in tests["calls"])
    yield from (functools.partial(run, text) for text in tests["programs"])


def judge(tests: dict[str, Any], solution: Solution, tell: Callable[[dict[str, Any]], None]) -> None:
    """Run the tests; one verdict for each, as soon as it is there."""
    try:
        names = Names(solution, tested_names(tests))
    except SyntaxError as error:
        tell({"broken": str(error)})
        return
    for position, check in enumerate(checks(tests, names)):
        try:
            if not position:
                exec(tests["setup"], names)
            check()
        except BaseException:
            tell({"passed": False})
            if tests["stop"]:
                return
        else:
            tell({"passed": True})


def main() -> None:
    """Fork the solution off, and only then read the tests."""
    sys.path[:] = [folder for folder in sys.path if folder]
    sys.set_int_max_str_digits(0)
    with open("solution.py", encoding="utf-8") as file:
        source = file.read()
    (solution_in, tests_out), (tests_in, solution_out) = os.pipe(), os.pipe()
    nothing = os.open(os.devnull, os.O_RDWR)
    if not os.fork():
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        os.close(tests_out)
        os.close(tests_in)
        with open(solution_in) as requests, open(solution_out, "w") as answers:
            serve(source, requests, answers)
        os._exit(0)
    os.close(solution_in)
    os.close(solution_out)
    tests = json.load(sys.stdin)
    verdicts = os.dup(1)
    os.dup2(nothing, 1)  # for what the tests print

    def tell(verdict: dict[str, Any]) -> None:
        os.write(verdicts, json.dumps(verdict | {"token": tests["token"]}).encode() + b"\n")

    with open(tests_out, "w") as requests, open(tests_in) as answers:
        judge(tests, Solution(requests, answers), tell)
    os._exit(0)


if __name__ == "__main__":
    main()
