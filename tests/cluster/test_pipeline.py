"""Stages in a row: each starts from what the one before ended with; finished ones are left, or made anew on demand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from engine import pipeline
from engine.config import UserError
from engine.config_file import load_config

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(600)]


@pytest.fixture
def file(tiny_model: Path, tmp_path: Path) -> Path:
    rows = {
        "sft": [{"prompt": f"number {i}", "completion": "one"} for i in range(8)],
        "pairs": [{"prompt": f"number {i}", "chosen": "one", "rejected": "two"} for i in range(8)],
    }
    for name, part in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    raw = {
        "name": "road",
        "output_dir": str(tmp_path / "runs"),
        "training": {"rows_per_update": 4, "max_length": 64},
        "optimizer": {"learning_rate": 0.01},
        "stages": {
            "sft": {"model": {"path": str(tiny_model)}, "data": {"train": str(tmp_path / "sft.jsonl")}},
            "preference": {"model": {"path": "stage:sft"}, "data": {"train": str(tmp_path / "pairs.jsonl")}},
        },
    }
    path = tmp_path / "road.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


def started(run: Path, stage: str) -> int:
    """How often a stage was begun."""
    events = (run / stage / "events.jsonl").read_text().splitlines()
    return sum(json.loads(line)["kind"] in ("run_started", "run_resumed") for line in events)


def test_a_pipeline_hands_models_on_skips_what_is_done_and_starts_anew_where_told(file, tmp_path, capsys):
    run = tmp_path / "runs" / "road"
    result = pipeline.run(load_config(file))
    assert result.model == (run / "preference" / "model").absolute()
    first = load_file(result.model / "model.safetensors")
    sft = load_file(run / "sft" / "model" / "model.safetensors")
    assert any((first[name] != sft[name]).any() for name in first)

    again = pipeline.run(load_config(file))
    assert again == result
    assert "stage sft was finished already" in capsys.readouterr().out
    assert (started(run, "sft"), started(run, "preference")) == (1, 1)

    with pytest.raises(UserError, match=r"sft holds a run with other settings \(training.epochs: 1.0 -> 2.0\)"):
        pipeline.run(load_config(file, ["stages.sft.training.epochs=2"]))

    changed = load_config(file, ["stages.preference.optimizer.learning_rate=0.02"])
    pipeline.run(changed, start_from="preference")
    assert (run / "preference.old-1" / "model").is_dir()
    assert (started(run, "sft"), started(run, "preference")) == (1, 1)
    anew = load_file(run / "preference" / "model" / "model.safetensors")
    assert any((anew[name] != first[name]).any() for name in first)


def test_from_names_a_stage_whose_predecessors_are_finished(file):
    config = load_config(file)
    with pytest.raises(UserError, match="--from nothing: no such stage; known: sft, preference"):
        pipeline.run(config, start_from="nothing")
    with pytest.raises(UserError, match="--from preference: the earlier stage sft is not finished"):
        pipeline.run(config, start_from="preference")


def test_bad_rows_of_a_later_stage_are_told_before_the_first_one_starts(file, tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "b"}\n')
    with pytest.raises(UserError, match=r"pairs.jsonl:1"):
        pipeline.run(load_config(file))
    assert not (tmp_path / "runs").exists()
