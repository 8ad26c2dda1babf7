"""Spans of a run as a trace, and who was at work how much."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engine.cli import app
from engine.config import UserError
from engine.tracking.timeline import Span, busy, read_spans, write_trace

STEPS = [Span("controller", "step", 10.0, 4.0, 1), Span("controller", "step", 20.0, 6.0, 2)]


def test_shares_are_of_the_steps_and_what_is_outside_them_does_not_count() -> None:
    spans = [
        *STEPS,
        Span("policy[0]", "update", 12.0, 2.0),
        Span("policy[0]", "logprobs", 13.0, 0.5),
        Span("rollout[0]", "generate", 8.0, 4.0),
        Span("rollout[0]", "generate", 20.0, 5.0),
        Span("policy[0]", "capture_state", 15.0, 3.0),
    ]
    actors, idle = busy(spans)
    assert [(held.actor, held.seconds, held.share) for held in actors] == [
        ("rollout[0]", 7.0, 0.7),
        ("policy[0]", 2.0, 0.2),
    ]
    assert idle == pytest.approx(0.1), "one second at the end of the second step is the controller's own"


def test_the_trace_has_a_process_per_role_and_a_lane_for_what_overlaps(tmp_path: Path) -> None:
    spans = [
        *STEPS,
        Span("controller", "rollout", 10.0, 2.0, 1),
        Span("rewards[0]", "score", 11.0, 2.0),
        Span("rewards[0]", "score", 12.0, 3.0),
        Span("rewards[0]", "score", 14.0, 0.5),
    ]
    write_trace(sorted(spans, key=lambda span: span.start), tmp_path / "trace.json")
    rows = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {row["pid"]: row["args"]["name"] for row in rows if row["name"] == "process_name"}
    assert list(names.values()) == ["controller", "rewards"]
    scores = [row for row in rows if row["ph"] == "X" and names[row["pid"]] == "rewards"]
    assert [(row["ts"], row["dur"], row["tid"]) for row in scores] == [(11e6, 2e6, 0), (12e6, 3e6, 1), (14e6, 0.5e6, 0)]
    controller = [row for row in rows if row["ph"] == "X" and names[row["pid"]] == "controller"]
    assert {row["tid"] for row in controller} == {0}, "a phase lies within its step"
    assert controller[0]["args"] == {"step": 1}


def test_the_command_writes_the_trace_beside_the_events_and_says_who_was_at_work(tmp_path: Path) -> None:
    events = [{"kind": "span", **vars(span)} for span in [*STEPS, Span("policy[0]", "update", 12.0, 2.0)]]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    result = CliRunner().invoke(app, ["timeline", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "timeline.json").is_file()
    assert "policy[0]" in result.output
    assert "20.0 %" in result.output


def test_a_folder_without_spans_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no spans"):
        read_spans(tmp_path)
