"""A run's state is read from its folder, while it runs and after."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.cli import app
from engine.config import Config, UserError
from engine.schedule.incidents import Incident
from engine.tracking.incidents import IncidentLog, TooManyIncidentsError
from engine.tracking.status import status_of
from engine.tracking.tracker import Tracker


@pytest.fixture
def tracker(raw_config) -> Tracker:
    found = Tracker(Config.model_validate(raw_config))
    yield found
    found.close("failed")


def finish_step(tracker: Tracker, step: int) -> None:
    tracker.log(step, {"reward/mean": 0.5, "time/step": 2.0})


def test_a_run_that_goes_on(tracker):
    assert status_of(tracker.run_dir).state == "starting"
    tracker.event("training", step=0, total=10)
    finish_step(tracker, 1)
    finish_step(tracker, 2)
    tracker.event("phase", step=3, phase="rollout")
    tracker.event("reward_timeout", function="f")
    found = status_of(tracker.run_dir)
    assert (found.state, found.step, found.total, found.seconds_left) == ("running", 2, 10, 16.0)
    assert found.doing == "step 3: rollout since 0 s"
    assert found.incidents == {"reward_timeout": 1}
    assert found.lines()[:3] == [
        "test: running (step 3: rollout since 0 s)",
        "step: 2 of 10, 0:00:16 left",
        "last step: reward 0.5000",
    ]


def test_a_run_that_has_ended_says_how_and_why(tracker):
    tracker.event("run_failed", error="X", message="policy[0] died")
    tracker.close("failed")
    found = status_of(tracker.run_dir)
    assert (found.state, found.doing, found.seconds_left) == ("failed", "policy[0] died", None)


def test_a_run_that_was_killed_and_one_that_goes_on_after_it(tracker, raw_config):
    tracker.event("training", step=0, total=10)
    finish_step(tracker, 1)
    tracker._events.close()  # as the kernel does
    tracker._closed = True
    assert status_of(tracker.run_dir).state == "killed"
    again = Tracker(Config.model_validate(raw_config), resume_step=1)
    assert status_of(again.run_dir).state == "starting"
    again.close("succeeded")
    assert status_of(again.run_dir).state == "succeeded"


def test_the_command_shows_it_to_people_and_to_programs(tracker, capsys):
    with pytest.raises(SystemExit):
        app(["status", str(tracker.run_dir)])
    assert capsys.readouterr().out == "test: starting\nstep: 0\nincidents: none\n"
    with pytest.raises(SystemExit):
        app(["status", "--json", str(tracker.run_dir)])
    assert json.loads(capsys.readouterr().out)["state"] == "starting"


def test_another_folder_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"holds no events\.jsonl; give the folder of a run"):
        status_of(tmp_path)


def test_incidents_are_recorded_told_and_limited(tracker, capsys):
    log = IncidentLog(tracker, stop_after=1)
    died = Incident("actor_died", "rollout[1]", "replaced", "rollout[1]: died in generate()", (3, 4))
    log.report(died)
    with pytest.raises(TooManyIncidentsError, match=r"more than 1 incidents .*actor_died: rollout\[1\] x 2\. The last"):
        log.report(died)
    events = [json.loads(line) for line in (tracker.run_dir / "events.jsonl").read_text().splitlines()]
    recorded = next(event for event in events if event["kind"] == "incident")
    wanted = {"incident": "actor_died", "actor": "rollout[1]", "action": "replaced", "sample_ids": [3, 4]}
    assert recorded.items() >= wanted.items()
    assert "actor_died: rollout[1]: died in generate(); replaced" in capsys.readouterr().out
