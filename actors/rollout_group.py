"""The controller's side of the engines: gives prompts to the least busy one and keeps their weights current.

    lost engine --> a new one starts beside the others, which take over its prompts, with the same seeds
                --> brought to the current weights, it serves again (engine/schedule/fleet.py)

The run waits for an engine only while none serves.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from ray.exceptions import RayError

from actors.group import ActorError, RaisedError, WorkerGroup, as_completed, gather
from actors.policy import PolicyGroup
from actors.rollout import serves_teacher
from actors.weights import Ack, ChecksumError, Snapshot
from engine.config import Config
from engine.roles import Generation, GenerationRequest, Record, SamplingSettings, WorkerLostError
from engine.schedule.fleet import Fleet
from engine.schedule.incidents import Incident
from engine.schedule.ledger import spans

Calls = dict[Any, tuple[int, GenerationRequest]]
"""Reference of a call -> engine and the prompt whose responses it waits for."""


class RolloutGroup:
    """Engines that come and go."""

    def __init__(
        self, config: Config, workers: WorkerGroup, policy: PolicyGroup, record: Record = lambda kind, **fields: None
    ) -> None:
        """The workers are started; `record` takes down what is decided."""
        self.config = config
        self.workers = workers
        self.policy = policy
        self.record = record
        self.fleet = Fleet(len(workers.actors))
        self.restarts = 0
        self._starting: dict[Any, int] = {}
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
        snapshot = self.policy.publish(version)
        packed = time.monotonic()
        self._load(snapshot)
        return {
            "time/publish_pack": packed - start,
            "rollout/weight_bytes": float(snapshot.num_bytes),
            "rollout/weight_version": float(version),
            "rollout/engine_restarts": float(self.restarts),
        }

    def generate(
        self, requests: Sequence[GenerationRequest], settings: SamplingSettings
    ) -> Iterator[tuple[int, list[Generation]]]:
        """Yields (key, responses) as each prompt's responses are whole, in any order."""
        assert self.version is not None, "samples were asked for before any weights were published"
        deadline = time.monotonic() + self.config.timeouts.generate
        waiting, calls = list(requests), Calls()
        while waiting or calls:
            try:
                self._take_joined()
                if waiting:
                    self._make_serve()
                    waiting = self._admit(waiting, calls, settings)
                pending = {ref: (self.workers, rank) for ref, (rank, _) in calls.items()}
                for ref, generations in as_completed(pending, "generate", max(0.0, deadline - time.monotonic())):
                    yield calls.pop(ref)[1].key, generations
            except WorkerLostError as error:
                if error.group != self.workers.name:
                    raise
                held = _taken_back(calls, error.rank)
                self._lose(error, held)
                waiting += held
                deadline = time.monotonic() + self.config.timeouts.generate

    def reset(self) -> None:
        """Forget what is under way and which weights were loaded."""
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

    def _admit(
        self, requests: Sequence[GenerationRequest], calls: Calls, settings: SamplingSettings
    ) -> list[GenerationRequest]:
        """Give prompts to the engines that serve, and add the calls that wait for them; returns what nobody took."""
        serving = self.fleet.serving()
        shares: dict[int, list[GenerationRequest]] = {rank: [] for rank in serving}
        tokens = {rank: sum(_tokens(r, settings) for held, r in calls.values() if held == rank) for rank in serving}
        for request in requests:
            rank = min(serving, key=tokens.__getitem__)
            tokens[rank] += _tokens(request, settings)
            shares[rank].append(request)
        left: list[GenerationRequest] = []
        within_s = self.config.timeouts.generate
        for rank, share in shares.items():
            if not share:
                continue
            try:
                call = self.workers.submit(rank, "admit", share, settings, version=self.version)
                gather({call: (self.workers, rank)}, "admit", within_s)
            except WorkerLostError as error:
                if error.group != self.workers.name:
                    raise
                held = [*share, *_taken_back(calls, rank)]
                self._lose(error, held)
                left += held
                continue
            ids = spans(sample for request in share for sample in request.sample_ids)
            self.record("dispatched", engine=rank, version=self.version, sample_ids=ids)
            for request in share:
                calls[self.workers.submit(rank, "collect", request.key, within_s=within_s)] = (rank, request)
        return left

    def _lose(self, error: WorkerLostError, held: Sequence[GenerationRequest] = ()) -> None:
        """Start another engine in the place of a lost one; nobody waits for it."""
        samples = [sample for request in held for sample in request.sample_ids]
        self.workers.report(error.incident("replaced, its prompts given out again", samples))
        self.restarts += 1
        self.fleet.lost(error.rank)
        self._starting = {ref: rank for ref, rank in self._starting.items() if rank != error.rank}
        self.workers.begin_restart(error.rank)
        self._starting[self.workers.submit(error.rank, "start", in_turn=self.workers.turns is not None)] = error.rank

    def _take_joined(self, wait_s: float = 0.0) -> None:
        """Count in the engines that have come up, waiting for the first of them up to `wait_s` seconds."""
        pending = {ref: (self.workers, rank) for ref, rank in self._starting.items()}
        try:
            for ref, _ in as_completed(pending, "start", wait_s):
                self._joins(self._starting.pop(ref))
                if wait_s:
                    return
        except WorkerLostError as error:
            if error.kind != "actor_late":
                self._lose(error)
            elif wait_s:
                raise

    def _joins(self, rank: int) -> None:
        self.fleet.started(rank)
        if serves_teacher(self.config):
            self._serve_teacher()

    def _make_serve(self) -> None:
        """Bring engines that came up to the current weights; while there is none that serves, wait for one.

        Raises:
            DeadlineError: none came up in time.
        """
        while True:
            if self.fleet.stale():
                assert self.version is not None
                self._load(self.policy.publish(self.version))
            if self.fleet.serving():
                return
            self._take_joined(self.config.timeouts.start)

    def _load(self, snapshot: Snapshot) -> None:
        """Bring the engines that lack a snapshot to it, and see that they have it.

        Raises:
            ActorError: one failed to load it or acknowledged something else.
        """
        timeout_s = self.config.timeouts.publish
        calls: dict[Any, int] = {}
        while stale := self.fleet.stale():
            lacking = [rank for rank in stale if rank not in calls.values()]
            calls |= {self.workers.submit(rank, "load_weights", snapshot, timeout_s): rank for rank in lacking}
            try:
                pending = {ref: (self.workers, rank) for ref, rank in calls.items()}
                for ref, ack in as_completed(pending, "load_weights", timeout_s):
                    rank = calls.pop(ref)
                    if ack != Ack(snapshot.version, snapshot.checksum):
                        name = self.workers.rank_name(rank)
                        raise ActorError(f"{name}: acknowledged {ack}, not version {snapshot.version}")
                    self.fleet.acknowledged(rank, snapshot.version)
                    self.record("serves", engine=rank, version=snapshot.version, checksum=snapshot.checksum)
            except WorkerLostError as error:
                if error.group != self.workers.name:
                    raise
                calls = {ref: rank for ref, rank in calls.items() if rank != error.rank}
                self._lose(error)
            except RaisedError as error:
                if not isinstance(error.__cause__, ChecksumError | RayError):  # a bit lost, or all of it with its node
                    raise
                calls = {ref: rank for ref, rank in calls.items() if rank != error.rank}
                name = self.workers.rank_name(error.rank)
                self.workers.report(Incident("weights_corrupted", name, "published again", str(error)))
                snapshot = self.policy.publish(snapshot.version)


def _taken_back(calls: Calls, rank: int) -> list[GenerationRequest]:
    """The prompts that an engine had, whose calls nobody waits for any more."""
    return [calls.pop(ref)[1] for ref in [ref for ref, (holder, _) in calls.items() if holder == rank]]


def _tokens(request: GenerationRequest, settings: SamplingSettings) -> int:
    return len(request.seeds) * settings.max_new_tokens + len(request.prompt)
