"""What starts a model's server and what ends it. A real server answers in tests/cluster/test_judge.py."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors import supervised
from actors.model_server import ModelServerActor, server_arguments
from engine.config import Config, ServerConfig
from engine.layout import layout_of, roles_of

SUPERVISED = str(Path(supervised.__file__))
FAMILY = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)']); "


def configure(**changes: Any) -> Config:
    raw = {
        "model": {"path": "m"},
        "data": {"train": "t.jsonl"},
        "rewards": {"functions": ["a.py:f"], "servers": [{"name": "ref", "path": "some/model", "threads": 2}]},
        "rl": {"steps": 1, "prompts_per_step": 2, "samples_per_prompt": 2},
    }
    return Config.model_validate(raw | changes)


def gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=10)[1]


def family(parent: int) -> list[psutil.Process]:
    """The processes below one, once there are three: supervisor, command and its child."""
    deadline = time.monotonic() + 20
    while len(found := psutil.Process(parent).children(recursive=True)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def test_a_killed_owner_takes_the_command_and_its_children_along() -> None:
    owner = (
        f"import subprocess, sys, time; subprocess.Popen([sys.executable, {SUPERVISED!r}, sys.executable, '-c', "
        f"{FAMILY + 'time.sleep(300)'!r}], stdin=subprocess.PIPE); time.sleep(300)"
    )
    process = subprocess.Popen([sys.executable, "-c", owner])
    below = family(process.pid)
    process.kill()
    process.wait()
    assert gone(below)


def test_a_command_that_ends_takes_its_children_along_and_gives_its_exit_code() -> None:
    process = subprocess.Popen(
        [sys.executable, SUPERVISED, sys.executable, "-c", FAMILY + "time.sleep(1); sys.exit(7)"], stdin=subprocess.PIPE
    )
    deadline = time.monotonic() + 20
    while len(below := psutil.Process(process.pid).children(recursive=True)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert process.wait(20) == 7
    assert gone(below)
    assert process.stdin is not None
    process.stdin.close()


@pytest.mark.usefixtures("ray_session")
def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_type"}')
    actor = ModelServerActor(configure(), ServerConfig(name="ref", path=str(tmp_path)))
    with pytest.raises(RuntimeError, match=r"ended with exit code 1; it said last: [\s\S]*no_such_type") as caught:
        actor.start()
    assert str(tmp_path) in str(caught.value)
    actor.close()


def test_the_cpu_needs_settings_of_its_own_and_the_key_is_no_argument() -> None:
    cpu = " ".join(server_arguments(configure(), configure().rewards.servers[0], "127.0.0.1", 8000))
    cuda = " ".join(server_arguments(configure(device="cuda"), configure().rewards.servers[0], "10.0.0.1", 8000))
    assert "--enforce-eager" in cpu
    assert "--dtype float32" in cpu
    assert "--enforce-eager" not in cuda
    assert "--dtype bfloat16" in cuda
    assert "--served-model-name ref" in cuda
    assert "key" not in cuda.replace("kv-cache", "")


def test_a_server_keeps_a_device_of_its_own_where_the_others_take_turns() -> None:
    config = configure(device="cuda", placement={"mode": "turns"}, policy={"zero_stage": 2})
    assert "server/ref" in [role.name for role in roles_of(config)]
    [shared] = layout_of(config).sharing
    assert set(shared) == {"policy", "rollout"}
    [seat] = layout_of(config).seats["server/ref"]
    assert seat.resources["GPU"] == 1.0
