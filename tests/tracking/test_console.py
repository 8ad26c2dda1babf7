"""The progress line tells step, reward, KL, tokens/s and ETA; a file gets no control codes."""

from __future__ import annotations

import io
import re

import pytest

from engine.tracking.console import Progress


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


METRICS = {"reward/mean": 0.25, "policy/kl": 0.0123456, "time/tokens_per_second": 1234.4, "time/step": 10.0}


def test_a_file_gets_one_plain_line_per_step() -> None:
    out = io.StringIO()
    with Progress("grpo", 20, file=out) as progress:
        progress.step(1, METRICS)
        progress.step(2, METRICS)
    first, second = out.getvalue().splitlines()
    assert first == "grpo  step  1/20  reward 0.2500  KL 0.0123  1234 tok/s  10.0 s/step  ETA 0:03:10"
    assert second.startswith("grpo  step  2/20")
    assert "\x1b" not in out.getvalue()
    assert "\r" not in out.getvalue()


def test_what_a_stage_does_not_measure_is_not_shown() -> None:
    out = io.StringIO()
    with Progress("sft", 5, file=out) as progress:
        progress.step(1, {"time/tokens_per_second": 10.0})
    assert out.getvalue() == "sft  step 1/5  10 tok/s\n"


def test_the_eta_is_the_mean_step_time_times_the_steps_left() -> None:
    out = io.StringIO()
    with Progress("grpo", 4, file=out) as progress:
        progress.step(1, {"time/step": 10.0})
        progress.step(2, {"time/step": 20.0})
        progress.step(4, {"time/step": 30.0})
    assert re.findall(r"ETA (\S+)", out.getvalue()) == ["0:00:30", "0:00:30", "0:00:00"]


def test_a_terminal_gets_the_lines_and_a_live_bar_that_is_gone_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    with Progress("grpo", 3, file=out) as progress:
        progress.step(1, METRICS)
        print("half [way]")
    text = out.getvalue()
    assert "\x1b" in text
    assert "━" in text
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert "grpo  step 1/3  reward 0.2500  KL 0.0123  1234 tok/s  10.0 s/step  ETA 0:00:20\n" in plain
    assert "half [way]\n" in plain  # what others print goes above the bar
    assert text.rstrip("\n").endswith("\x1b[2K")  # the bar's line is erased
    assert "\x1b[?25h" in text  # the cursor is back


def test_a_dumb_terminal_is_treated_as_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    out = Terminal()
    with Progress("grpo", 3, file=out) as progress:
        progress.step(1, METRICS)
    assert "\x1b" not in out.getvalue()


def test_a_stage_that_fits_text_shows_loss_and_accuracy_of_its_training_alone() -> None:
    out = io.StringIO()
    metrics = {"eval/loss": 9.0, "train/loss": 1.23456, "train/accuracy": 0.75, "time/tokens_per_second": 10.0}
    with Progress("reward_model", 5, file=out) as progress:
        progress.step(1, metrics)
    assert out.getvalue() == "reward_model  step 1/5  loss 1.2346  accuracy 0.750  10 tok/s\n"


def test_a_resumed_run_counts_on_and_its_bar_starts_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    with Progress("sft", 8, 6, file=out) as progress:
        fresh = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
        progress.step(7, {"time/step": 30.0})
    assert f"sft {'━' * 30}╺{'━' * 9} 6/8" in fresh
    assert "sft  step 7/8  30.0 s/step  ETA 0:00:30" in out.getvalue()
