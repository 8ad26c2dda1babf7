"""A finished run is run again and compared."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from engine import cli, pipeline
from engine.config import Config
from engine.replay import compare
from engine.tracking.jsonl import read_rows

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(300)]


def gnomon(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gnomon", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_a_run_is_replayed_and_a_difference_is_shown(
    raw_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raw_config["rl"]["steps"] = 3
    run = Path(raw_config["output_dir"]) / raw_config["name"]
    assert gnomon(monkeypatch, "replay", str(run)) == 2
    assert "holds no finished run" in capsys.readouterr().err
    pipeline.run(Config.model_validate(raw_config))
    decided = [event for event in read_rows(run / "events.jsonl") if event["kind"] in ("admitted", "settled")]
    assert [event["kind"] for event in decided] == ["admitted", "settled"] * 3
    assert decided[0]["sample_ids"] == decided[1]["samples"]["trained"] == "0-15"
    served = [event for event in read_rows(run / "events.jsonl") if event["kind"] in ("serves", "dispatched")]
    assert all(event["version"] in range(4) for event in served)

    assert gnomon(monkeypatch, "replay", str(run)) == 0
    assert "3 steps, 6 decisions: all as before, bit for bit" in capsys.readouterr().out

    lines = (run / "metrics.jsonl").read_text().splitlines()
    changed = json.loads(lines[-1])
    name = next(key for key in changed if key.startswith("eval/"))
    (run / "metrics.jsonl").write_text("\n".join([*lines[:-1], json.dumps(changed | {name: 9.0})]) + "\n")
    monkeypatch.setattr("engine.replay.pipeline.run", lambda config: None)  # it is there
    assert gnomon(monkeypatch, "replay", str(run)) == 1
    assert f"step 3, {name}: 9.0 became" in capsys.readouterr().err


def test_the_decisions_of_steps_that_were_made_again_are_the_last_ones(tmp_path: Path) -> None:
    kept = [{"kind": "admitted", "step": step, "rows": [step]} for step in (1, 2, 3)]
    thrown_away = [{"kind": "admitted", "step": step, "rows": [9]} for step in (2, 3)]
    histories = {
        "unbroken": kept,
        "went back": [kept[0], *thrown_away, {"kind": "went_back", "step": 1}, *kept[1:]],
        "killed": [kept[0], thrown_away[0], {"kind": "run_resumed", "step": 1}, *kept[1:]],
        "from the start": [*thrown_away, {"kind": "went_back", "step": -1}, *kept],
        "another": [*kept[:2], thrown_away[1]],
    }
    for name, events in histories.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    found = {name: len(compare(tmp_path / "unbroken", tmp_path / name).differences) for name in histories}
    assert found == {"unbroken": 0, "went back": 0, "killed": 0, "from the start": 0, "another": 1}
