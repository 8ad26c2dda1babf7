"""Which groups may start, and which of the finished ones a step takes: a pure state machine.

    start --> running --finish--> waiting --take--> a step's batch
                 +--reject--> nothing: its place is free, or stays empty

With v versions published, B groups in a step and k = max_staleness, at most (k + v + 1) * B - (accepted + running) more
groups may start: AReaL's rule (arXiv:2505.24298). The rule alone bounds how much is under way and not how old it gets,
since a slow group may be overtaken for ever. So a group that started under v must be part of the step that trains
version v + k or of one before it, and `take` lets younger groups pass only while all older ones can still meet theirs:
for every d, no more groups that are due by d may be left than fit into the steps up to d.

k = 0 is the synchronous loop: a step's groups start after its predecessor's weights, and the step takes them all.
"""

from __future__ import annotations

from collections import Counter
from itertools import accumulate, islice


class Admission:
    """The groups under way, by number, and the version that each started under."""

    def __init__(self, groups_per_step: int, max_staleness: int, steps: int) -> None:
        """`steps` is how many will be trained in all: no group starts that none of them would take."""
        self.groups_per_step = groups_per_step
        self.max_staleness = max_staleness
        self.steps = steps
        self.version = 0
        """Steps whose weights are out."""
        self._taken = 0
        self._open: dict[int, int] = {}
        self._finished: dict[int, int] = {}
        self._empty: set[int] = set()
        self._started: Counter[int] = Counter()
        """How many of the open groups started under each version, and how many of those are finished."""
        self._done: Counter[int] = Counter()

    def room(self) -> int:
        """How many more groups may start."""
        ahead = (self.max_staleness + self.version + 1) * self.groups_per_step
        return min(ahead, self.steps * self.groups_per_step) - (self._taken + len(self._open))

    def start(self, group: int) -> None:
        """It goes to an engine."""
        assert self.room() > 0, f"group {group} starts beyond the bound"
        assert group not in self._open, f"group {group} is under way"
        self._open[group] = self.version
        self._started[self.version] += 1

    def finish(self, group: int) -> None:
        """It is generated and scored."""
        self._finished[group] = self._open[group]
        self._done[self._open[group]] += 1

    def reject(self, group: int, *, replace: bool) -> None:
        """It is not to be trained: another may start, or its place in a step stays empty."""
        if replace:
            self._started[self._open.pop(group)] -= 1
        else:
            self._empty.add(group)
            self.finish(group)

    def ready(self) -> bool:
        """Whether the next step can be taken now."""
        if len(self._finished) < self.groups_per_step:
            return False
        versions = sorted(self._started)
        due = accumulate(self._started[version] for version in versions)
        done = accumulate(self._done[version] for version in versions)
        return all(self._needed(*held) <= finished for *held, finished in zip(versions, due, done, strict=True))

    def take(self) -> list[int]:
        """The groups of the next step, in the order in which they started; only when `ready`.

        Those that must not wait come first, then those that finished first. Empty places are left out, so there may be
        fewer than `groups_per_step`.
        """
        assert self.ready(), "a step was taken before its groups were there"
        chosen: dict[int, int] = {}
        count = 0
        for version in sorted(self._started):
            count += self._started[version]
            needed = self._needed(version, count) - len(chosen)
            due = (group for group, held in self._finished.items() if held <= version and group not in chosen)
            chosen |= {group: self._finished[group] for group in islice(due, max(0, needed))}
        rest = (group for group in self._finished if group not in chosen)
        for group in [*chosen, *islice(rest, self.groups_per_step - len(chosen))]:
            chosen[group] = self._finished.pop(group)
            del self._open[group]
        self._taken += len(chosen)
        left = Counter(chosen.values())
        self._started, self._done = self._started - left, self._done - left
        kept = [group for group in sorted(chosen) if group not in self._empty]
        self._empty.difference_update(chosen)
        return kept

    def trained(self) -> None:
        """The step that was taken is over, and its weights are out."""
        self.version += 1
        assert self._taken == self.version * self.groups_per_step, "one step is taken for each that is trained"

    def resume(self, version: int) -> None:
        """Go on after so many steps with nothing under way: what was, starts again."""
        assert not self._open, "groups are under way"
        self.version, self._taken = version, version * self.groups_per_step

    def _needed(self, version: int, count: int) -> int:
        """How many of the `count` groups that started under `version` or earlier the next step has to take."""
        steps_left = version + self.max_staleness - self.version
        return count - steps_left * self.groups_per_step
