"""The quickstart's own model, task and configuration, for one step: the real weights arrive where they should."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from engine import pipeline
from engine.config_file import load_config

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("ray_session")
def test_one_step_of_the_quickstart_on_the_packaged_model(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    model = tmp_path / "model"
    script = [sys.executable, "examples/quickstart/model.py", str(model)]
    subprocess.run(script, check=True, timeout=300)
    assert "is there already" in subprocess.run(script, check=True, timeout=60, capture_output=True, text=True).stdout
    changes = ["rl.steps=1", "evaluation.prompts=8", f"model.path={model}"]
    result = pipeline.run(load_config("examples/quickstart/quickstart.yaml", [*changes, f"output_dir={tmp_path}"]))
    metrics = [json.loads(line) for line in (tmp_path / "quickstart" / "metrics.jsonl").read_text().splitlines()]
    [step] = [m for m in metrics if "policy/loss" in m]
    assert abs(step["policy/kl"]) < 1e-4
    assert step["mismatch/logp_abs_max"] < 1e-3
    assert step["policy/grad_norm"] > 0
    assert 0.1 < result.before["eval/pass@1"] < 0.9
    assert (result.model / "model.safetensors").stat().st_size > 500 * 2**20
