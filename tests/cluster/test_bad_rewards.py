"""Reward functions that fail while a run is on, and clusters that cannot hold it: one message, exit code 2, records.

One policy and one engine serve all runs of this module; the rest is each run's own: preflight, records, the reward
actor and its processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.util.placement_group import placement_group, remove_placement_group

from actors.group import Slots, WorkerGroup
from actors.reward_group import RewardGroup
from actors.reward_pool import RewardPool
from engine import cluster
from engine.cli import USER_ERROR, main
from engine.config import Config
from engine.roles import Workers
from engine.schedule.placement import Seat

pytestmark = pytest.mark.timeout(600)
ROOT = Path(__file__).parents[2]
ONE_CPU = {"CPU": 1.0}
GOOD = "def score(sample):\n    return float(sample.num_tokens)\n"
FAILING = {
    "raises": ("def score(sample):\n    raise KeyError('gold')\n", "reward_error", "KeyError: 'gold' (", "score.py:2)"),
    "hangs": ("import time\ndef score(sample):\n    time.sleep(600)\n", "reward_timeout", "took longer than 1 s"),
    "returns NaN": ("def score(sample):\n    return float('nan')\n", "reward_error", "returned nan; a reward must be"),
    "kills its process": ("import os\ndef score(sample):\n    os._exit(3)\n", "reward_error", "died (exit code 3)"),
}


@pytest.fixture(scope="module")
def models(ray_session: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """A policy, and an engine that holds its weights as version 0."""
    rewards = tmp_path_factory.mktemp("rewards") / "score.py"
    rewards.write_text(GOOD)
    raw = {
        "model": {"path": str(tiny_model)},
        "data": {"train": "unused.jsonl"},
        "rewards": {"functions": [f"{rewards}:score"]},
        "rl": {"steps": 1, "prompts_per_step": 4, "samples_per_prompt": 4},
        "policy": {"tokens_per_microbatch": 256},
        "rollout": {"max_new_tokens": 8, "max_model_len": 64, "kv_cache_gib": 0.03},
    }
    with cluster.started_workers(Config.model_validate(raw), updates=1) as workers:
        workers.sampling.rollouts.publish(0)
        yield workers


@pytest.fixture
def shared_models(models: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs start a reward actor of their own and take the models that are up, whose weights are version 0 already."""

    @contextlib.contextmanager
    def started_workers(config: Config, **others: Any) -> Iterator[Workers]:
        placement = placement_group([ONE_CPU])
        slots = Slots(placement, [Seat(0, ONE_CPU)])
        pool = WorkerGroup("rewards", RewardPool, slots, arguments=[(config.rewards,)], env={}, concurrency=256)
        try:
            pool.call("start", timeout_s=120)
            yield replace(models, sampling=replace(models.sampling, rewards=RewardGroup(config, pool, {})))
            pool.call("close", timeout_s=30)
        finally:
            pool.kill()
            remove_placement_group(placement)

    monkeypatch.setattr(cluster, "started_workers", started_workers)


@pytest.fixture
def run(
    raw_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """`gnomon run` in this process: takes a reward file and settings; returns the message, after checking exit code."""

    def run(code: str, exit_code: int = USER_ERROR, **rewards: Any) -> str:
        # A file imported once is not read again, as in any process: each version gets a file of its own.
        folder = tmp_path / f"version{len(list(tmp_path.glob('version*')))}"
        folder.mkdir()
        (folder / "score.py").write_text(code)
        settings = {"functions": [{"function": f"{folder / 'score.py'}:score", **rewards}]}
        raw_config["rewards"] = settings | {"timeout": 1.0, "retries": 0, "stop_after_failures": 2}
        raw_config["rl"]["steps"] = 1
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw_config))
        monkeypatch.setattr(sys, "argv", ["gnomon", "run", str(tmp_path / "run.yaml")])
        with pytest.raises(SystemExit) as end:
            main()
        output = capsys.readouterr()
        assert end.value.code == exit_code, output.err
        assert [line[:7] for line in output.err.splitlines()].count("error: ") == (exit_code == USER_ERROR)
        assert "Traceback" not in output.err
        return output.out + output.err

    return run


def events(folder: Path) -> list[dict[str, Any]]:
    """The events of the run in this test's folder."""
    return [json.loads(line) for line in (folder / "runs" / "test" / "events.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("shared_models")
@pytest.mark.parametrize("failing", FAILING)
def test_a_reward_that_never_succeeds_stops_the_run_and_says_which_and_why(
    failing: str, run: Callable[..., str], tmp_path: Path
) -> None:
    code, kind, *reasons = FAILING[failing]
    message = run(code)
    assert re.search(r"reward function 'score' has failed on \d samples without one success", message)
    assert "mend the function" in message
    assert all(reason in message for reason in reasons)
    recorded = events(tmp_path)
    incidents = [e for e in recorded if e["kind"] == kind]
    assert incidents
    assert {e["function"] for e in incidents} == {"score"}
    assert all(reason in incidents[-1]["message"] for reason in reasons)
    assert recorded[-2]["kind"] == "run_failed"
    assert recorded[-2]["message"] in message
    assert (recorded[-1]["kind"], recorded[-1]["status"]) == ("run_ended", "failed")
    assert (tmp_path / "runs" / "test" / "metrics.jsonl").read_text() == ""


@pytest.mark.usefixtures("shared_models")
def test_on_error_fail_stops_the_run_at_the_first_failure(run: Callable[..., str], tmp_path: Path) -> None:
    message = run(FAILING["raises"][0], on_error="fail")
    assert "reward function 'score' failed on sample" in message
    assert "(on_error: fail): KeyError: 'gold' (" in message
    assert [e["kind"] for e in events(tmp_path)][-3:] == ["reward_error", "run_failed", "run_ended"]


def test_a_cluster_too_small_for_the_roles_is_told_with_what_is_missing(
    ray_session: None, raw_config: dict[str, Any], run: Callable[..., str]
) -> None:
    raw_config["policy"]["ranks"] = 64
    message = run(GOOD)
    assert "the run needs 66 CPU (policy: 64 x 1 CPU, rollout: 1 x 1 CPU, rewards: 1 x 1 CPU)" in message
    assert "the whole cluster has 16 CPU" in message
    assert "add nodes, let roles share devices" in message


def test_an_address_where_no_cluster_answers_is_told_soon(raw_config: dict[str, Any], tmp_path: Path) -> None:
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        raw_config["ray"] = {"address": f"127.0.0.1:{taken.getsockname()[1]}"}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw_config))
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "engine", "run", str(tmp_path / "run.yaml")],
            cwd=ROOT,
            env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
    assert done.returncode == USER_ERROR, done.stderr
    assert f"error: ray.address: no cluster answers at {raw_config['ray']['address']!r}" in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - start < 60
    assert events(tmp_path)[-1]["status"] == "failed"


@pytest.mark.usefixtures("shared_models")
def test_a_failed_run_is_repeated_under_its_name_once_the_reward_is_mended(
    run: Callable[..., str], tmp_path: Path
) -> None:
    # Last of the module: it trains, after which the engine no longer holds version 0.
    run(FAILING["raises"][0])
    output = run(GOOD, exit_code=0)
    assert "held-out reward" in output
    assert [e["kind"] for e in events(tmp_path)].count("run_started") == 1
    assert events(tmp_path)[-1]["status"] == "succeeded"
    steps = [json.loads(line)["step"] for line in (tmp_path / "runs" / "test" / "metrics.jsonl").open()]
    assert steps == [0, 1, 1]
    assert (tmp_path / "runs" / "test" / "model" / "model.safetensors").is_file()
