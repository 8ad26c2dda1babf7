"""Takes down what goes wrong with the machines, tells a person, and ends the run when it is too much."""

from __future__ import annotations

from dataclasses import asdict

from engine.schedule.incidents import WINDOW, Incident, IncidentBudget
from engine.tracking.tracker import Tracker


class TooManyIncidentsError(RuntimeError):
    """The budget of incidents is used up. The message sums them up."""


class IncidentLog:
    """The incidents of one run."""

    def __init__(self, tracker: Tracker, *, stop_after: int) -> None:
        self._tracker = tracker
        self._budget = IncidentBudget(stop_after)

    def finished(self, step: int) -> None:
        """A step is over."""
        self._budget.finished(step)

    def report(self, incident: Incident) -> None:
        """Record an incident as an event.

        Raises:
            TooManyIncidentsError: more than `ray.stop_after_incidents` within the window.
        """
        fields = asdict(incident)
        self._tracker.event("incident", incident=fields.pop("kind"), **fields)
        self._tracker.note(f"{incident.kind}: {incident.message}; {incident.action}")
        if not self._budget.spend(incident):
            raise TooManyIncidentsError(
                f"more than {self._budget.limit} incidents within {WINDOW} steps (ray.stop_after_incidents): "
                f"{self._budget.summary()}. The last: {incident.message}"
            )
