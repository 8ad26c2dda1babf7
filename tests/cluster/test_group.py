"""WorkerGroup on a real Ray: no wait without a deadline, no error that hides behind another rank's hang."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest
import ray

from actors.group import ActorDiedError, ActorError, BrokenError, DeadlineError, Slots, WorkerGroup, start_all
from engine.config import UserError
from engine.schedule.incidents import Incident
from engine.schedule.placement import Seat

pytestmark = pytest.mark.usefixtures("ray_session")


class Worker:
    def __init__(self, rank: int, broken: bool = False) -> None:
        self.rank = rank
        self.broken = broken

    def start(self) -> None:
        if self.broken:
            raise OSError("no such device")

    def double(self, value: int) -> int:
        return 2 * value + self.rank

    def fail_or_hang(self) -> None:
        if self.rank == 0:
            raise KeyError("weights")
        time.sleep(600)

    def hang(self) -> None:
        time.sleep(600 if self.rank == 1 else 0)

    def pid(self) -> int:
        return os.getpid()

    def die_once(self, mark: str) -> int:
        with contextlib.suppress(FileNotFoundError):
            Path(mark).unlink()
            os._exit(3)
        return self.rank

    def break_down(self) -> None:
        raise BrokenError("the device fell off")

    def die(self) -> None:
        if self.rank == 1:
            os._exit(3)
        time.sleep(600)

    def complain(self) -> None:
        raise UserError("data.train: mend the rows")


def make_group(placement, arguments=((0,), (1,)), **options) -> WorkerGroup:
    slots = Slots(placement, [Seat(rank, {"CPU": 1}) for rank in range(2)])
    return WorkerGroup("worker", Worker, slots, arguments=arguments, env={}, **options)


@pytest.fixture
def placement():
    placement = ray.util.placement_group([{"CPU": 1}] * 2)
    assert placement.wait(30)
    yield placement
    ray.util.remove_placement_group(placement)


def test_results_come_back_in_rank_order(placement):
    group = make_group(placement)
    start_all([group], 60)
    assert group.call("double", 5, timeout_s=60) == [10, 11]
    assert group.scatter("double", [1, 2], timeout_s=60) == [2, 5]


def test_one_ranks_exception_surfaces_at_once_even_if_others_hang(placement):
    group = make_group(placement)
    start_all([group], 60)
    start = time.monotonic()
    with pytest.raises(ActorError, match=r"worker\[0\]: fail_or_hang\(\) raised after .* s: KeyError: 'weights'"):
        group.call("fail_or_hang", timeout_s=300)
    assert time.monotonic() - start < 30


def test_a_missed_deadline_names_who_is_late_with_what(placement):
    group = make_group(placement)
    start_all([group], 60)
    with pytest.raises(DeadlineError, match=r"^worker\[1\]: no answer from hang\(\) after 2\.\d s \(deadline 2 s"):
        group.call("hang", timeout_s=2)


def test_a_dead_rank_is_an_error_that_says_so(placement):
    group = make_group(placement)
    start_all([group], 60)
    with pytest.raises(ActorError, match=r"worker\[1\]: died after .* s in die\(\)"):
        group.call("die", timeout_s=120)


def test_a_rank_that_does_not_start_is_named_with_its_cause(placement):
    group = make_group(placement, arguments=((0,), (1, True)))
    with pytest.raises(ActorError, match=r"worker\[1\]: start\(\) raised after .* s: OSError: no such device"):
        start_all([group], 60)


def test_the_users_mistakes_come_back_as_such(placement):
    group = make_group(placement)
    start_all([group], 60)
    with pytest.raises(UserError, match=r"^data\.train: mend the rows$"):
        group.call("complain", timeout_s=60)


def test_a_rank_without_state_is_replaced_and_asked_again(placement, tmp_path):
    incidents: list[Incident] = []
    group = make_group(placement, replaceable=True, report=incidents.append)
    start_all([group], 60)
    mark = tmp_path / "mark"
    mark.touch()
    assert sorted(group.call("die_once", str(mark), timeout_s=60)) == [0, 1]
    assert [(i.kind, i.action) for i in incidents] == [("actor_died", "replaced")]


def test_a_rank_that_is_given_up_on_ends_the_call_that_waits_for_it(placement):
    def give_up(incident: Incident) -> None:
        raise RuntimeError("too many")

    group = make_group(placement, replaceable=True, report=give_up)
    start_all([group], 60)
    with pytest.raises(RuntimeError, match="too many"):
        group.call("die", timeout_s=60)


def test_a_stopped_process_is_found_by_its_silence_long_before_the_deadline(placement):
    incidents: list[Incident] = []
    group = make_group(placement, replaceable=True, silence_s=3.0, report=incidents.append)
    start_all([group], 60)
    os.kill(group.call("pid", timeout_s=60)[1], signal.SIGSTOP)
    start = time.monotonic()
    assert group.call("double", 5, timeout_s=300) == [10, 11]
    assert time.monotonic() - start < 60
    [incident] = incidents
    assert (incident.kind, incident.actor) == ("actor_silent", "worker[1]")
    assert "no sign of life for" in incident.message


def test_a_long_call_is_not_silence(placement):
    group = make_group(placement, silence_s=4.0)
    start_all([group], 60)
    with pytest.raises(DeadlineError):
        group.call("hang", timeout_s=9)


def test_an_actor_that_says_it_is_broken_counts_as_dead(placement):
    group = make_group(placement)
    start_all([group], 60)
    with pytest.raises(ActorDiedError, match="the device fell off"):
        group.call("break_down", timeout_s=60)


def test_a_group_that_is_built_anew_asks_for_its_arguments_again(placement):
    asked: list[int] = []

    def arguments() -> list[tuple[int]]:
        asked.append(len(asked))
        return [(10 * len(asked),), (10 * len(asked) + 1,)]

    group = make_group(placement, arguments)
    start_all([group], 60)
    before = group.call("pid", timeout_s=60)
    group.rebuild()
    assert group.call("double", 0, timeout_s=60) == [20, 21]
    assert not set(before) & set(group.call("pid", timeout_s=60))
