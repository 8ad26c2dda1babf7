"""Ctrl-C ends at once; SIGTERM lets a step whose updates have begun come to its end."""

from __future__ import annotations

import os
import signal
import time

import pytest

from engine import stop_signals
from engine.stop_signals import StopSignals


def test_ctrl_c_interrupts_at_once_and_the_second_one_is_ignored_for_a_while():
    with StopSignals() as signals:
        signals.worth_waiting = lambda: True
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_interrupts_at_once_where_waiting_is_worth_nothing():
    with StopSignals(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_waits_for_the_end_of_the_step():
    with StopSignals() as signals:
        signals.worth_waiting = lambda: True
        signals.step_is_over()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signals.step_is_over()
        signals.step_is_over()


def test_but_not_for_ever(monkeypatch):
    monkeypatch.setattr(stop_signals, "PATIENCE_S", 0.1)
    with StopSignals() as signals:
        signals.worth_waiting = lambda: True
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            time.sleep(10)


def test_the_handlers_of_before_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)]
    with StopSignals():
        assert signal.getsignal(signal.SIGTERM) is not before[1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)] == before
