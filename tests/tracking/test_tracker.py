"""A run's folder is made whole or not at all, holds what DESIGN section 8 names, and no secret."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.config import Config, UserError
from engine.config_file import load_config
from engine.tracking.alarms import Alarm
from engine.tracking.tracker import Tracker

ROOT = Path(__file__).parents[2]


def config_for(output_dir: Path, **changes: Any) -> Config:
    base: dict[str, Any] = {
        "name": "r1",
        "output_dir": str(output_dir),
        "model": {"path": "models/tiny"},
        "data": {"train": {"path": "data.py:rows", "arguments": {"api_key": "config-secret-value", "size": 3}}},
        "rewards": {"functions": ["rewards.py:correct"]},
        "rl": {"steps": 2, "prompts_per_step": 2, "samples_per_prompt": 4},
    }
    return Config.model_validate({**base, **changes})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_leaves_its_configuration_metrics_events_and_samples(tmp_path: Path) -> None:
    tracker = Tracker(config_for(tmp_path / "runs"))
    tracker.log(0, {"reward/mean": 0.5})
    tracker.event("weights_published", version=1)
    tracker.samples(12, [{"prompt": "2+2", "completion": "vier €", "reward": 1.0}])
    tracker.samples(13, [])
    tracker.close("succeeded")
    run = tmp_path / "runs" / "r1"
    assert lines(run / "metrics.jsonl") == [{"step": 0, "reward/mean": 0.5}]
    assert [e["kind"] for e in lines(run / "events.jsonl")] == ["run_started", "weights_published", "run_ended"]
    assert lines(run / "events.jsonl")[-1]["status"] == "succeeded"
    assert lines(run / "samples" / "step_000012.jsonl") == [{"prompt": "2+2", "completion": "vier €", "reward": 1.0}]
    assert sorted(p.name for p in run.rglob("*") if p.is_file()) == sorted(
        ["config.yaml", "metrics.jsonl", "events.jsonl", "step_000012.jsonl"]
    )


def test_an_alarm_is_told_recorded_and_sent_to_wandb_without_secrets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "alarm-secret-value")
    tracker = Tracker(config_for(tmp_path, tracking={"wandb": "offline"}))
    tracker.alarm(20, Alarm("check_falls", "reward/gold/mean", "gold fell alarm-secret-value"))
    tracker.close("succeeded")
    [event] = [e for e in lines(tmp_path / "r1" / "events.jsonl") if e["kind"] == "alarm"]
    assert (event["step"], event["alarm"], event["subject"]) == (20, "check_falls", "reward/gold/mean")
    assert "ALARM check_falls, step 20: gold fell" in capsys.readouterr().out
    [record] = (tmp_path / "r1" / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"step 20: gold fell" in record.read_bytes()
    for file in (p for p in (tmp_path / "r1").rglob("*") if p.is_file()):
        assert b"alarm-secret-value" not in file.read_bytes(), file


def test_an_alert_that_wandb_cannot_send_is_an_event_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Tracker(config_for(tmp_path, tracking={"wandb": "offline"}))

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(tracker.wandb._run, "alert", refuse)
    tracker.alarm(20, Alarm("check_falls", "reward/gold/mean", "gold fell"))
    tracker.close("succeeded")
    kinds = [e["kind"] for e in lines(tmp_path / "r1" / "events.jsonl")]
    assert kinds == ["run_started", "alarm", "alert_not_sent", "run_ended"]


def test_the_configuration_written_is_resolved_loads_again_and_holds_no_secret(tmp_path: Path) -> None:
    config = config_for(tmp_path)
    Tracker(config).close("succeeded")
    written = tmp_path / "r1" / "config.yaml"
    assert "config-secret-value" not in written.read_text()
    again = load_config(written)
    assert again.model_dump(exclude={"data"}) == config.model_dump(exclude={"data"})
    assert again.data.train.arguments["size"] == 3


def test_a_folder_that_holds_a_run_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    tracker = Tracker(config_for(tmp_path))
    tracker.log(0, {"reward/mean": 0.5})
    tracker.close("failed")
    before = {p: p.read_bytes() for p in (tmp_path / "r1").rglob("*")}
    with pytest.raises(
        UserError, match=r"r1 already holds a run; choose another name= or delete it \(resume=auto goes"
    ):
        Tracker(config_for(tmp_path))
    assert {p: p.read_bytes() for p in (tmp_path / "r1").rglob("*")} == before


def test_a_run_that_ended_before_its_first_measurement_does_not_block_the_next(tmp_path: Path) -> None:
    failed = Tracker(config_for(tmp_path, tracking={"wandb": "offline"}))
    failed.event("reward_error", message="the old failure")
    failed.close("failed")
    Tracker(config_for(tmp_path)).close("succeeded")
    events = lines(tmp_path / "r1" / "events.jsonl")
    assert [e["kind"] for e in events] == ["run_started", "run_ended"]
    assert sorted(p.name for p in (tmp_path / "r1").iterdir()) == ["config.yaml", "events.jsonl", "metrics.jsonl"]


def test_a_run_that_has_not_ended_is_refused_even_without_a_measurement(tmp_path: Path) -> None:
    starting = Tracker(config_for(tmp_path))
    with pytest.raises(UserError, match="already holds a run"):
        Tracker(config_for(tmp_path))
    starting.close("failed")


def test_a_file_of_somebody_else_keeps_a_run_without_a_measurement_from_being_replaced(tmp_path: Path) -> None:
    Tracker(config_for(tmp_path)).close("failed")
    (tmp_path / "r1" / "notes.txt").write_text("why it failed")
    with pytest.raises(UserError, match="already holds a run"):
        Tracker(config_for(tmp_path))
    assert (tmp_path / "r1" / "notes.txt").read_text() == "why it failed"


def test_a_folder_with_other_files_is_refused_and_an_empty_one_accepted(tmp_path: Path) -> None:
    (tmp_path / "r1").mkdir()
    (tmp_path / "r1" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="not empty"):
        Tracker(config_for(tmp_path))
    (tmp_path / "r1" / "mine.txt").unlink()
    Tracker(config_for(tmp_path)).close("succeeded")


def test_what_the_preflight_has_made_neither_blocks_a_run_nor_goes_with_its_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = [tmp_path / "r1" / "start" / "tokenizer.json", tmp_path / "r1" / "corpus" / "tokens.bin"]
    for path in prepared:
        path.parent.mkdir(parents=True)
        path.write_text("made")
    Tracker(config_for(tmp_path)).close("failed")  # before its first measurement
    Tracker(config_for(tmp_path)).close("failed")
    assert [path.read_text() for path in prepared] == ["made", "made"]

    def refuse(*_: Any, **__: Any) -> None:
        raise UserError("wandb cannot start")

    monkeypatch.setattr("engine.tracking.tracker.WandbRun", refuse)
    with pytest.raises(UserError, match="cannot start"):
        Tracker(config_for(tmp_path))
    assert sorted(path.name for path in (tmp_path / "r1").iterdir()) == ["corpus", "start"]
    assert [path.read_text() for path in prepared] == ["made", "made"]


def test_a_file_where_the_folder_should_be_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match=r"runs/r1.*choose another output_dir="):
        Tracker(config_for(tmp_path / "runs"))


def test_online_without_a_key_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"no API key.*wandb login.*tracking.wandb=offline"):
        Tracker(config_for(tmp_path / "deep" / "runs", tracking={"wandb": "online"}))
    assert not (tmp_path / "deep").exists()


def test_a_failure_while_starting_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        (tmp_path / "deep" / "runs" / "r1" / "wandb").mkdir()
        raise UserError("wandb cannot start")

    monkeypatch.setattr("engine.tracking.tracker.WandbRun", refuse)
    with pytest.raises(UserError, match="cannot start"):
        Tracker(config_for(tmp_path / "deep" / "runs"))
    assert not (tmp_path / "deep").exists()


def test_notes_are_shown_and_recorded_without_secrets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Tracker(config_for(tmp_path))
    tracker.note("held-out accuracy 0.25, see https://me:hunter22@host.example")
    tracker.close("failed")
    events = (tmp_path / "r1" / "events.jsonl").read_text()
    assert "held-out accuracy 0.25" in capsys.readouterr().out
    assert "held-out accuracy 0.25" in events
    assert "hunter22" not in events


def test_closing_twice_keeps_the_first_status_and_an_unknown_status_is_refused(tmp_path: Path) -> None:
    tracker = Tracker(config_for(tmp_path))
    with pytest.raises(ValueError, match="'done' is not one of succeeded, failed, interrupted"):
        tracker.close("done")
    tracker.close("interrupted")
    tracker.close("succeeded")
    ended = [e["status"] for e in lines(tmp_path / "r1" / "events.jsonl") if e["kind"] == "run_ended"]
    assert ended == ["interrupted"]


def test_without_wandb_it_is_not_even_imported() -> None:
    code = "import sys, engine.tracking.tracker; sys.exit('wandb' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


OFFLINE_RUN = """
import sys
from pathlib import Path
from tests.tracking.test_tracker import config_for
from engine.tracking.alarms import Alarm
from engine.tracking.tracker import Tracker
tracker = Tracker(config_for(Path(sys.argv[1]), tracking={"wandb": "offline"}))
assert tracker.wandb.id
print("console-secret-value")
tracker.log(1, {"reward/mean": 0.125, "planted/metric": 7.0, "bad": float("nan")})
tracker.close("succeeded")
"""


def test_no_secret_from_arguments_environment_or_configuration_reaches_any_file_of_an_offline_wandb_run(
    tmp_path: Path,
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    environment = {**os.environ, "HOME": str(home), "PLAIN_NAME": "env-secret-value", "SOME_API_KEY": "env-key-value"}
    environment = {k: v for k, v in environment.items() if not k.startswith(("WANDB_", "XDG_", "TMPDIR"))}
    environment |= {"TMPDIR": str(home), "WANDB_TAGS": "planted-tag"}
    arguments = [sys.executable, "-c", OFFLINE_RUN, str(tmp_path / "runs"), "--api-key=argv-secret-value"]
    done = subprocess.run(
        arguments, env=environment, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr

    written = b"".join(p.read_bytes() for p in [*tmp_path.rglob("*")] if p.is_file())
    [record] = (tmp_path / "runs" / "r1" / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"planted/metric" in record.read_bytes()  # the record is not compressed: a search would find a secret
    assert b"planted-tag" in record.read_bytes()
    assert b"samples_per_prompt" in record.read_bytes()
    for secret in ("argv-secret", "env-secret", "env-key", "config-secret", "console-secret"):
        assert secret.encode() not in written, f"{secret} was written"
