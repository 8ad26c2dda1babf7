"""A run that goes on has the records it would have if it had never been killed, and every event of both halves."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.config import UserError
from engine.tracking.events import last_wandb_id
from engine.tracking.tracker import Tracker
from tests.tracking.test_tracker import ROOT, config_for, lines

TORN = b'{"step": 5, "reward/me'


def killed_run(folder: Path, *, last: int = 4) -> Path:
    """The folder of a run that evaluated at steps 0 and 2 and was killed after step `last`, without a checkpoint."""
    tracker = Tracker(config_for(folder))
    tracker.log(0, {"eval/accuracy": 0.25})
    for step in range(1, last + 1):
        tracker.log(step, {"reward/mean": step / 3})
        tracker.samples(step, [{"completion": f"of step {step}"}])
        if step == 2:
            tracker.log(step, {"eval/accuracy": 0.5})
    tracker._events.close()
    tracker._metrics.close()
    return folder / "r1"


def kinds(run: Path) -> list[str]:
    return [event["kind"] for event in lines(run / "events.jsonl")]


def samples(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "samples").iterdir())


def test_what_came_after_the_checkpoint_is_dropped_and_the_rest_stays_byte_for_byte(tmp_path: Path) -> None:
    run = killed_run(tmp_path)
    before = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "samples" / "step_notes.jsonl").write_text("mine")
    tracker = Tracker(config_for(tmp_path), resume_step=2)
    assert (run / "metrics.jsonl").read_bytes() == b"".join(before[:4])  # 0, 1, 2 and the evaluation at 2
    tracker.log(3, {"reward/mean": 1.0})
    tracker.close("succeeded")
    assert [row["step"] for row in lines(run / "metrics.jsonl")] == [0, 1, 2, 2, 3]
    assert samples(run) == ["step_000001.jsonl", "step_000002.jsonl", "step_notes.jsonl"]
    assert kinds(run) == ["run_started", "run_resumed", "run_ended"]
    resumed = lines(run / "events.jsonl")[1]
    assert (resumed["step"], resumed["name"], resumed["wandb_id"]) == (2, "r1", None)


def test_a_run_that_starts_over_keeps_its_events_alone(tmp_path: Path) -> None:
    run = killed_run(tmp_path)
    Tracker(config_for(tmp_path), resume_step=-1).close("failed")
    assert lines(run / "metrics.jsonl") == []
    assert samples(run) == []
    assert kinds(run) == ["run_started", "run_resumed", "run_ended"]


def test_a_checkpoint_before_the_first_step_keeps_the_evaluation_before_it(tmp_path: Path) -> None:
    run = killed_run(tmp_path)
    Tracker(config_for(tmp_path), resume_step=0).close("failed")
    assert lines(run / "metrics.jsonl") == [{"step": 0, "eval/accuracy": 0.25}]


@pytest.mark.parametrize("torn", [TORN, b"\x00\x00\x00", '{"text": "viér'.encode()[:-2], b'{"step": 1}\n[1, 2'])
def test_a_line_that_the_kill_has_torn_is_dropped(tmp_path: Path, torn: bytes) -> None:
    run = killed_run(tmp_path, last=2)
    whole = {name: (run / name).read_bytes() for name in ("metrics.jsonl", "events.jsonl")}
    for name, content in whole.items():
        (run / name).write_bytes(content + torn)
    Tracker(config_for(tmp_path), resume_step=5).close("failed")
    kept = torn.rpartition(b"\n")[0]
    assert (run / "metrics.jsonl").read_bytes() == whole["metrics.jsonl"] + (kept + b"\n" if kept else b"")
    assert (run / "events.jsonl").read_bytes().startswith(whole["events.jsonl"])
    assert all("kind" in row or row == {"step": 1} for row in lines(run / "events.jsonl"))


def test_a_last_line_that_lacks_only_its_end_is_kept(tmp_path: Path) -> None:
    run = killed_run(tmp_path, last=2)
    whole = {name: (run / name).read_bytes() for name in ("metrics.jsonl", "events.jsonl")}
    for name, content in whole.items():
        (run / name).write_bytes(content[:-1])
    Tracker(config_for(tmp_path), resume_step=5).close("failed")
    assert (run / "metrics.jsonl").read_bytes() == whole["metrics.jsonl"]
    assert (run / "events.jsonl").read_bytes().startswith(whole["events.jsonl"])
    assert kinds(run) == ["run_started", "run_resumed", "run_ended"]


def test_the_configuration_is_that_of_the_run_that_goes_on(tmp_path: Path) -> None:
    run = killed_run(tmp_path)
    Tracker(config_for(tmp_path, checkpoint={"every": 7}), resume_step=2).close("failed")
    assert "every: 7" in (run / "config.yaml").read_text()
    assert "config-secret-value" not in (run / "config.yaml").read_text()
    assert not list(run.glob("*.partial"))


def test_what_else_lies_in_the_folder_stays(tmp_path: Path) -> None:
    run = killed_run(tmp_path)
    for name in ("checkpoints", "start", "corpus", "mine"):
        (run / name).mkdir()
        (run / name / "file").write_text(name)
    Tracker(config_for(tmp_path), resume_step=-1).close("failed")
    assert all((run / name / "file").read_text() == name for name in ("checkpoints", "start", "corpus", "mine"))


def test_records_that_somebody_deleted_are_begun_anew(tmp_path: Path) -> None:
    run = killed_run(tmp_path)
    (run / "metrics.jsonl").unlink()
    (run / "events.jsonl").unlink()
    Tracker(config_for(tmp_path), resume_step=2).close("failed")
    assert kinds(run) == ["run_resumed", "run_ended"]
    assert lines(run / "metrics.jsonl") == []


def test_a_run_that_cannot_go_on_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = killed_run(tmp_path)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    def refuse(*_: Any, **__: Any) -> None:
        raise UserError("wandb cannot start")

    with monkeypatch.context() as patch:
        patch.setattr("engine.tracking.tracker.WandbRun", refuse)
        with pytest.raises(UserError, match="wandb cannot start") as caught:
            Tracker(config_for(tmp_path), resume_step=2)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    Tracker(config_for(tmp_path), resume_step=2).close("failed")  # the folder is free again
    assert caught.traceback  # though whoever reports the failure still holds its frames


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"r1/events.jsonl: cannot be opened: .*must be there and writable"):
        Tracker(config_for(tmp_path), resume_step=2)
    assert not (tmp_path / "r1").exists()


ALIVE = """
import sys, time
from pathlib import Path
from tests.tracking.test_tracker import config_for
from engine.tracking.tracker import Tracker
tracker = Tracker(config_for(Path(sys.argv[1])))
tracker.log(0, {"reward/mean": 0.5})
tracker.log(1, {"reward/mean": 0.75})
print("alive", flush=True)
time.sleep(60)
"""


def test_a_run_that_is_still_going_is_not_taken_over_and_one_that_was_killed_is(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", ALIVE, str(tmp_path)]
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "alive\n"
        before = (tmp_path / "r1" / "metrics.jsonl").read_bytes()
        with pytest.raises(UserError, match=r"r1 is the folder of a run that is still going; wait for it, or stop it"):
            Tracker(config_for(tmp_path), resume_step=-1)
        assert (tmp_path / "r1" / "metrics.jsonl").read_bytes() == before
        process.send_signal(signal.SIGKILL)
    Tracker(config_for(tmp_path), resume_step=0).close("succeeded")
    assert [row["step"] for row in lines(tmp_path / "r1" / "metrics.jsonl")] == [0]


def test_wandbs_id_is_that_of_the_last_start_that_had_one(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert last_wandb_id(path) is None
    rows: list[Any] = [
        {"kind": "run_started", "wandb_id": "first"},
        {"kind": "run_resumed", "wandb_id": "second"},
        {"kind": "note", "wandb_id": "not a start"},
        {"kind": "run_resumed", "wandb_id": None},
        ["wandb_id"],
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "run_resumed", "wandb_id": "torn')
    assert last_wandb_id(path) == "second"


OFFLINE_RUN = """
import sys
from pathlib import Path
from tests.tracking.test_tracker import config_for
from engine.tracking.tracker import Tracker
step = int(sys.argv[2]) if len(sys.argv) > 2 else None
tracker = Tracker(config_for(Path(sys.argv[1]), tracking={"wandb": "offline"}), resume_step=step)
tracker.log((step or 0) + 1, {f"planted/after_{step}": 1.0})
print(tracker.wandb.id, flush=True)
tracker.close("interrupted")
"""


def test_an_offline_wandb_run_goes_on_under_its_id(tmp_path: Path) -> None:
    ids = []
    for step in ([], ["1"]):
        arguments = [sys.executable, "-c", OFFLINE_RUN, str(tmp_path), *step]
        done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        ids.append(done.stdout.split()[-1])
    assert ids[0] == ids[1]
    starts = [e for e in lines(tmp_path / "r1" / "events.jsonl") if e["kind"] in ("run_started", "run_resumed")]
    assert [e["wandb_id"] for e in starts] == ids
    records = list((tmp_path / "r1" / "wandb").glob(f"offline-run-*/run-{ids[0]}.wandb"))
    written = b"".join(path.read_bytes() for path in records)
    assert b"planted/after_None" in written
    assert b"planted/after_1" in written
