"""The controller's side of the engines: gives prompts to the least busy one and keeps their weights current.

    ask(prompts) --> waiting --> an engine that serves --> poll(): whole groups, one call under way to each engine
    publish()    --> every engine, between two of its steps; what it is generating goes on

    lost engine --> a new one starts beside the others, which take over its prompts, with the same seeds
                --> brought to the current weights, it serves again (engine/schedule/fleet.py)

Nothing here waits for an engine but while weights are loaded. While no engine serves, prompts wait.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heapreplace
from typing import Any

from ray.exceptions import RayError

from actors.group import (
    ActorDiedError,
    ActorError,
    Pulse,
    RaisedError,
    WorkerGroup,
    as_completed,
    finished,
    gather,
    late,
)
from actors.policy import PolicyGroup
from actors.rollout import serves_teacher
from actors.shared_memory import UnreachableError
from actors.weight_transfer import Route, TransferError
from actors.weights import Ack, ChecksumError, Snapshot
from engine.config import Config
from engine.roles import Generation, GenerationRequest, SamplingSettings, WorkerLostError
from engine.schedule.fleet import Fleet
from engine.schedule.incidents import Incident
from engine.schedule.ledger import spans

IDLE_S = 0.1
"""So long a poll waits where there is nothing to wait for."""
COLLECT_S = 5.0
"""An engine that has nothing to give answers after so long, and is asked again."""


@dataclass(frozen=True)
class _Asked:
    """A prompt, and since when it waits or an engine has it."""

    request: GenerationRequest
    settings: SamplingSettings
    since: float

    @property
    def tokens(self) -> int:
        """What it may come to."""
        return len(self.request.seeds) * self.settings.max_new_tokens + len(self.request.prompt)


class RolloutGroup:
    """Engines that come and go."""

    def __init__(self, config: Config, workers: WorkerGroup, policy: PolicyGroup, route: Route = "memory") -> None:
        """The workers are started, and get their weights by this `route`."""
        self.config = config
        self.workers = workers
        self.policy = policy
        self.route = route
        self.fleet = Fleet(len(workers.actors))
        self.restarts = 0
        self._snapshot: Snapshot | None = None
        """Of the version that is served, for engines that come back while the policy is at work."""
        self._spread = False
        """Whether an engine is on another machine than the policy."""
        self._sent_at = 0
        """`changes` of the policy for which its weights are those of this version."""
        self._waiting: list[_Asked] = []
        self._held: list[dict[int, _Asked]] = [{} for _ in workers.actors]
        self._collecting: dict[Any, int] = {}
        self._starting: dict[Any, int] = {}
        self._pulse = Pulse()
        for rank in self.fleet.starting():
            self._joins(rank)

    @property
    def version(self) -> int | None:
        """The weights that engines serve."""
        return self.fleet.version

    def publish(self, version: int) -> dict[str, float]:
        """Bring every engine that is up to the policy's weights under this version; returns timings and sizes.

        Engines that hold this version already are left as they are.

        Raises:
            ActorError: an engine failed to load them.
        """
        if version == self.version:
            return {}
        start = time.monotonic()
        self.fleet.expect(version)
        self._take_joined()
        if self.route != "memory":
            self._sent_at = self.policy.changes
            return self._published(self._send())
        snapshot = self.policy.publish(version, spread=self._spread)
        packed = time.monotonic()
        snapshot = self._load(snapshot, republish=True)
        self._snapshot = snapshot if self.config.rl.max_staleness > 0 else None
        return self._published(snapshot.num_bytes) | {"time/publish_pack": packed - start}

    def _published(self, num_bytes: int) -> dict[str, float]:
        assert self.version is not None
        return {
            "rollout/weight_bytes": float(num_bytes),
            "rollout/weight_version": float(self.version),
            "rollout/engine_restarts": float(self.restarts),
        }

    def ask(self, requests: Sequence[GenerationRequest], settings: SamplingSettings) -> None:
        """Have prompts answered, each under a key of its own; `poll` gives the responses."""
        assert self.version is not None, "samples were asked for before any weights were published"
        self._waiting += [_Asked(request, settings, time.monotonic()) for request in requests]

    def poll(self, wait_s: float) -> list[tuple[int, list[Generation]]]:
        """(key, responses) of prompts that are answered in full; waits for the first up to `wait_s` seconds.

        Raises:
            DeadlineError: no engine came up within `timeouts.start` while none serves.
        """
        answers: list[tuple[int, list[Generation]]] = []
        try:
            self._take_joined()
            if self._waiting:
                self._give_out()
            if self._collecting:
                self._take_answers(wait_s, answers)
            elif self._starting:
                self._take_joined(wait_s)
            else:
                time.sleep(min(wait_s, IDLE_S))
            self._check_deadlines()
        except WorkerLostError as error:
            if error.group != self.workers.name or (error.kind == "actor_late" and not self.fleet.serving()):
                raise
            self._lose(error)
        return answers

    def reset(self) -> None:
        """Forget what is under way and which weights were loaded."""
        self._waiting, self._held, self._collecting = [], [{} for _ in self.workers.actors], {}
        self._snapshot = None
        self.fleet.expect(None)
        for rank in self.fleet.stale():
            try:
                call = self.workers.submit(rank, "reset", aside=True)  # others may be waiting in it
                gather({call: (self.workers, rank)}, "reset", self.config.timeouts.publish)
            except WorkerLostError as error:
                self._lose(error)
        self._serve_teacher()

    def _serve_teacher(self) -> None:
        """Engines that hold a teacher from disk serve it as version 0 from the start."""
        if serves_teacher(self.config):
            self.fleet.expect(0)
            for rank in self.fleet.stale():
                self.fleet.acknowledged(rank, 0)

    def _give_out(self) -> None:
        """Give the prompts that wait to the engines that serve, the least busy first."""
        self._catch_up()
        serving = self.fleet.serving()
        if not serving:
            return
        shares: dict[int, list[_Asked]] = {rank: [] for rank in serving}
        least = [(sum(asked.tokens for asked in self._held[rank].values()), rank) for rank in serving]
        heapify(least)
        now = time.monotonic()
        for asked in self._waiting:
            tokens, rank = least[0]
            heapreplace(least, (tokens + asked.tokens, rank))
            shares[rank].append(_Asked(asked.request, asked.settings, now))
        self._waiting = []
        for rank, share in shares.items():  # held before they are sent: whatever fails now, none is lost
            self._held[rank] |= {asked.request.key: asked for asked in share}
        for rank, share in shares.items():
            if share:
                self._admit(rank, share)

    def _admit(self, rank: int, share: Sequence[_Asked]) -> None:
        try:
            calls: dict[Any, tuple[WorkerGroup, int]] = {}
            for settings in dict.fromkeys(asked.settings for asked in share):
                requests = [asked.request for asked in share if asked.settings == settings]
                calls[self.workers.submit(rank, "admit", requests, settings, version=self.version)] = (
                    self.workers,
                    rank,
                )
            gather(calls, "admit", self.config.timeouts.generate)
        except WorkerLostError as error:
            if error.group != self.workers.name:
                raise
            self._lose(error)
            return
        ids = spans(sample for asked in share for sample in asked.request.sample_ids)
        self.workers.record("dispatched", engine=rank, version=self.version, sample_ids=ids)
        if rank not in self._collecting.values():
            self._collect(rank)

    def _take_answers(self, wait_s: float, answers: list[tuple[int, list[Generation]]]) -> None:
        """Add what engines have answered, waiting for the first up to `wait_s` seconds; an error loses none of it."""
        pending = {ref: (self.workers, rank) for ref, rank in self._collecting.items()}
        for ref, (groups, busy) in finished(pending, "collect", wait_s, self._pulse):
            rank = self._collecting.pop(ref)
            for start, end in busy:
                self.workers.record_span(rank, "generate", start, end)
            for key, generations in groups:
                del self._held[rank][key]
                answers.append((key, generations))
            self._collect(rank)

    def _collect(self, rank: int) -> None:
        """Have a call wait in an engine that has prompts."""
        if self._held[rank]:
            self._collecting[self.workers.submit(rank, "collect", wait_s=COLLECT_S)] = rank

    def _check_deadlines(self) -> None:
        """Raise DeadlineError for the first engine that keeps a prompt too long, or where none comes up to take one."""
        now, timeouts = time.monotonic(), self.config.timeouts
        for rank, held in enumerate(self._held):
            oldest = min((asked.since for asked in held.values()), default=now)
            if now - oldest > timeouts.generate:
                raise late([(self.workers, rank)], "generate", now - oldest, timeouts.generate)
        waited = now - min((asked.since for asked in self._waiting), default=now)
        if waited > timeouts.start and not self.fleet.serving():
            absent = [*self.fleet.starting(), *self.fleet.stale()]
            raise late([(self.workers, rank) for rank in absent], "start", waited, timeouts.start)

    def _lose(self, error: WorkerLostError) -> None:
        """Report a lost engine and replace it."""
        samples = [sample for asked in self._held[error.rank].values() for sample in asked.request.sample_ids]
        self.workers.report(error.incident("replaced, its prompts given out again", samples))
        self._replace(error.rank)

    def _replace(self, rank: int) -> None:
        """Start another engine in the place of one, whose prompts wait for others; nobody waits for it."""
        held = [replace(asked, since=time.monotonic()) for asked in self._held[rank].values()]
        self._held[rank] = {}
        self._waiting = [*held, *self._waiting]
        self._collecting = {ref: holder for ref, holder in self._collecting.items() if holder != rank}
        self.restarts += 1
        self.fleet.lost(rank)
        self._starting = {ref: holder for ref, holder in self._starting.items() if holder != rank}
        self.workers.begin_restart(rank)
        self._starting[self.workers.submit(rank, "start", in_turn=self.workers.turns is not None)] = rank

    def _take_joined(self, wait_s: float = 0.0) -> None:
        """Count in the engines that have come up, waiting for the first of them up to `wait_s` seconds."""
        if not self._starting:
            return
        pending = {ref: (self.workers, rank) for ref, rank in self._starting.items()}
        try:
            for ref, _ in finished(pending, "start", wait_s, self._pulse):
                self._joins(self._starting.pop(ref))
        except WorkerLostError as error:
            self._lose(error)

    def _joins(self, rank: int) -> None:
        self.fleet.started(rank)
        if serves_teacher(self.config):
            self._serve_teacher()

    def _catch_up(self) -> None:
        """Bring engines that came up to the current weights."""
        if not self.fleet.stale():
            return
        assert self.version is not None
        if self.route != "memory":
            if self.policy.changes == self._sent_at:
                self._send()
        elif self.config.rl.max_staleness == 0:
            self._load(self.policy.publish(self.version, spread=self._spread), republish=True)
        elif self._snapshot is not None:
            self._load(self._snapshot, republish=False)

    def _send(self) -> int:
        """Have the policy send its weights to the engines that lack them, and return the bytes.

        Raises:
            ActorDiedError: an engine or the way to it failed amid them. The policy counts as lost then, since its ranks
                may still wait for each other; the engines, which may have a part, are replaced.
        """
        assert self.version is not None
        ranks, start, timeout_s = self.fleet.stale(), time.time(), self.config.timeouts.publish
        if not ranks:
            return 0
        try:
            expected, num_bytes = self.policy.send(self.version, [self.workers.actors[rank] for rank in ranks])
        except ActorError as error:
            if isinstance(error, RaisedError) and not isinstance(error.__cause__, TransferError):
                raise
            for rank in ranks:
                self._replace(rank)
            if isinstance(error, WorkerLostError):
                raise
            raise ActorDiedError(str(error), kind="actor_died", group=self.policy.workers.name, rank=0) from error
        calls = {self.workers.submit(rank, "acknowledge"): (self.workers, rank) for rank in ranks}
        for rank, ack in zip(ranks, gather(calls, "acknowledge", timeout_s), strict=True):
            self._serves(rank, ack, expected, start)
        return num_bytes

    def _serves(self, rank: int, ack: Ack | None, expected: Ack, start: float) -> None:
        """Count on an engine that has acknowledged what it was to load.

        Raises:
            ActorError: it acknowledged something else.
        """
        if ack != expected:
            raise ActorError(f"{self.workers.rank_name(rank)}: acknowledged {ack}, not {expected}")
        self.fleet.acknowledged(rank, expected.version)
        self.workers.record_span(rank, "load_weights", start, time.time())
        self.workers.record("serves", engine=rank, version=expected.version, checksum=expected.checksum)

    def _load(self, snapshot: Snapshot, *, republish: bool) -> Snapshot:
        """Bring the engines that lack a snapshot to it, see that they have it, and return the one they have.

        One that did not arrive is published again, if the policy still holds those weights (`republish`); else the
        engines that lack it wait for the next version.

        Raises:
            ActorError: one failed to load it or acknowledged something else.
        """
        timeout_s = self.config.timeouts.publish
        calls: dict[Any, int] = {}
        while stale := self.fleet.stale():
            lacking = [rank for rank in stale if rank not in calls.values()]
            calls |= {self.workers.submit(rank, "load_weights", snapshot, timeout_s): rank for rank in lacking}
            start = time.time()
            try:
                pending = {ref: (self.workers, rank) for ref, rank in calls.items()}
                for ref, ack in as_completed(pending, "load_weights", timeout_s):
                    self._serves(calls.pop(ref), ack, Ack(snapshot.version, snapshot.checksum), start)
            except WorkerLostError as error:
                if error.group != self.workers.name:
                    raise
                calls = {ref: rank for ref, rank in calls.items() if rank != error.rank}
                self._lose(error)
            except RaisedError as error:
                elsewhere = isinstance(error.__cause__, UnreachableError)  # than the policy's machine
                if not elsewhere and not isinstance(error.__cause__, ChecksumError | RayError):  # a bit lost, or a node
                    raise
                calls = {ref: rank for ref, rank in calls.items() if rank != error.rank}
                self._spread = self._spread or elsewhere
                if elsewhere and snapshot.copies:
                    continue  # another engine had the same to say
                if not elsewhere:
                    name = self.workers.rank_name(error.rank)
                    self.workers.report(Incident("weights_corrupted", name, "published again", str(error)))
                if not republish:
                    self._snapshot = None
                    break
                snapshot = self.policy.publish(snapshot.version, spread=self._spread)
        return snapshot
