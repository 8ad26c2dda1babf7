"""Groups that share a device by turns: one is awake, and it wakes when the one before it has left."""

from __future__ import annotations

from typing import Any

import pytest

from actors.group import ActorError, Turns


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
