"""No engine serves that has not acknowledged the version that is expected."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.schedule.fleet import Fleet

SIZE = 3


def up(fleet: Fleet, version: int) -> None:
    for member in range(SIZE):
        fleet.started(member)
    fleet.expect(version)
    for member in range(SIZE):
        fleet.acknowledged(member, version)


def test_an_engine_that_has_started_is_stale_until_it_acknowledges():
    fleet = Fleet(SIZE)
    assert fleet.starting() == [0, 1, 2]
    fleet.started(1)
    fleet.expect(0)
    assert (fleet.serving(), fleet.stale()) == ([], [1])
    fleet.acknowledged(1, 0)
    assert (fleet.serving(), fleet.starting()) == ([1], [0, 2])


def test_a_new_version_makes_all_stale_and_an_old_acknowledgement_changes_nothing():
    fleet = Fleet(SIZE)
    up(fleet, 0)
    fleet.expect(1)
    assert (fleet.serving(), fleet.stale()) == ([], [0, 1, 2])
    fleet.acknowledged(0, 0)
    assert fleet.serving() == []
    fleet.acknowledged(2, 1)
    assert fleet.serving() == [2]


def test_a_lost_engine_comes_back_by_the_same_way():
    fleet = Fleet(SIZE)
    up(fleet, 4)
    fleet.lost(1)
    assert (fleet.serving(), fleet.starting()) == ([0, 2], [1])
    with pytest.raises(AssertionError, match="acknowledged weights before it was up"):
        fleet.acknowledged(1, 4)
    fleet.started(1)
    assert fleet.stale() == [1]
    with pytest.raises(AssertionError, match="was stale before it started"):
        fleet.started(1)


def test_when_no_version_counts_nobody_serves():
    fleet = Fleet(SIZE)
    up(fleet, 4)
    fleet.expect(None)
    assert (fleet.serving(), fleet.stale()) == ([], [0, 1, 2])


MOVES = st.lists(
    st.one_of(
        st.tuples(st.just("expect"), st.integers(0, 3)),
        st.tuples(st.just("started"), st.integers(0, SIZE - 1)),
        st.tuples(st.just("lost"), st.integers(0, SIZE - 1)),
        st.tuples(st.just("acknowledged"), st.tuples(st.integers(0, SIZE - 1), st.integers(0, 3))),
    )
)


@given(MOVES)
def test_whatever_happens_who_serves_has_acknowledged_the_expected_version_since_it_was_expected(moves):
    fleet = Fleet(SIZE)
    holds: dict[int, int | None] = dict.fromkeys(range(SIZE))
    for move, what in moves:
        match move:
            case "expect":
                fleet.expect(what)
                holds = dict.fromkeys(holds)
            case "started" if what in fleet.starting():
                fleet.started(what)
            case "lost":
                fleet.lost(what)
                holds[what] = None
            case "acknowledged" if what[0] not in fleet.starting():
                fleet.acknowledged(*what)
                holds[what[0]] = what[1] if what[1] == fleet.version else holds[what[0]]
        assert sorted(fleet.serving() + fleet.stale() + fleet.starting()) == list(range(SIZE))
        assert fleet.serving() == [m for m, version in holds.items() if version is not None]
