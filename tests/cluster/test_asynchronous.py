"""Generation beside training on the real Ray, vLLM and DeepSpeed: it learns, keeps its bound, and survives a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine import pipeline
from engine.config import Config
from engine.tracking.jsonl import read_rows
from tests.cluster.test_resume import configure, run_and_kill

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(600)]
STEPS, STALENESS = 24, 2


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Path:
    """The folder of a run with a reference and two engines that was killed and has gone on to its end."""
    folder = tmp_path_factory.mktemp("asynchronous")
    more: dict[str, Any] = {
        "rl": {"steps": STEPS, "prompts_per_step": 6, "samples_per_prompt": 6, "max_staleness": STALENESS},
        "algorithm": {"kl_coef": 0.001},
        "optimizer": {"learning_rate": 0.01},
        "rollout": {"engines": 2, "max_new_tokens": 8, "max_model_len": 64, "kv_cache_gib": 0.03},
        "evaluation": {"every": 8},
    }
    raw = configure("rl", folder, tiny_model, **more)
    run_and_kill(raw, folder)
    pipeline.run(Config.model_validate(raw))
    return folder / "killed"


def steps(run: Path) -> list[dict[str, Any]]:
    return [row for row in read_rows(run / "metrics.jsonl") if "time/step" in row]


def test_every_step_is_there_once_and_every_sample_is_accounted_for(run: Path) -> None:
    assert [row["step"] for row in steps(run)] == list(range(1, STEPS + 1))
    last = steps(run)[-1]
    dropped = sum(value for name, value in last.items() if name.startswith("rollout/dropped/"))
    assert last["rollout/admitted"] == last["rollout/trained"] + dropped == STEPS * 6 * 6


def test_generation_runs_ahead_and_no_token_is_older_than_allowed(run: Path) -> None:
    ages = [[row[f"rollout/staleness/{age}"] for age in range(STALENESS + 1)] for row in steps(run)]
    assert all(sum(shares) == pytest.approx(1.0) for shares in ages)
    assert ages[0] == [1.0, 0.0, 0.0], "nothing was published before the first step"
    assert sum(shares[1] + shares[2] for shares in ages) > STEPS / 2
    assert steps(run)[0]["mismatch/logp_abs_mean"] < 1e-4 < max(row["mismatch/logp_abs_mean"] for row in steps(run))


def test_it_learns_all_the_same(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    assert result["after"]["eval/reward"] > result["before"]["eval/reward"] + 0.2


def test_the_record_says_who_was_at_work(run: Path) -> None:
    spans = [event for event in read_rows(run / "events.jsonl") if event["kind"] == "span"]
    assert {"policy[0]", "reference[0]", "rollout[0]", "rollout[1]", "rewards[0]", "controller"} <= {
        span["actor"] for span in spans
    }
