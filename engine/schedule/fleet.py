"""Which engines may be given prompts: a pure state machine.

    starting -> stale -> serving
                  ^         |        expect(version): who serves is stale until it acknowledges the new version
       ^----------+---------+        lost: from any state

The transition that must not exist is one into `serving` without an acknowledgement of the expected version: neither an
engine that has just started, nor one that missed an update, nor one that acknowledges late what is no longer expected
is ever given a prompt. Engines may be lost and return at any time; the others go on.
"""

from __future__ import annotations

from typing import Literal

State = Literal["starting", "stale", "serving"]


class Fleet:
    """The engines, by number, and the weight version that they are expected to hold."""

    def __init__(self, size: int) -> None:
        self.version: int | None = None
        self._states: list[State] = ["starting"] * size

    def started(self, member: int) -> None:
        """It answers, and holds no weights that count."""
        assert self._states[member] == "starting", f"engine {member} was {self._states[member]} before it started"
        self._states[member] = "stale"

    def expect(self, version: int | None) -> None:
        """From now on only this version counts; None: no version does."""
        self.version = version
        self._states = ["stale" if state == "serving" else state for state in self._states]

    def acknowledged(self, member: int, version: int) -> None:
        """It has loaded a version, checksum and all; another version than the expected one changes nothing."""
        assert self._states[member] != "starting", f"engine {member} acknowledged weights before it was up"
        if version == self.version:
            self._states[member] = "serving"

    def lost(self, member: int) -> None:
        """It is gone; the next one in its place is starting."""
        self._states[member] = "starting"

    def serving(self) -> list[int]:
        """Who may be given prompts."""
        return self._in("serving")

    def stale(self) -> list[int]:
        """Who is up and lacks the expected version."""
        return self._in("stale")

    def starting(self) -> list[int]:
        """Who is not up."""
        return self._in("starting")

    def _in(self, state: State) -> list[int]:
        return [member for member, held in enumerate(self._states) if held == state]
