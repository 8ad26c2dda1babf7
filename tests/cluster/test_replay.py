"""A finished run is run again and compared."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from engine import cli, pipeline
from engine.config import Config
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
    assert gnomon(monkeypatch, "replay", "--name", "second", str(run)) == 1
    assert f"step 3, {name}: 9.0 became" in capsys.readouterr().err
