"""A run over several hosts, one of which is cut off: it recovers without a hand, with a whole account."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chaos.runs import actors, read
from tests.cluster.hosts import Hosts

ROOT = Path(__file__).parents[2]
STEPS, PROMPTS, SAMPLES = 30, 4, 4


def wait_until(reached: Callable[[], Any], process: subprocess.Popen[bytes], log: Path, timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while not reached():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)


@pytest.mark.timeout(900)
def test_a_host_that_is_cut_off_is_replaced_by_a_spare_one(raw_config: dict[str, Any], tmp_path: Path) -> None:
    raw_config |= {
        "rl": {"steps": STEPS, "prompts_per_step": PROMPTS, "samples_per_prompt": SAMPLES},
        "checkpoint": {"every": 2},
        "timeouts": {"silence": 10.0, "start": 180.0},
    }
    raw_config["policy"] |= {"ranks": 2, "zero_stage": 2}
    raw_config["rollout"] |= {"engines": 2}
    del raw_config["data"]["evaluation"], raw_config["evaluation"]
    config, log = tmp_path / "run.yaml", tmp_path / "log.txt"
    config.write_text(yaml.safe_dump(raw_config))
    run_dir = Path(raw_config["output_dir"]) / raw_config["name"]

    def steps() -> list[int]:
        return [row["step"] for row in read(run_dir / "metrics.jsonl")]

    with Hosts([1, 2, 2, 2]) as hosts:  # five processes: two hosts are full, one is half empty, and there is the head
        command = [*hosts.inside(0), sys.executable, "-m", "engine", "run", str(config)]
        env = hosts.env | {"RAY_ADDRESS": hosts.address, "OMP_NUM_THREADS": "1"}
        with log.open("w") as file:
            process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT)
        try:
            wait_until(lambda: max(steps(), default=0) >= 5, process, log, 300)
            used = {hosts.host_of(process.pid) for role in ("policy", "rollout", "rewards") for process in actors(role)}
            assert len(used) >= 3, "the run is not spread over the hosts"
            victim = next(host for host in (hosts.host_of(p.pid) for p in actors("policy")) if host != 0)
            hosts.cut_off(victim)
            assert process.wait(600) == 0, log.read_text()
        finally:
            process.kill()
            process.wait(30)
    rows = read(run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[-1]["rollout/admitted"] == rows[-1]["rollout/trained"] == STEPS * PROMPTS * SAMPLES
    incidents = [event for event in read(run_dir / "events.jsonl") if event["kind"] == "incident"]
    assert {event["incident"] for event in incidents} & {"actor_died", "actor_silent"}, "nothing was noticed"
    assert (run_dir / "model" / "model.safetensors").is_file()
