"""How far generation runs ahead, and how old a group may be when it is trained."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.schedule.admission import Admission


def started(admission: Admission, first: int, count: int) -> list[int]:
    groups = list(range(first, first + count))
    for group in groups:
        admission.start(group)
    return groups


def test_without_staleness_a_step_takes_all_its_groups_and_the_next_start_after_its_weights() -> None:
    admission = Admission(2, 0, steps=3)
    started(admission, 0, admission.room())
    assert admission.room() == 0
    admission.finish(1)
    assert not admission.ready()
    admission.finish(0)
    assert admission.take() == [0, 1]
    assert admission.room() == 0, "the weights are not out yet"
    admission.trained()
    assert admission.room() == 2


def test_generation_runs_ahead_by_as_many_steps_as_staleness_allows() -> None:
    admission = Admission(4, 2, steps=100)
    assert admission.room() == 12
    for group in started(admission, 0, 4):
        admission.finish(group)
    assert admission.room() == 8, "what waits counts like what runs"
    admission.take()
    assert admission.room() == 8, "and so does what is being trained"
    admission.trained()
    assert admission.room() == 12


def test_no_group_starts_that_no_step_would_take() -> None:
    assert Admission(4, 5, steps=2).room() == 8


def test_a_younger_group_passes_an_older_one_that_has_time() -> None:
    admission = Admission(1, 1, steps=9)
    started(admission, 0, 2)
    admission.finish(1)
    assert admission.take() == [1]


def test_a_group_that_is_due_is_waited_for() -> None:
    admission = Admission(1, 1, steps=9)
    started(admission, 0, 2)
    admission.finish(1)
    admission.take()
    admission.trained()
    started(admission, 2, 1)
    admission.finish(2)
    assert not admission.ready(), "group 0 may not become two versions old"
    admission.finish(0)
    assert admission.take() == [0]


def test_older_groups_keep_enough_steps_though_none_is_due_yet() -> None:
    admission = Admission(4, 2, steps=9)
    started(admission, 0, 12)
    for group in range(4):
        admission.finish(group)
    assert admission.take() == [0, 1, 2, 3]
    admission.trained()
    started(admission, 12, 4)
    for group in range(12, 16):
        admission.finish(group)
    assert not admission.ready(), "taking all four would leave eight groups for the one step they are due in"
    for group in range(4, 8):
        admission.finish(group)
    assert admission.take() == [4, 5, 6, 7]


def test_a_rejected_group_is_replaced_or_leaves_its_place_empty() -> None:
    admission = Admission(2, 0, steps=2)
    started(admission, 0, 2)
    admission.reject(0, replace=True)
    assert admission.room() == 1
    admission.start(2)
    admission.reject(2, replace=False)
    assert admission.room() == 0
    admission.finish(1)
    assert admission.take() == [1]
    admission.trained()
    assert admission.room() == 2


def test_more_than_there_is_room_for_cannot_start() -> None:
    admission = Admission(1, 0, steps=9)
    admission.start(0)
    with pytest.raises(AssertionError, match="beyond the bound"):
        admission.start(1)


def test_what_was_under_way_starts_again_after_a_resume() -> None:
    admission = Admission(2, 1, steps=9)
    admission.resume(3)
    assert admission.room() == 4
    started(admission, 0, 4)
    for group in (2, 3):
        admission.finish(group)
    assert admission.take() == [2, 3]


@given(groups=st.integers(1, 5), staleness=st.integers(0, 4), steps=st.integers(1, 12), seed=st.integers(0, 10**6))
def test_no_group_is_ever_older_than_allowed_and_every_step_gets_its_groups(
    groups: int, staleness: int, steps: int, seed: int
) -> None:
    random = Random(seed)
    admission = Admission(groups, staleness, steps)
    born: dict[int, int] = {}
    running: list[int] = []
    taken: list[int] = []
    for version in range(steps):
        while not admission.ready():
            while admission.room() and random.random() < 0.7:
                admission.start(len(born))
                running.append(len(born))
                born[len(born)] = version
            if running and random.random() < 0.8:
                group = running.pop(random.randrange(len(running)))
                if random.random() < 0.2:
                    admission.reject(group, replace=random.random() < 0.5)
                else:
                    admission.finish(group)
        batch = admission.take()
        assert all(version - born[group] <= staleness for group in batch)
        assert len(batch) <= groups
        taken += batch
        admission.trained()
    assert len(set(taken)) == len(taken)
    assert not running, "nothing is left over at the end"
