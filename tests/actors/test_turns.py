"""Groups that share a device by turns: one is awake, and it wakes when the one before it has left."""

from __future__ import annotations

from typing import Any

import pytest

from actors.group import ActorError, Turns, start_all


class Group:
    """Records the calls that all ranks of a group get."""

    def __init__(self, name: str, calls: list[tuple[str, str]], fails: str = "") -> None:
        self.name, self.calls, self.fails = name, calls, fails

    def call(self, method: str, *, timeout_s: float, in_turn: bool) -> None:
        assert not in_turn, "a call that takes the turn itself would never end"
        if method == self.fails:
            raise ActorError(self.name)
        self.calls.append((self.name, method))


def test_each_group_starts_on_a_device_that_the_one_before_has_left():
    calls: list[tuple[str, str]] = []
    turns: Any = Turns(1.0)
    policy, critic = Group("policy", calls), Group("critic", calls)
    turns.start(policy, 1.0)
    turns.start(critic, 1.0)
    assert calls == [("policy", "start"), ("policy", "sleep"), ("critic", "start")]


def test_a_group_is_woken_once_and_after_the_other_sleeps():
    calls: list[tuple[str, str]] = []
    turns: Any = Turns(1.0)
    policy, critic = Group("policy", calls), Group("critic", calls)
    turns.start(policy, 1.0)
    turns.start(critic, 1.0)
    calls.clear()
    for group in (critic, policy, policy, critic):
        turns.take(group)
    assert calls == [("critic", "sleep"), ("policy", "wake"), ("policy", "sleep"), ("critic", "wake")]


def test_nobody_wakes_beside_a_group_that_did_not_leave():
    calls: list[tuple[str, str]] = []
    turns: Any = Turns(1.0)
    stuck, other = Group("stuck", calls, fails="sleep"), Group("other", calls)
    turns.start(stuck, 1.0)
    with pytest.raises(ActorError, match="stuck"):
        turns.take(other)
    assert ("other", "wake") not in calls


def test_whoever_failed_to_wake_is_woken_again_and_nobody_is_put_to_sleep_twice():
    calls: list[tuple[str, str]] = []
    turns: Any = Turns(1.0)
    policy, critic = Group("policy", calls), Group("critic", calls, fails="wake")
    turns.start(policy, 1.0)
    with pytest.raises(ActorError, match="critic"):
        turns.take(critic)
    critic.fails = ""
    turns.take(critic)
    assert calls == [("policy", "start"), ("policy", "sleep"), ("critic", "wake")]


def test_starting_has_a_deadline_of_its_own_and_the_turns_have_another():
    class Timed(Group):
        def call(self, method: str, *, timeout_s: float, in_turn: bool) -> None:
            self.calls.append((method, str(timeout_s)))

    calls: list[tuple[str, str]] = []
    turns: Any = Turns(1.0)
    one, other = Timed("one", calls), Timed("other", calls)
    turns.start(one, 60.0)
    turns.start(other, 70.0)
    turns.take(one)
    assert calls == [("start", "60.0"), ("sleep", "1.0"), ("start", "70.0"), ("sleep", "1.0"), ("wake", "1.0")]


def test_groups_that_take_turns_start_one_after_the_other_in_their_order():
    calls: list[tuple[str, str]] = []
    shared, own = Turns(1.0), Turns(1.0)
    groups: list[Any] = [Group(name, calls) for name in ("rollout", "reference", "policy", "critic")]
    for group, turns in zip(groups, (shared, own, shared, shared), strict=True):
        group.turns = turns
    start_all(groups, 1.0)
    assert calls == [
        ("rollout", "start"),
        ("reference", "start"),
        ("rollout", "sleep"),
        ("policy", "start"),
        ("policy", "sleep"),
        ("critic", "start"),
    ]
