"""Environments in a process: many at once, each with a thread and a loop of its own; no failure is silent."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from actors import environment
from actors.environment import EnvironmentActor
from engine.config import EnvironmentConfig, UserError
from engine.environments.contract import Turn

FILE = """
import asyncio, sys, threading, time
from pathlib import Path
from engine import Turn

class Plain:
    def __init__(self, greeting="hello"): self.greeting, self.count = greeting, 0
    def reset(self, row): return [{"role": "user", "content": f"{self.greeting} {row.who}"}]
    def step(self, message):
        self.count += 1
        return Turn([{"role": "user", "content": message["content"].upper()}], reward=self.count, done=self.count == 2)

class Async(Plain):
    async def reset(self, row):
        self.queue, self.thread = asyncio.Queue(), threading.get_ident()
        self.filling = asyncio.create_task(self.queue.put(row.who))
        return []
    async def step(self, message):
        assert threading.get_ident() == self.thread
        return Turn([{"role": "user", "content": await self.queue.get()}], done=True)
    async def close(self): Path("closed").write_text(await asyncio.sleep(0, "yes"))

class Broken(Plain):
    def step(self, message):
        match message["content"]:
            case "raise": raise ValueError("no such move")
            case "exit": sys.exit(3)
            case "timeout": raise TimeoutError("mine")
            case "hang": time.sleep(600)
            case "nothing": return None
            case "text": return Turn("well")
            case "bare": return Turn([{"content": "x"}])
            case "policy": return Turn([{"role": "assistant", "content": "x"}])
            case "nan": return Turn([], reward=float("nan"))
            case "word": return Turn([], reward="good")
        return Turn([{"role": "user", "content": "ok"}])

class NoStep:
    def reset(self, row): return []
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "game.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def actor(name: str, **settings: Any) -> EnvironmentActor:
    made = EnvironmentActor(EnvironmentConfig(path=f"game.py:{name}", **settings))
    made.start()
    return made


def say(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def test_episodes_have_an_environment_each_and_its_arguments():
    running = actor("Plain", arguments={"greeting": "hi"})
    assert running.reset("a", {"who": "Ann"}) == [{"role": "user", "content": "hi Ann"}]
    assert running.reset("b", {"who": "Bob"}) == [{"role": "user", "content": "hi Bob"}]
    assert running.step("a", say("x")) == Turn([{"role": "user", "content": "X"}], 1.0, False)
    assert running.step("a", say("y")).done
    assert running.step("b", say("z")).reward == 1.0
    running.close("a")
    assert running.step("a", say("x"))[0] == "environment_error"
    running.close("never there")


def test_what_belongs_to_an_event_loop_lives_from_reset_to_close(folder):
    running = actor("Async")
    assert running.reset("a", {"who": "Ann"}) == []
    assert running.step("a", say("x")).messages == [{"role": "user", "content": "Ann"}]
    running.close("a")
    deadline = time.monotonic() + 5
    while not (folder / "closed").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (folder / "closed").read_text() == "yes"


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("raise", "step(): ValueError: no such move (FOLDER/game.py:"),
        ("exit", "step(): SystemExit: 3"),
        ("timeout", "step(): TimeoutError: mine"),
        ("nothing", "step() returned None, not a Turn(messages, reward, done)"),
        ("text", "step() returned 'well', not a list of messages"),
        ("bare", "a message has 'role' and 'content', both text"),
        ("policy", "step() returned a message of the assistant, who is the policy"),
        ("nan", "step() gave the reward nan; it must be a finite number or None"),
        ("word", "step() gave the reward 'good'"),
    ],
)
def test_every_failure_says_what_happened(what, says, folder):
    running = actor("Broken")
    running.reset("a", {"who": "Ann"})
    kind, message = running.step("a", say(what))
    assert kind == "environment_error"
    assert says.replace("FOLDER", str(folder)) in message


def test_a_hanging_episode_is_late_and_holds_up_no_other():
    running = actor("Broken", timeout=0.5)
    for name in "ab":
        running.reset(name, {"who": name})
    late: list[Any] = []
    waiting = threading.Thread(target=lambda: late.append(running.step("a", say("hang"))))
    waiting.start()
    start = time.monotonic()
    assert running.step("b", say("go on")).messages == [{"role": "user", "content": "ok"}]
    assert time.monotonic() - start < 0.4
    waiting.join(5)
    assert late == [("environment_timeout", "step() took longer than 0.5 s")]


def test_a_process_in_which_too_much_hangs_ends_itself(monkeypatch):
    ended: list[int] = []
    monkeypatch.setattr(environment, "MOST_HUNG", 2)
    monkeypatch.setattr(environment.os, "_exit", ended.append)
    running = actor("Broken", timeout=0.05)
    for name, ends in (("a", []), ("b", [1])):
        running.reset(name, {"who": name})
        running.step(name, say("hang"))
        assert ended == ends


@pytest.mark.parametrize(
    ("path", "arguments", "says"),
    [
        ("game.py:NoStep", {}, "has no method 'step'"),
        ("game.py:Plain", {"colour": 1}, "environment.arguments: game.py:Plain does not take them"),
        ("tool", {}, "must be pkg.mod:Class, path/file.py:Class or a built-in: tools"),
        ("game.py:Absent", {}, "game.py has no 'Absent'"),
    ],
)
def test_what_is_no_environment_is_told_at_the_start(path, arguments, says):
    with pytest.raises(UserError, match=says.replace("(", r"\(")):
        EnvironmentActor(EnvironmentConfig(path=path, arguments=arguments)).start()
