"""WorkerGroup: spawn ranks in a placement group, call, gather. Every wait has a deadline.

    controller                 ranks
    call / scatter  ------->   run the method
    gather          <-------   results, in rank order

`gather` watches all pending calls at once, so one rank's exception surfaces at once even when others hang in a
collective with it; a deadline that passes names the ranks that are late, the method and the time it took. Who is waited
for is asked for a sign of life all the while: a stopped process or a cut-off node is found long before the deadline.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError, RuntimeEnvSetupError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.process import RankInfo, free_port
from engine.config import UserError
from engine.roles import Record, Report, WorkerLostError, unrecorded
from engine.schedule.placement import Seat

Arguments = Sequence[tuple[Any, ...]]
"""What each rank's constructor gets."""
ASIDE = "aside"
"""Ray concurrency group of calls that run beside an actor's work: signs of life, writing a checkpoint."""
PROBE_S = 1.0
"""How often those are asked for a sign of life who are waited for."""


class ActorError(RuntimeError):
    """An actor raised or died. The message names actor, method and elapsed time; `__cause__` is what it raised."""


class BrokenError(RuntimeError):
    """What an actor raises when it is of no more use, though its process lives. To the controller it has died."""


class RaisedError(ActorError):
    """An actor raised."""

    def __init__(self, message: str, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


class ActorDiedError(ActorError, WorkerLostError):
    """An actor's process is gone, or as good as gone."""


class DeadlineError(ActorError, WorkerLostError):
    """An actor did not answer in time. The message names the late ones, the method and elapsed time."""


def gather(pending: Mapping[Any, tuple[WorkerGroup, int]], method: str, timeout_s: float) -> list[Any]:
    """All results, in the order of `pending`. Raises as `as_completed` does."""
    results = dict(as_completed(pending, method, timeout_s))
    return [results[ref] for ref in pending]


def as_completed(
    pending: Mapping[Any, tuple[WorkerGroup, int]], method: str, timeout_s: float
) -> Iterator[tuple[Any, Any]]:
    """Yields (reference, result) as calls finish; `pending` maps references to group and rank.

    Raises:
        UserError: the user's input was at fault in the actor.
        RaisedError: an actor raised.
        ActorDiedError: an actor's process died, or gave no sign of life for `timeouts.silence` seconds.
        DeadlineError: not all calls finished within `timeout_s` seconds.
    """
    waiting = dict(pending)
    pulse = Pulse()
    while waiting:
        remaining = timeout_s - pulse.age_s
        done = False
        for ref, result in finished(waiting, method, min(PROBE_S, max(0.0, remaining)), pulse):
            done = True
            del waiting[ref]
            yield ref, result
        if not done and remaining <= PROBE_S:
            raise late(list(waiting.values()), method, pulse.age_s, timeout_s)


def finished(
    pending: Mapping[Any, tuple[WorkerGroup, int]], method: str, wait_s: float, pulse: Pulse
) -> Iterator[tuple[Any, Any]]:
    """Yields (reference, result) of the calls that are done, waiting for the first of them up to `wait_s` seconds.

    While none is, those who are waited for are asked for a sign of life. Raises as `as_completed` does, but for the
    deadline.
    """
    done, waiting = ray.wait(list(pending), timeout=wait_s)
    if done and waiting:
        done += ray.wait(waiting, num_returns=len(waiting), timeout=0)[0]
    for ref in done:
        yield ref, _result(ref, *pending[ref], method, pulse.age_s)
    if not done and method != "start":  # which may have to wait for a place first
        pulse.take(list(pending.values()), method)


def late(members: Sequence[tuple[WorkerGroup, int]], method: str, after_s: float, deadline_s: float) -> DeadlineError:
    """What to raise when these do not answer."""
    group, rank = members[0]
    return DeadlineError(
        f"{', '.join(group.rank_name(rank) for group, rank in members)}: no answer from {method}() after "
        f"{after_s:.1f} s (deadline {deadline_s:.0f} s; see the `timeouts` section if it is truly that slow)",
        kind="actor_late",
        group=group.name,
        rank=rank,
    )


class Pulse:
    """Asks actors for a sign of life, beside what they are doing."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._asked: dict[tuple[WorkerGroup, int], tuple[Any, float]] = {}

    @property
    def age_s(self) -> float:
        """Seconds since it was made."""
        return time.monotonic() - self._start

    def take(self, members: Sequence[tuple[WorkerGroup, int]], method: str) -> None:
        """Ask each of them that has answered; raise ActorDiedError if one has been silent for too long."""
        for group, rank in dict.fromkeys(members):
            if group.silence_s is None:
                continue
            asked = self._asked.get((group, rank))
            if asked is not None and time.monotonic() - asked[1] < PROBE_S:
                continue
            if asked is None or ray.wait([asked[0]], timeout=0)[0]:  # an error is an answer: the call has it too
                self._asked[group, rank] = (group.submit(rank, "__ray_ready__", aside=True), time.monotonic())
            elif time.monotonic() - asked[1] > group.silence_s:
                raise ActorDiedError(
                    f"{group.rank_name(rank)}: no sign of life for {time.monotonic() - asked[1]:.1f} s in {method}() "
                    "(timeouts.silence)",
                    kind="actor_silent",
                    group=group.name,
                    rank=rank,
                )


def _result(ref: Any, group: WorkerGroup, rank: int, method: str, elapsed: float) -> Any:
    name = group.rank_name(rank)
    try:
        return ray.get(ref, timeout=60)  # already there; the time is for a transfer between hosts
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, UserError):
            raise cause from None
        message = f"{name}: {method}() raised after {elapsed:.1f} s: {type(cause).__name__}: {cause}"
        if isinstance(cause, BrokenError):
            raise ActorDiedError(message, kind="actor_died", group=group.name, rank=rank) from cause
        raise RaisedError(message, rank) from cause
    except RayActorError as error:
        why = " ".join(str(error).split())
        message = f"{name}: died after {elapsed:.1f} s in {method}(): {why}"
        raise ActorDiedError(message, kind="actor_died", group=group.name, rank=rank) from error
    except RayError as error:  # out of memory, a result that was lost with its node, an environment that was not set up
        why = " ".join(str(error).split())
        message = f"{name}: lost after {elapsed:.1f} s in {method}(): {type(error).__name__}: {why}"
        if isinstance(error, RuntimeEnvSetupError):
            raise ActorError(message) from error
        raise ActorDiedError(message, kind="actor_died", group=group.name, rank=rank) from error


@dataclass(frozen=True)
class Slots:
    """Where the ranks of one worker group sit in the run's placement group."""

    placement: PlacementGroup
    seats: Sequence[Seat]

    def options(self, rank: int) -> dict[str, Any]:
        """Ray options that put an actor or task into a rank's seat."""
        seat = self.seats[rank]
        own = {name: amount for name, amount in seat.resources.items() if name not in ("CPU", "GPU")}
        return {
            "num_cpus": seat.resources.get("CPU", 0),
            "num_gpus": seat.resources.get("GPU", 0),
            "resources": own,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                placement_group=self.placement, placement_group_bundle_index=seat.bundle
            ),
        }


def rendezvous(slots: Slots, timeout_s: float) -> list[RankInfo]:
    """Addresses for a process group whose rank 0 will live in the first slot.

    Raises:
        ActorError: the slot's node gave none in time.
    """
    task = ray.remote(_address).options(**slots.options(0), max_retries=0)
    try:
        address, port = ray.get(task.remote(), timeout=timeout_s)
    except RayError as error:
        raise ActorError(f"no address for a process group within {timeout_s:.0f} s: {error}") from error
    return [RankInfo(rank, len(slots.seats), address, port) for rank in range(len(slots.seats))]


def _address() -> tuple[str, int]:
    return ray.util.get_node_ip_address(), free_port()


class Turns:
    """Worker groups that share devices: one works, the others have left the devices' memory."""

    def __init__(self, timeout_s: float) -> None:
        """`timeout_s` is how long leaving or returning may take."""
        self._timeout_s = timeout_s
        self._awake: WorkerGroup | None = None

    def start(self, group: WorkerGroup, timeout_s: float) -> None:
        """Start a group, awake, once the devices are free."""
        self._free()
        group.call("start", timeout_s=timeout_s, in_turn=False)
        self._awake = group

    def take(self, group: WorkerGroup) -> None:
        """The devices are this group's; whoever had them has left before it returns to them."""
        if self._awake is not group:
            self._free()
            group.call("wake", timeout_s=self._timeout_s, in_turn=False)
            self._awake = group

    def leave(self, group: WorkerGroup) -> None:
        """The group's processes are gone, and what they held of the devices with them."""
        if self._awake is group:
            self._awake = None

    def _free(self) -> None:
        if self._awake is not None:
            self._awake.call("sleep", timeout_s=self._timeout_s, in_turn=False)
            self._awake = None


class WorkerGroup:
    """The ranks of one role. Actors work in `start`, not in the constructor, whose errors Ray flattens to text.

    A group with `turns` takes the devices before each call.
    """

    def __init__(
        self,
        name: str,
        actor_class: type,
        slots: Slots,
        *,
        arguments: Arguments | Callable[[], Arguments],
        env: Mapping[str, str],
        concurrency: int = 1,
        restarts: int = 0,
        turns: Turns | None = None,
        start_s: float = 600.0,
        silence_s: float | None = None,
        replaceable: bool = False,
        report: Report = lambda incident: None,
        record: Record = unrecorded,
    ) -> None:
        """Makes one actor per slot with its own constructor arguments; `start_all` starts them.

        Args:
            name: how errors name the group.
            actor_class: a plain class.
            slots: where the ranks sit.
            arguments: what each rank's constructor gets; a function is asked again when the group is built anew.
            env: environment variables of the processes.
            concurrency: calls that a rank answers at the same time.
            restarts: how often Ray itself starts a dead actor's process again (-1: always), without `start`.
            turns: whom the group shares its devices with.
            start_s: seconds that starting a rank may take.
            silence_s: seconds without a sign of life after which a rank counts as dead; None never asks.
            replaceable: a rank has no state, so that `call` and `scatter` put a new one in a lost one's place and
                ask it again.
            report: takes down each replacement.
            record: takes down when each rank worked.
        """
        self.name = name
        self.turns = turns
        self.silence_s = silence_s
        self.report = report
        self.record = record
        self._start_s = start_s
        self._replaceable = replaceable
        self._arguments = arguments
        make: Any = ray.remote
        remote = make(concurrency_groups={ASIDE: 2})(actor_class)
        self._remotes = [
            remote.options(
                **slots.options(rank),
                runtime_env={"env_vars": dict(env)},
                max_concurrency=concurrency,
                max_restarts=restarts,
            )
            for rank in range(len(slots.seats))
        ]
        self._given = self._own_arguments()
        self.actors: list[Any] = [make.remote(*own) for make, own in zip(self._remotes, self._given, strict=True)]

    def rank_name(self, rank: int) -> str:
        """How errors name a rank."""
        return f"{self.name}[{rank}]"

    def submit(
        self, rank: int, method: str, *args: Any, in_turn: bool = True, aside: bool = False, **kwargs: Any
    ) -> Any:
        """Start one rank's call and return its reference, to be awaited with `as_completed` or `gather`.

        `aside` runs it beside what the rank is doing, without the devices.
        """
        if self.turns is not None and in_turn and not aside:
            self.turns.take(self)
        call = getattr(self.actors[rank], method)
        return (call.options(concurrency_group=ASIDE) if aside else call).remote(*args, **kwargs)

    def call(self, method: str, *args: Any, timeout_s: float, **kwargs: Any) -> list[Any]:
        """The same call on every rank; results in rank order. Raises as `as_completed` does."""
        return self._gather(method, [args] * len(self.actors), timeout_s, kwargs)

    def scatter(self, method: str, per_rank: Sequence[Any], *, timeout_s: float, **kwargs: Any) -> list[Any]:
        """One argument per rank, and the same keywords for all; results in rank order."""
        return self._gather(method, [(own,) for own in per_rank], timeout_s, kwargs)

    def _gather(
        self, method: str, arguments: Sequence[tuple[Any, ...]], timeout_s: float, kwargs: Mapping[str, Any]
    ) -> list[Any]:
        ranks = range(len(arguments))
        pending = {self.submit(rank, method, *arguments[rank], **kwargs): (self, rank) for rank in ranks}
        results: dict[int, Any] = {}
        start = time.time()
        while len(results) < len(arguments):
            missing = {ref: member for ref, member in pending.items() if member[1] not in results}
            try:
                for ref, result in as_completed(missing, method, timeout_s):
                    results[pending[ref][1]] = result
                    self.record_span(pending[ref][1], method, start, time.time())
            except WorkerLostError as error:
                if not self._replaceable or error.group != self.name or method == "start":
                    raise
                self.replace(error)
                pending = {ref: member for ref, member in pending.items() if member[1] != error.rank}
                again = self.submit(error.rank, method, *arguments[error.rank], **kwargs)
                pending[again] = (self, error.rank)
        return [results[rank] for rank in ranks]

    def record_span(self, rank: int, phase: str, start: float, end: float) -> None:
        """Take down what a rank did from when to when, in unix seconds."""
        self.record("span", actor=self.rank_name(rank), phase=phase, start=start, seconds=end - start)

    def replace(self, error: WorkerLostError) -> None:
        """Put a new actor in the place of a lost one, and start it; what it is to hold is the caller's matter."""
        self.report(error.incident("replaced"))
        self.begin_restart(error.rank)
        gather({self.submit(error.rank, "start", in_turn=False): (self, error.rank)}, "start", self._start_s)

    def begin_restart(self, rank: int) -> None:
        """A new actor in a rank's place, not started yet."""
        ray.kill(self.actors[rank])
        self.actors[rank] = self._remotes[rank].remote(*self._given[rank])

    def rebuild(self) -> None:
        """End all ranks and start new ones."""
        self.kill()
        if self.turns is not None:
            self.turns.leave(self)
        self._given = self._own_arguments()
        self.actors = [make.remote(*own) for make, own in zip(self._remotes, self._given, strict=True)]
        start_all([self], self._start_s)

    def _own_arguments(self) -> Arguments:
        return self._arguments() if callable(self._arguments) else self._arguments

    def kill(self) -> None:
        """End the actors at once."""
        for actor in self.actors:
            ray.kill(actor)


def start_all(groups: Sequence[WorkerGroup], timeout_s: float) -> None:
    """Start every rank of every group; returns when all are up, and the first that raises is told at once.

    Groups that take turns load their models one after the other: a device may not hold two at once.
    """
    together = [group for group in groups if group.turns is None]
    ranks = [(group, rank) for group in together for rank in range(len(group.actors))]
    gather({group.submit(rank, "start"): (group, rank) for group, rank in ranks}, "start", timeout_s)
    for group in groups:
        if group.turns is not None:
            group.turns.start(group, timeout_s)
