"""The account of every sample: admitted, then trained or dropped with a named reason. A pure state machine.

    admit -> in flight -> train
                       -> drop(reason)

There is no way back into flight and none out of `trained` or `dropped`: a sample that takes such a step twice, or
that was never admitted, is an error of the program and raises.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

TRAINED = "trained"


def spans(ids: Iterable[int]) -> str:
    """Numbers in short, for the record: `0-15,32`."""
    parts: list[list[int]] = []
    for number in sorted(int(i) for i in ids):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


class SampleLedger:
    """Counts samples so that none is lost: admitted == trained + dropped + in flight, always."""

    def __init__(self) -> None:
        self._next_id = 0
        self._in_flight: set[int] = set()
        self.trained = 0
        self.dropped: Counter[str] = Counter()
        self._news: dict[str, list[int]] = {}

    @property
    def admitted(self) -> int:
        """Samples ever admitted."""
        return self._next_id

    @property
    def in_flight(self) -> frozenset[int]:
        """Samples admitted and not yet settled."""
        return frozenset(self._in_flight)

    def admit(self, count: int) -> list[int]:
        """Unique ids for `count` new samples."""
        ids = list(range(self._next_id, self._next_id + count))
        self._next_id += count
        self._in_flight.update(ids)
        return ids

    def train(self, sample_ids: Iterable[int]) -> None:
        """These samples were part of an optimizer update."""
        self.trained += self._settle(sample_ids, TRAINED)

    def drop(self, sample_ids: Iterable[int], reason: str) -> None:
        """These samples will not be trained, for this reason."""
        self.dropped[reason] += self._settle(sample_ids, reason)

    def news(self) -> dict[str, str]:
        """What became of samples since the last call: `trained`, or why they were dropped -> their ids (`spans`)."""
        news, self._news = self._news, {}
        return {outcome: spans(ids) for outcome, ids in news.items()}

    def check(self) -> None:
        """Assert the account.

        Raises:
            AssertionError: the sums differ.
        """
        settled = self.trained + sum(self.dropped.values())
        assert self.admitted == settled + len(self._in_flight), (
            f"ledger: admitted {self.admitted}, trained {self.trained}, dropped {dict(self.dropped)}, "
            f"in flight {len(self._in_flight)}"
        )

    def state_dict(self) -> dict[str, Any]:
        """The account between two steps: plain JSON, for a checkpoint."""
        return {
            "next_id": self._next_id,
            "trained": self.trained,
            "dropped": dict(self.dropped),
            "in_flight": sorted(self._in_flight),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""
        self._next_id, self.trained = state["next_id"], state["trained"]
        self.dropped = Counter(state["dropped"])
        self._in_flight = set(state["in_flight"])
        self.check()

    def _settle(self, sample_ids: Iterable[int], outcome: str) -> int:
        ids = [int(i) for i in sample_ids]
        unknown = [i for i in ids if i not in self._in_flight]
        assert not unknown, f"samples settled before, or never admitted: {unknown}"
        assert len(set(ids)) == len(ids), f"samples settled twice at once: {ids}"
        self._in_flight.difference_update(ids)
        self._news.setdefault(outcome, []).extend(ids)
        return len(ids)
