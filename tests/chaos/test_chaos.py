"""The suite in small: one run that is struck once in each way."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.chaos.faults import Fault
from tests.chaos.strikes import strike_run
from tests.chaos.workshop import PROMPTS, SAMPLES, Workshop

FAULTS = [
    Fault("kill", "policy", "update"),
    Fault("kill", "rollout", "generate"),
    Fault("nan", "policy", "generate"),
    Fault("kill", "reference", "annotate"),
    Fault("stop", "rewards", "score"),
    Fault("bit", "rollout", "generate"),
]


@pytest.mark.usefixtures("ray_session")
@pytest.mark.timeout(900)
def test_a_run_that_is_struck_in_every_way_ends_with_a_whole_account(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    steps = 8 * len(FAULTS)
    run = workshop.run(
        "struck",
        algorithm={"name": "grpo", "loss": f"{workshop.task}:loss", "kl_coef": 0.01},
        rl={"steps": steps, "prompts_per_step": PROMPTS, "samples_per_prompt": SAMPLES},
        rollout={"engines": 2, "max_new_tokens": 8, "max_model_len": 64, "kv_cache_gib": 0.03},
    )
    outcomes = strike_run(run, steps, FAULTS, random.Random(0), workshop.switches)
    assert [len(outcome.seconds) for outcome in outcomes] == [1] * len(FAULTS)
    assert [(outcome.lost, outcome.notes) for outcome in outcomes] == [(0, [])] * len(FAULTS)
    kinds = {event["incident"] for event in run.events("incident")}
    assert kinds >= {"actor_died", "actor_silent", "weights_corrupted"}
    assert len(run.events("update_skipped")) == 1
    assert len(run.events("went_back")) == 1
