"""Reward functions in processes: failures of every kind are incidents with a deadline, never a hang or a silent 0."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.reward_pool import RewardPool, Scores
from engine.config import RewardsConfig, UserError
from engine.config_file import load_config
from engine.rewards.contract import RewardError, Row, Sample

USER_FILE = '''
import asyncio, math, os, signal, subprocess, sys, time
from pathlib import Path

def good(sample): return float(sample.completion == sample.row.answer)
def raising(sample): raise ValueError(f"no idea about {sample.completion}")
def exiting(sample): sys.exit(4)
def nan(sample): return math.nan
def opinion(sample): return None if sample.completion == "skip" else 1.0
def parts(sample): return {"format": 0.25, "answer": 1.0} if sample.completion != "skip" else {"other": 2.0}
def steps(sample): return [0.5, 0.25]
def huge(sample): return 3e38
async def later(sample):
    await asyncio.sleep(0.01)
    return 1.0

class Strange(Exception):
    def __init__(self, a, b):
        super().__init__(a)

def unpicklable(sample): raise Strange("strange", lambda: 0)

def hanging(sample):
    if sample.completion == "hang":
        time.sleep(600)
    return 1.0

def deaf(sample):
    """A loop in C that holds the lock and never looks at a signal."""
    if sample.completion == "hang":
        return float(sum(1 for _ in [0]) + max(range(10**12)))
    return 1.0

def with_child(sample):
    child = subprocess.Popen(["sleep", "600"])
    Path("child.pid").write_text(str(child.pid))
    time.sleep(600)

def dying(sample):
    if sample.completion == "exit":
        os._exit(3)
    if sample.completion == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    return 1.0

def second_try(sample):
    mark = Path(f"seen-{sample.id}")
    if not mark.exists():
        mark.touch()
        raise RuntimeError("the first time")
    return 1.0

def worker(sample):
    heavy = {"torch", "ray", "vllm", "transformers", "pytest"} & set(sys.modules)
    assert not heavy, heavy
    assert os.environ["OMP_NUM_THREADS"] == "1"
    return os.getpid()

def slow(sample):
    time.sleep(0.3)
    return float(sample.id)

# the batch contract, as written for TRL
def length_reward(completions, **kwargs):
    return [float(len(completion)) for completion in completions]

def match(completions, answer, **kwargs):
    return [1.0 if c == a else 0.0 for c, a in zip(completions, answer)]

def one_bad(completions, **kwargs):
    return [math.nan if c == "nan" else 1.0 for c in completions]

def wrong_length(completions): return [1.0]
def batch_hanging(completions): time.sleep(600)

async def waiting(sample):
    if sample.completion == "block":
        time.sleep(600)
    if sample.completion == "exit":
        os._exit(3)
    if sample.completion == "pid":
        return os.getpid()
    if sample.completion == "raise":
        raise ValueError("no")
    if sample.completion == "impatient":
        raise TimeoutError("of its own")
    await asyncio.sleep(600 if sample.completion == "hang" else 0.2)
    return 1.0

now, most = 0, 0
async def together(sample):
    global now, most
    if sample.completion == "most":
        return most
    now += 1
    most = max(most, now)
    await asyncio.sleep(0.5)
    now -= 1
'''


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the user's file in it."""
    (tmp_path / "mine.py").write_text(USER_FILE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextlib.contextmanager
def pool(*functions: str | dict[str, Any], **settings: Any) -> Iterator[RewardPool]:
    named = [{"function": f"mine.py:{f}"} if isinstance(f, str) else f for f in functions]
    running = RewardPool(RewardsConfig.model_validate({"functions": named, "retries": 0, **settings}))
    try:
        running.start()
        yield running
    finally:
        running.close()


def entry(function: str, **settings: Any) -> dict[str, Any]:
    return {"function": f"mine.py:{function}", **settings}


def samples(*completions: str, answer: str = "42") -> list[Sample]:
    return [Sample(100 + i, "6 * 7 = ?", c, Row({"answer": answer})) for i, c in enumerate(completions)]


def score_once(*functions: str | dict[str, Any], of: tuple[str, ...] = ("42", "41"), **settings: Any) -> Scores:
    with pool(*functions, **settings) as running:
        return running.score(samples(*of))


def only(scores: Scores) -> np.ndarray:
    """The values of the one function there is."""
    [values] = [values for name, values in scores.components.items() if "/" not in name]
    return values


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def becomes_true(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def test_each_function_gives_its_component_unweighted() -> None:
    scores = score_once("good", entry("length_reward", weight=0.5), entry("later", weight=-1.0))
    assert {name: values.tolist() for name, values in scores.components.items()} == {
        "good": [1.0, 0.0],
        "length_reward": [2.0, 2.0],
        "later": [1.0, 1.0],
    }
    assert scores.components["good"].dtype == np.float32
    assert (scores.dropped, scores.incidents) == ({}, [])


SHAPES = {
    "sample": ("(sample)", "sample.completion", "sample.row.answer", "{}"),
    "lists": ("(completions, answer, **columns)", "c", "a", "[{} for c, a in zip(completions, answer)]"),
}
VALUES = {
    "number": ("float({c} == {a})", {"": [1.0, 0.0, 0.0]}),
    "parts": (
        "{{'right': float({c} == {a}), 'short': 0.5}}",
        {"": [1.5, 0.5, 0.5], "/right": [1.0, 0.0, 0.0], "/short": [0.5, 0.5, 0.5]},
    ),
    "none": ("None if {c} == 'skip' else float({c} == {a})", {"": [1.0, 0.0, math.nan]}),
}


@pytest.mark.parametrize("spelling", ["object", "file", "module"])
def test_every_kind_of_function_is_the_same_as_an_object_a_file_or_a_module(
    folder: Path, monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    code, expected = "from engine import reward\n", {}
    for kind, shape, value in itertools.product(["", "async "], SHAPES, VALUES):
        name = f"{kind.strip()}_{shape}_{value}"
        head, completion, answer, returned = SHAPES[shape]
        expression, values = VALUES[value]
        result = returned.format(expression.format(c=completion, a=answer))
        code += f"\n@reward(weight=2.0, timeout=10)\n{kind}def {name}{head}:\n    return {result}\n"
        expected |= {name + part: held for part, held in values.items()}
    names = [name for name in expected if "/" not in name]
    (folder / "every_kind.py").write_text(code)
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])
    monkeypatch.delitem(sys.modules, "every_kind", raising=False)
    module = importlib.import_module("every_kind")
    given = {"object": [getattr(module, name) for name in names]}
    given |= {"file": [f"every_kind.py:{name}" for name in names], "module": [f"every_kind:{name}" for name in names]}
    rewards = {"functions": given[spelling]}
    config = load_config({"model": {"path": "m"}, "data": {"train": "rows.jsonl"}, "rewards": rewards})
    scores = score_once(*(entry.model_dump() for entry in config.rewards.functions), of=("42", "41", "skip"))
    assert scores.components.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(scores.components[name], values, err_msg=name)
    assert (scores.dropped, scores.incidents) == ({}, [])


def test_a_function_written_for_trl_runs_unchanged() -> None:
    assert only(score_once("match")).tolist() == [1.0, 0.0]


def test_named_parts_are_logged_beside_their_sum_and_counted_once() -> None:
    scores = score_once(entry("parts", name="p", weight=2.0), "steps", of=("42", "skip"))
    np.testing.assert_array_equal(scores.components["p"], [1.25, 2.0])
    np.testing.assert_array_equal(scores.components["p/format"], [0.25, math.nan])
    np.testing.assert_array_equal(scores.components["p/other"], [math.nan, 2.0])
    assert [steps.tolist() for steps in scores.steps["steps"]] == [[0.5, 0.25]] * 2
    assert "p" not in scores.steps


def test_no_opinion_is_no_failure() -> None:
    scores = score_once("opinion", of=("42", "skip"))
    np.testing.assert_array_equal(only(scores), [1.0, math.nan])
    assert (scores.dropped, scores.incidents) == ({}, [])


def test_no_samples_have_no_scores() -> None:
    scores = score_once("good", "length_reward", of=())
    assert (scores.size, scores.dropped, scores.incidents) == (0, {}, [])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("raising", "ValueError: no idea about 42 (FOLDER/mine.py:6)"),
        ("exiting", "SystemExit: 4 (FOLDER/mine.py:7)"),
        ("nan", "returned nan; a reward must be finite (None means no opinion)"),
        ("unpicklable", "Strange: strange (FOLDER/mine.py:21)"),
    ],
)
def test_a_failure_is_an_incident_with_its_place_and_drops_the_sample(
    function: str, message: str, folder: Path
) -> None:
    scores = score_once(function, "steps", of=("42",))
    assert scores.incidents == [
        {
            "kind": "reward_error",
            "function": function,
            "sample_id": 100,
            "attempt": 1,
            "message": message.replace("FOLDER", str(folder)),
        }
    ]
    assert scores.dropped == {0: "reward_error"}
    assert math.isnan(scores.components[function][0])
    assert scores.components["steps"][0] == 0.75


@pytest.mark.parametrize("function", ["hanging", "deaf"])
def test_a_hanging_sample_ends_at_its_deadline_and_the_others_are_scored(function: str) -> None:
    with pool(entry(function, timeout=0.6)) as running:
        start = time.monotonic()
        scores = running.score(samples("a", "hang", "b", "c"))
        assert time.monotonic() - start < 10
    np.testing.assert_array_equal(only(scores), [1, math.nan, 1, 1])
    assert scores.dropped == {1: "reward_timeout"}
    assert [(i["kind"], i["sample_id"]) for i in scores.incidents] == [("reward_timeout", 101)]
    assert scores.incidents[0]["message"] == "took longer than 0.6 s"


def test_async_calls_are_awaited_at_once_each_with_its_own_deadline() -> None:
    texts = [f"t{i}" for i in range(48)]
    texts[7], texts[9], texts[11] = "hang", "raise", "impatient"
    with pool(entry("waiting", timeout=2.0), workers=1) as running:
        running.score(samples("warm"))
        began = time.monotonic()
        scores = running.score(samples(*texts))
        elapsed = time.monotonic() - began
        process = {int(i) for i in only(running.score(samples("pid", "pid", "pid")))}
    assert scores.dropped == {7: "reward_timeout", 9: "reward_error", 11: "reward_error"}
    incidents = {i["sample_id"]: (i["kind"], i["message"].partition(" (")[0]) for i in scores.incidents}
    assert incidents == {
        107: ("reward_timeout", "took longer than 2 s"),
        109: ("reward_error", "ValueError: no"),
        111: ("reward_error", "TimeoutError: of its own"),
    }
    assert np.nansum(only(scores)) == 45
    assert elapsed < 4.0, "one after the other they would take 9.6 s, and none waits for the one that hangs"
    assert len(process) == 1


def test_calls_of_several_threads_are_awaited_together() -> None:
    with pool("together", workers=1) as running:
        threads = [threading.Thread(target=running.score, args=(samples("one"),)) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
        assert only(running.score(samples("most"))).max() >= 6


@pytest.mark.parametrize(("text", "reason"), [("block", "reward_timeout"), ("exit", "reward_error")])
def test_an_async_function_that_blocks_its_loop_or_dies_costs_its_own_sample_only(
    monkeypatch: pytest.MonkeyPatch, text: str, reason: str
) -> None:
    monkeypatch.setattr("actors.awaited_calls.BLOCKED_S", 1.0)
    with pool(entry("waiting", timeout=1.0), "good", workers=2) as running:
        first = running.score(samples("a", text, "c"))
        second = running.score(samples("d", "e"))
    assert first.dropped == {1: reason}
    assert [i["kind"] for i in first.incidents] == ["reward_blocks_loop", reason]
    assert "one by one from here on" in first.incidents[0]["message"]
    assert (second.dropped, second.incidents) == ({}, [])
    assert second.components["waiting"].tolist() == [1.0, 1.0]


def test_the_deadline_counts_from_the_start_of_the_call_not_of_the_queue() -> None:
    scores = score_once(entry("slow", timeout=1.0), of=("a",) * 5)
    assert scores.dropped == {}


def test_what_a_late_function_had_started_ends_with_it(folder: Path) -> None:
    scores = score_once(entry("with_child", timeout=1.0), of=("a",))
    assert scores.dropped == {0: "reward_timeout"}
    assert becomes_true(lambda: not alive(int((folder / "child.pid").read_text())))


@pytest.mark.parametrize(("way", "reason"), [("exit", "exit code 3"), ("segfault", "killed by SIGSEGV")])
def test_a_dying_worker_is_an_incident_and_is_replaced(way: str, reason: str) -> None:
    with pool("dying") as running:
        scores = running.score(samples("a", way, "b"))
        again = running.score(samples("c"))
    np.testing.assert_array_equal(only(scores), [1, math.nan, 1])
    assert scores.dropped == {1: "reward_error"}
    assert scores.incidents[-1]["message"] == f"the worker process died ({reason})"
    assert only(again).tolist() == [1.0]


def test_workers_that_are_killed_while_they_wait_are_replaced() -> None:
    with pool("worker") as running:
        os.kill(int(only(running.score(samples("a")))[0]), signal.SIGKILL)
        time.sleep(0.5)
        assert running.score(samples("b", "c")).dropped == {}


def test_a_failed_call_is_repeated() -> None:
    scores = score_once("second_try", retries=1)
    assert only(scores).tolist() == [1.0, 1.0]
    assert [(i["attempt"], i["sample_id"]) for i in scores.incidents] == [(1, 100), (1, 101)]
    assert scores.dropped == {}


def test_each_failed_attempt_is_counted() -> None:
    scores = score_once("raising", of=("42",), retries=2)
    assert [i["attempt"] for i in scores.incidents] == [1, 2, 3]


def test_on_error_fail_stops_with_function_sample_and_place() -> None:
    message = r"'raising' failed on sample 100 .*no idea about a .*mine.py:6"
    with pool(entry("raising", on_error="fail"), "slow") as running, pytest.raises(RewardError, match=message):
        running.score(samples("a"))


def test_a_batch_function_drops_only_the_samples_whose_reward_is_bad() -> None:
    scores = score_once("one_bad", of=("a", "nan", "b"), retries=1)
    np.testing.assert_array_equal(only(scores), [1, math.nan, 1])
    assert scores.dropped == {1: "reward_error"}
    assert [(i["sample_id"], i["attempt"]) for i in scores.incidents] == [(101, 1), (101, 2)]


def test_a_failed_batch_call_is_one_incident_and_drops_its_samples() -> None:
    scores = score_once("wrong_length", "steps", of=("a", "b"))
    assert scores.dropped == {0: "reward_error", 1: "reward_error"}
    assert [i["sample_id"] for i in scores.incidents] == [None]
    assert "returned 1 rewards for 2 samples" in scores.incidents[0]["message"]


def test_a_hanging_batch_function_ends_at_its_deadline() -> None:
    scores = score_once(entry("batch_hanging", timeout=0.5))
    assert scores.dropped == {0: "reward_timeout", 1: "reward_timeout"}


def test_a_function_that_never_succeeds_stops_the_run() -> None:
    with pool("raising", "good", stop_after_failures=3) as running:
        assert running.score(samples("a", "b")).dropped == {0: "reward_error", 1: "reward_error"}
        with pytest.raises(RewardError, match=r"'raising' has failed on 3 samples without one success .*no idea about"):
            running.score(samples("c"))


def test_one_success_keeps_a_function_that_often_fails() -> None:
    with pool("dying", stop_after_failures=2) as running:
        running.score(samples("a"))
        assert len(running.score(samples("exit", "exit", "exit")).dropped) == 3


def test_workers_are_light_and_use_one_thread() -> None:
    assert score_once("worker", of=("a",)).incidents == []


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def other(sample): return 1", r"mine.py has no 'score'; it defines other"),
        ("import no_such_package", r"importing mine.py failed: ModuleNotFoundError.*mine.py:1"),
        ("def score(a, b): return 1", r"must take one sample"),
        ("import os\nos._exit(1)", r"the process that imports the reward functions dies"),
    ],
)
def test_mistakes_in_the_users_file_surface_at_the_start(folder: Path, code: str, message: str) -> None:
    (folder / "mine.py").write_text(code + "\n")
    with pytest.raises(UserError, match=message):
        RewardPool(RewardsConfig.model_validate({"functions": ["mine.py:score"]})).start()


def test_a_file_that_hangs_while_importing_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.reward_workers.START_DEADLINE", 2.0)
    (folder / "mine.py").write_text("import time\ntime.sleep(600)\n")
    with pytest.raises(UserError, match="importing the reward functions took longer than 2 s"):
        RewardPool(RewardsConfig.model_validate({"functions": ["mine.py:score"]})).start()


def test_several_threads_score_at_once_and_get_their_own_samples() -> None:
    results: dict[int, list[float]] = {}
    with pool("slow", "match", workers=2) as running:

        def work(k: int) -> None:
            own = [Sample(10 * k + i, "q", "42", Row({"answer": "42"})) for i in range(3)]
            results[k] = running.score(own).components["slow"].tolist()

        threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
        start = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        elapsed = time.monotonic() - start
    assert results == {k: [10 * k + i for i in range(3)] for k in range(4)}
    assert elapsed < 12 * 0.3, "two workers share the twelve calls"


def test_closing_while_scoring_ends_the_wait() -> None:
    caught: list[BaseException] = []
    with pool("hanging") as running:

        def work() -> None:
            try:
                running.score(samples("hang"))
            except RuntimeError as error:
                caught.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        time.sleep(0.5)
        running.close()
        thread.join(timeout=10)
    assert [str(error) for error in caught] == ["the reward pool is closed"]


def test_close_ends_every_process_and_can_be_repeated() -> None:
    with pool("worker", workers=2) as running:
        pids = {int(p) for p in only(running.score(samples(*"abcdefgh")))}
        assert all(alive(pid) for pid in pids)
        running.close()
        assert not any(alive(pid) for pid in pids)
        running.close()
        with pytest.raises(RuntimeError, match="closed"):
            running.score(samples("a"))


PARENT = """
import sys, threading, time
from actors.reward_pool import RewardPool
from engine.config import RewardsConfig
from engine.rewards.contract import Row, Sample

print("main", flush=True)  # an unguarded script: a worker that ran it again would say so
pool = RewardPool(RewardsConfig.model_validate({"functions": ["mine.py:worker", "mine.py:hanging"], "workers": 2}))
pool.start()
made = []
thread = threading.Thread(target=lambda: made.append(pool.score([Sample(0, "q", "a", Row({}))])))
thread.start()
thread.join()  # the thread that scored first is gone; the workers must not be
time.sleep(0.5)
again = pool.score([Sample(i, "q", "a", Row({})) for i in range(8)])
assert not again.incidents, again.incidents
print(*{int(p) for p in again.components["worker"]}, flush=True)
ENDING
"""


def start_parent(folder: Path, ending: str) -> tuple[subprocess.Popen[str], list[int]]:
    (folder / "parent.py").write_text(textwrap.dedent(PARENT).replace("ENDING", ending))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    parent = subprocess.Popen(
        [sys.executable, "parent.py"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "main\n"
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert pids, parent.communicate()[1]
    return parent, pids


def test_no_worker_outlives_a_killed_parent(folder: Path) -> None:
    hang = 'threading.Thread(target=pool.score, args=([Sample(9, "q", "hang", Row({}))],)).start(); time.sleep(600)'
    parent, pids = start_parent(folder, hang)
    time.sleep(0.5)
    assert all(alive(pid) for pid in pids)
    parent.kill()
    out, err = parent.communicate(timeout=30)
    assert becomes_true(lambda: not any(alive(pid) for pid in pids))
    assert out == ""
    assert "Traceback" not in err, err


def test_a_parent_that_forgets_to_close_still_ends_quietly(folder: Path) -> None:
    parent, pids = start_parent(folder, "")
    out, err = parent.communicate(timeout=30)
    assert (parent.returncode, out, err) == (0, "", "")
    assert becomes_true(lambda: not any(alive(pid) for pid in pids))
