from __future__ import annotations

import pytest

from actors.trainer import learning_rate_factor
from engine.config import OptimizerConfig


def factors(schedule: str, warmup: int, updates: int) -> list[float]:
    config = OptimizerConfig(schedule=schedule, warmup_updates=warmup)
    return [learning_rate_factor(update, config=config, updates=updates) for update in range(updates)]


def test_a_constant_rate_is_reached_after_the_warm_up_and_kept():
    assert factors("constant", 3, 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert factors("constant", 0, 3) == [1.0, 1.0, 1.0]


def test_linear_and_cosine_fall_towards_zero_at_the_end():
    assert factors("linear", 0, 4) == [1.0, 0.75, 0.5, 0.25]
    assert factors("cosine", 1, 5) == pytest.approx([0.5, 1.0, 0.8535, 0.5, 0.1464], abs=1e-4)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_no_update_is_spent_on_a_rate_of_zero(schedule):
    assert all(0 < factor <= 1 for factor in factors(schedule, 4, 20))
