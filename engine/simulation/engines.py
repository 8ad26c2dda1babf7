"""An engine with continuous batching, simulated from one change to the next and not step by step.

All running samples gain a token with each engine step, so samples that run together finish in the order of
`steps at the start + length`, and k steps from here cost

    k * (decode_step + n * decode_sample + context * decode_context)  +  decode_context * n * k * (k - 1) / 2

with n samples running, whose context grows by n tokens per step. Changes (a sample begins, weights arrive, the engine
is lost) happen between two steps, as in the real engine: the step under way is finished first.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from heapq import heappop, heappush

from engine.schedule.costs import Costs

Running = tuple[int, int, int, int]
"""Engine step at which it ends, at which it began, tokens of its prompt, number of its group."""


class Engine:
    """Samples that run, those that queue for a slot (first come, first served), and the versions that made tokens."""

    def __init__(self, costs: Costs, slots: int) -> None:
        """`slots` samples run at once."""
        self.costs = costs
        self.slots = slots
        self.time = 0.0
        """Until when it is simulated; beyond now while it finishes a step, reads a prompt or loads weights."""
        self.steps = 0
        self.busy_s = 0.0
        self.loading_s = 0.0
        self._context = 0
        self._running: list[Running] = []
        self._queue: deque[tuple[int, int, int, bool]] = deque()
        self._versions: list[tuple[int, int]] = []
        """(engine step from which on, version), oldest first."""

    def give(self, now: float, group: int, prompt_tokens: int, lengths: Sequence[int]) -> None:
        """Queue a sample of each length; the prompt is read for the first and then in the prefix cache."""
        self._advance(now)
        self._queue.extend((length, prompt_tokens, group, i == 0) for i, length in enumerate(lengths))
        self._fill()

    def next_finish(self) -> float:
        """When the next sample finishes, if nothing changes before."""
        return self.time + self._seconds(self._running[0][0] - self.steps) if self._running else math.inf

    def finish(self) -> list[tuple[int, int, int]]:
        """Go on to `next_finish`: (group, step of the beginning, step of the end) of each sample that is whole."""
        self._go(self._running[0][0] - self.steps)
        done = []
        while self._running and self._running[0][0] == self.steps:
            end, start, prompt_tokens, group = heappop(self._running)
            self._context -= prompt_tokens + end - start
            done.append((group, start, end))
        self._fill()
        return done

    def load(self, now: float, version: int, *, keep: int, recompute: bool) -> None:
        """Pause for new weights; with `recompute`, what runs is read again under them. `keep` versions are known."""
        self._advance(now)
        self.time += self.costs.publish_s
        self.loading_s += self.costs.publish_s
        if recompute:
            self._work(self._context * self.costs.prefill_token_s)
        self._versions = [*self._versions[1 - keep :], (self.steps, version)] if keep > 1 else [(self.steps, version)]

    def clear(self, now: float) -> int:
        """Forget all samples; returns the tokens that those which ran had."""
        self._advance(now)
        lost = sum(self.steps - start for _, start, _, _ in self._running)
        self._running, self._context = [], 0
        self._queue.clear()
        return lost

    def versions(self, start: int, end: int) -> list[tuple[int, int]]:
        """(version, tokens) of a sample that ran between these engine steps."""
        found = []
        for since, version in reversed(self._versions):
            first = max(since, start)
            if end > first:
                found.append((version, end - first))
                end = first
            if end == start:
                break
        return found

    def _fill(self) -> None:
        while self._queue and len(self._running) < self.slots:
            length, prompt_tokens, group, first = self._queue.popleft()
            heappush(self._running, (self.steps + length, self.steps, prompt_tokens, group))
            self._context += prompt_tokens
            if first:
                self._work(prompt_tokens * self.costs.prefill_token_s)

    def _advance(self, now: float) -> None:
        """Simulate until now, to the end of the step under way."""
        if not self._running:
            self.time = max(self.time, now)
        elif now > self.time:
            self._go(min(self._steps_within(now - self.time), self._running[0][0] - self.steps))

    def _go(self, steps: int) -> None:
        self._work(self._seconds(steps))
        self.steps += steps
        self._context += steps * len(self._running)

    def _work(self, seconds: float) -> None:
        self.time += seconds
        self.busy_s += seconds

    def _seconds(self, steps: int) -> float:
        growth = self.costs.decode_context_s * len(self._running)
        return steps * self._step_seconds() + growth * steps * (steps - 1) / 2

    def _step_seconds(self) -> float:
        costs = self.costs
        return costs.decode_step_s + len(self._running) * costs.decode_sample_s + self._context * costs.decode_context_s

    def _steps_within(self, seconds: float) -> int:
        """The least number of steps that take so long: the root of `_seconds`, rounded up."""
        curve = self.costs.decode_context_s * len(self._running) / 2
        slope = self._step_seconds() - curve
        root = 2 * seconds / (slope + math.sqrt(slope * slope + 4 * curve * seconds))
        return math.ceil(root - 1e-9)
