"""What goes wrong with the machines, and how much of it a run bears: a pure counter.

Incidents of the last `WINDOW` steps count. Steps count only when they are further than any before, so that a run which
is thrown back again and again to the same step uses its budget up, and one that loses a machine now and then does not.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from typing import Literal

WINDOW = 100


@dataclass(frozen=True)
class Incident:
    """Something that went wrong with the machines, not with the data or the numbers."""

    kind: Literal["actor_died", "actor_silent", "actor_late", "weights_corrupted", "checkpoint_failed"]
    actor: str
    """Who: `rollout[1]`."""
    action: str
    """What is done about it: `replaced`."""
    message: str
    """What is known."""
    sample_ids: tuple[int, ...] = ()
    """Samples that it held and that are given to others."""


class IncidentBudget:
    """Counts incidents by (kind, actor)."""

    def __init__(self, limit: int) -> None:
        """`limit` incidents within `WINDOW` steps are borne."""
        self.limit = limit
        self._furthest = 0
        self._recent: deque[tuple[int, str, str]] = deque()

    def finished(self, step: int) -> None:
        """A step is over."""
        self._furthest = max(self._furthest, step)
        while self._recent and self._recent[0][0] <= self._furthest - WINDOW:
            self._recent.popleft()

    def spend(self, incident: Incident) -> bool:
        """Count an incident; whether that is within the budget."""
        self._recent.append((self._furthest, incident.kind, incident.actor))
        return len(self._recent) <= self.limit

    def summary(self) -> str:
        """What was counted: `actor_died: rollout[0] x 3, policy[1]`."""
        kinds: dict[str, Counter[str]] = {}
        for _, kind, actor in self._recent:
            kinds.setdefault(kind, Counter())[actor] += 1
        return "; ".join(
            f"{kind}: {', '.join(actor if n == 1 else f'{actor} x {n}' for actor, n in actors.most_common())}"
            for kind, actors in kinds.items()
        )
