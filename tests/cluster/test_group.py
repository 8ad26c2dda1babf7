"""WorkerGroup on a real Ray: no wait without a deadline, no error that hides behind another rank's hang."""

from __future__ import annotations

import os
import time

import pytest
import ray

from actors.group import ActorError, DeadlineError, Slots, WorkerGroup, start_all
from engine.config import UserError
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

    def die(self) -> None:
        if self.rank == 1:
            os._exit(3)
        time.sleep(600)

    def complain(self) -> None:
        raise UserError("data.train: mend the rows")


def make_group(placement, arguments=((0,), (1,))) -> WorkerGroup:
    slots = Slots(placement, [Seat(rank, {"CPU": 1}) for rank in range(2)])
    return WorkerGroup("worker", Worker, slots, arguments=arguments, env={})


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
