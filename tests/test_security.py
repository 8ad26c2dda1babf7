"""What the project promises about safety, sentence by sentence; the parts have closer tests of their own.

- User code that a model wrote runs in a subprocess with limits: tests/rewards/test_sandbox.py.
- `trust_remote_code` is off unless asked for.
- Weights are safetensors; nothing unpickles a file.
- Servers bind to loopback unless told otherwise and want a token: also tests/rewards/test_remote.py,
  tests/actors/test_model_server.py. Ray's own processes listen everywhere and want the token.
- Secrets never reach logs, wandb or reports: also tests/tracking/test_redact.py and test_tracker.py.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors.packed_model import load_language_model
from engine import cli
from engine.config import Config, ModelConfig
from engine.rewards.sandbox import Limits, run_program
from engine.schedule.incidents import Incident
from engine.tracking.incidents import IncidentLog
from engine.tracking.tracker import Tracker

ROOT = Path(__file__).parents[1]
SOURCES = [file for package in ("engine", "actors") for file in sorted((ROOT / package).rglob("*.py"))]
UNPICKLING = {("torch", "load"), ("pickle", "load"), ("pickle", "loads"), ("joblib", "load"), ("dill", "load")}
SECRET = "Zq8-very-secret-7Lw"


class Payload:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


def calls(file: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]


def test_nothing_in_the_source_unpickles_a_file() -> None:
    for file in SOURCES:
        for call in calls(file):
            function = call.func
            if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
                assert (function.value.id, function.attr) not in UNPICKLING, f"{file}:{call.lineno}"
            assert not [k for k in call.keywords if k.arg == "allow_pickle"], f"{file}:{call.lineno}"


def test_pickled_weights_are_refused_without_running_what_is_in_them(tiny_model: Path, tmp_path: Path) -> None:
    folder, mark = tmp_path / "model", tmp_path / "mark"
    folder.mkdir()
    (folder / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(Exception, match=r"(?i)weights|pickle|safetensors"):
        load_language_model(configure(folder))
    assert not mark.exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert mark.exists(), "the payload would have worked"


def test_a_models_own_code_does_not_run_unless_it_is_asked_for(tiny_model: Path, tmp_path: Path) -> None:
    folder, mark = tmp_path / "model", tmp_path / "mark"
    folder.mkdir()
    for file in tiny_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config = json.loads((folder / "config.json").read_text()) | {"auto_map": own, "model_type": "own"}
    (folder / "config.json").write_text(json.dumps(config))
    code = "from transformers import LlamaConfig, LlamaForCausalLM\n"
    code += f"open({str(mark)!r}, 'w').close()\n"
    code += "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    code += "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    (folder / "own.py").write_text(code)
    with pytest.raises(Exception, match="trust_remote_code"):
        load_language_model(configure(folder))
    assert not mark.exists()
    assert ModelConfig.model_fields["trust_remote_code"].default is False
    load_language_model(configure(folder, trust_remote_code=True))
    assert mark.exists(), "the code would have run"


def test_no_call_trusts_remote_code_by_itself() -> None:
    for file in SOURCES:
        for call in calls(file):
            for keyword in call.keywords:
                if keyword.arg == "trust_remote_code":
                    assert not isinstance(keyword.value, ast.Constant), f"{file}:{call.lineno}"


def test_a_program_of_the_models_cannot_reach_out_or_take_the_machine(tmp_path: Path) -> None:
    programs = {
        "writes": f"open({str(tmp_path / 'file')!r}, 'w')",
        "connects": "import socket; socket.create_connection(('127.0.0.1', 22), 1)",
        "allocates": "x = bytearray(8 * 2**30)",
        "never ends": "while True: pass",
    }
    for name, program in programs.items():
        assert run_program(program, limits=Limits(wall_seconds=2.0)).kind != "ok", name
    assert not (tmp_path / "file").exists()


def listening(pid: int) -> list[str]:
    """Addresses at which a process takes connections."""
    return [c.laddr.ip for c in psutil.Process(pid).net_connections() if c.status == "LISTEN"]


def test_the_reward_server_listens_on_loopback_unless_told_otherwise(tmp_path: Path) -> None:
    assert inspect.signature(cli.serve_reward).parameters["host"].default == "127.0.0.1"
    (tmp_path / "served_reward.py").write_text("def f(sample):\n    return 1.0\n")
    command = [sys.executable, "-m", "engine", "serve", "reward", f"{tmp_path / 'served_reward.py'}:f", "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while not (
            found := [c.laddr.ip for c in psutil.Process(process.pid).net_connections() if c.status == "LISTEN"]
        ):
            assert time.monotonic() < end
            time.sleep(0.2)
        assert set(found) == {"127.0.0.1"}
    finally:
        process.terminate()
        process.wait(30)


CLIENT = "import ray; ray.init(address={!r}, logging_level='ERROR'); print('joined')"


@pytest.mark.usefixtures("ray_session")
def test_nobody_joins_the_cluster_of_a_run_without_its_token(tmp_path: Path) -> None:
    import ray

    code = CLIENT.format(ray.get_runtime_context().gcs_address)
    other = tmp_path / "token"
    other.write_text("0" * 64)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    stranger = inherited | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(other)}
    for env, joins in ((os.environ, True), (stranger, False)):
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
        assert ("joined" in done.stdout) == joins, done.stderr
    assert os.stat(os.environ["RAY_AUTH_TOKEN_PATH"]).st_mode & 0o077 == 0


def test_a_secret_reaches_no_record_of_a_run(
    raw_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_API_KEY", SECRET)
    raw_config["rewards"]["functions"] = [
        {"function": raw_config["rewards"]["functions"][0], "arguments": {"api_key": SECRET}}
    ]
    tracker = Tracker(Config.model_validate(raw_config | {"tracking": {"wandb": "offline"}}))
    tracker.note(f"calls with {SECRET}")
    tracker.event("failed", message=f"Bearer {SECRET}")
    IncidentLog(tracker, stop_after=9).report(Incident("actor_died", "a[0]", "replaced", f"died of {SECRET}"))
    tracker.log(1, {"reward/mean": 1.0})
    tracker.close("succeeded")
    files = [file for file in tracker.run_dir.rglob("*") if file.is_file()]
    assert files
    assert not [file for file in files if SECRET.encode() in file.read_bytes()]
    assert SECRET not in "".join(capfd.readouterr())


def configure(model: Path, **more: Any) -> Config:
    return Config.model_validate(
        {
            "model": {"path": str(model), **more},
            "data": {"train": "unused.jsonl"},
            "rewards": {"functions": ["unused.py:f"]},
            "rl": {"steps": 9, "prompts_per_step": 4, "samples_per_prompt": 4},
            "rollout": {"max_new_tokens": 8, "max_model_len": 64},
        }
    )
