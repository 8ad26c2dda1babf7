"""An engine that jumps from change to change does what one that takes every step does."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.schedule.costs import Costs
from engine.simulation.engines import Engine
from tests.simulation.scenarios import COSTS, FREE

STEP = replace(FREE, decode_step_s=1.0)


def finishes(engine: Engine) -> dict[int, float]:
    """Group of one sample -> when it finishes."""
    found = {}
    while (time := engine.next_finish()) < math.inf:
        found |= {group: time for group, _, _ in engine.finish()}
    return found


def finishes_step_by_step(costs: Costs, slots: int, prompt: int, lengths: list[int]) -> dict[int, float]:
    """The same, one engine step after the other."""
    time, queue, running, found = 0.0, deque(enumerate(lengths)), dict[int, tuple[int, int]](), dict[int, float]()
    while queue or running:
        while queue and len(running) < slots:
            group, length = queue.popleft()
            running[group] = (length, prompt)
            time += prompt * costs.prefill_token_s
        context = sum(tokens for _, tokens in running.values())
        time += costs.decode_step_s + len(running) * costs.decode_sample_s + context * costs.decode_context_s
        running = {group: (left - 1, tokens + 1) for group, (left, tokens) in running.items()}
        done = [group for group, (left, _) in running.items() if left == 0]
        found |= dict.fromkeys(done, time)
        for group in done:
            del running[group]
    return found


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12), slots=st.integers(1, 5), prompt=st.integers(0, 9))
def test_jumps_take_as_long_as_steps(lengths: list[int], slots: int, prompt: int) -> None:
    costs = replace(COSTS, decode_context_s=1e-4)
    engine = Engine(costs, slots)
    for group, length in enumerate(lengths):
        engine.give(0.0, group, prompt, [length])
    assert finishes(engine) == pytest.approx(finishes_step_by_step(costs, slots, prompt, lengths))


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6), at=st.floats(0.0, 0.5))
def test_looking_at_an_engine_in_between_changes_nothing(lengths: list[int], at: float) -> None:
    costs = replace(COSTS, decode_context_s=1e-4, publish_s=0.0)
    engine, other = Engine(costs, 4), Engine(costs, 4)
    for group, length in enumerate(lengths):
        engine.give(0.0, group, 3, [length])
        other.give(0.0, group, 3, [length])
    if at < engine.next_finish():
        engine.load(at, 1, keep=1, recompute=False)
    assert finishes(engine) == pytest.approx(finishes(other))


def test_samples_beyond_the_slots_begin_in_order_as_others_end() -> None:
    engine = Engine(STEP, 2)
    engine.give(0.0, 0, 0, [5, 1])
    engine.give(0.0, 1, 0, [2, 9])
    ends = []
    while (time := engine.next_finish()) < math.inf:
        ends += [(group, start, end, time) for group, start, end in engine.finish()]
    assert ends == [(0, 0, 1, 1.0), (1, 1, 3, 3.0), (0, 0, 5, 5.0), (1, 3, 12, 12.0)]


def test_the_prompt_of_a_group_is_read_once() -> None:
    engine = Engine(replace(FREE, prefill_token_s=1.0), 4)
    engine.give(0.0, 0, 7, [1, 1, 1])
    assert engine.next_finish() == 7.0


def test_weights_come_between_two_steps_and_tokens_know_their_version() -> None:
    engine = Engine(replace(STEP, publish_s=10.0), 2)
    engine.load(0.0, 0, keep=3, recompute=False)
    engine.give(10.0, 0, 0, [4, 6])
    engine.load(11.5, 1, keep=3, recompute=False)  # the second step is finished first: 12, then the pause to 22
    assert engine.next_finish() == 24.0
    assert engine.versions(0, 4) == [(1, 2), (0, 2)]
    engine.finish()
    engine.load(24.0, 2, keep=3, recompute=False)
    assert engine.versions(0, 6) == [(2, 2), (1, 2), (0, 2)]


def test_what_runs_is_read_again_under_new_weights_where_that_is_wanted() -> None:
    engine = Engine(replace(STEP, prefill_token_s=1.0), 2)
    engine.give(0.0, 0, 3, [4, 4])
    engine.load(5.0, 1, keep=1, recompute=True)  # at 5: two steps done, contexts of 3 + 2
    assert engine.next_finish() == 5.0 + 10.0 + 2.0


def test_a_lost_engine_says_how_many_tokens_are_gone() -> None:
    engine = Engine(STEP, 2)
    engine.give(0.0, 0, 0, [4, 9, 9])
    assert engine.clear(3.0) == 6
    assert engine.next_finish() == math.inf
