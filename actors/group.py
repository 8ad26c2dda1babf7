"""WorkerGroup: spawn ranks in a placement group, split a batch by cost, call, gather. Every wait has a deadline.

    controller                 ranks
    call / scatter  ------->   run the method
    gather          <-------   results, in rank order

`gather` watches all pending calls at once, so one rank's exception surfaces at once even when others hang in a
collective with it; a deadline that passes names the ranks that are late, the method and the time it took.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.process import RankInfo, free_port
from engine.config import UserError
from engine.data.batch import Batch
from engine.schedule.balancing import plan_microbatches
from engine.schedule.placement import Seat


class ActorError(RuntimeError):
    """An actor raised or died. The message names actor, method and elapsed time."""


class ActorDiedError(ActorError):
    """An actor's process is gone. `reference` is the call that it left unanswered."""

    def __init__(self, message: str, reference: Any) -> None:
        super().__init__(message)
        self.reference = reference


class DeadlineError(ActorError):
    """An actor did not answer in time. The message names the late ones, the method and elapsed time."""


def as_completed(pending: Mapping[Any, str], method: str, timeout_s: float) -> Iterator[tuple[Any, Any]]:
    """Yields (reference, result) as calls finish; `pending` maps references to the actors' names.

    Raises:
        UserError: the user's input was at fault in the actor.
        ActorError: an actor raised or died.
        DeadlineError: not all calls finished within `timeout_s` seconds.
    """
    start = time.monotonic()
    waiting = list(pending)
    while waiting:
        remaining = timeout_s - (time.monotonic() - start)
        done, waiting = ray.wait(waiting, num_returns=1, timeout=max(0.0, remaining))
        if not done:
            late = ", ".join(pending[ref] for ref in waiting)
            raise DeadlineError(
                f"{late}: no answer from {method}() after {time.monotonic() - start:.1f} s "
                f"(deadline {timeout_s:.0f} s; see the `timeouts` section if it is truly that slow)"
            )
        for ref in done:
            yield ref, _result(ref, pending[ref], method, start)


def _result(ref: Any, name: str, method: str, start: float) -> Any:
    try:
        return ray.get(ref, timeout=60)  # already there; the time is for a transfer between hosts
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, UserError):
            raise cause from None
        elapsed = time.monotonic() - start
        raise ActorError(f"{name}: {method}() raised after {elapsed:.1f} s: {type(cause).__name__}: {cause}") from error
    except RayActorError as error:
        elapsed = time.monotonic() - start
        why = " ".join(str(error).split())
        raise ActorDiedError(f"{name}: died after {elapsed:.1f} s in {method}(): {why}", ref) from error
    except RayError as error:  # out of memory, a lost object, an environment that could not be set up
        elapsed = time.monotonic() - start
        why = " ".join(str(error).split())
        raise ActorError(f"{name}: lost after {elapsed:.1f} s in {method}(): {type(error).__name__}: {why}") from error


def gather(pending: Mapping[Any, str], method: str, timeout_s: float) -> list[Any]:
    """All results, in the order of `pending`. Raises as `as_completed` does."""
    results = dict(as_completed(pending, method, timeout_s))
    return [results[ref] for ref in pending]


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
    """Addresses for a process group whose rank 0 will live in the first slot."""
    task = ray.remote(_address).options(**slots.options(0), max_retries=0)
    [(address, port)] = gather({task.remote(): "rendezvous"}, "address", timeout_s)
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
        arguments: Sequence[tuple[Any, ...]],
        env: Mapping[str, str],
        concurrency: int = 1,
        restarts: int = 0,
        turns: Turns | None = None,
    ) -> None:
        """Makes one actor per slot with its own constructor arguments; `start_all` starts them.

        `restarts` is how often Ray itself starts a dead actor's process again (-1: always), without `start`.
        """
        remote: Any = ray.remote(actor_class)
        self.name = name
        self.turns = turns
        self._make = [
            partial(
                remote.options(
                    **slots.options(rank),
                    runtime_env={"env_vars": dict(env)},
                    max_concurrency=concurrency,
                    max_restarts=restarts,
                ).remote,
                *args,
            )
            for rank, args in enumerate(arguments)
        ]
        self.actors: list[Any] = [make() for make in self._make]

    def rank_name(self, rank: int) -> str:
        """How errors name a rank."""
        return f"{self.name}[{rank}]"

    def submit(self, rank: int, method: str, *args: Any, in_turn: bool = True, **kwargs: Any) -> Any:
        """Start one rank's call and return its reference, to be awaited with `as_completed` or `gather`."""
        if self.turns is not None and in_turn:
            self.turns.take(self)
        return getattr(self.actors[rank], method).remote(*args, **kwargs)

    def call(self, method: str, *args: Any, timeout_s: float, in_turn: bool = True, **kwargs: Any) -> list[Any]:
        """The same call on every rank; results in rank order."""
        ranks = range(len(self.actors))
        pending = {self.submit(r, method, *args, in_turn=in_turn, **kwargs): self.rank_name(r) for r in ranks}
        return gather(pending, method, timeout_s)

    def scatter(self, method: str, per_rank: Sequence[Any], *, timeout_s: float, **kwargs: Any) -> list[Any]:
        """One argument per rank, and the same keywords for all; results in rank order."""
        shares = enumerate(per_rank)
        pending = {self.submit(r, method, arg, **kwargs): self.rank_name(r) for r, arg in shares}
        return gather(pending, method, timeout_s)

    def restart(self, rank: int, timeout_s: float) -> None:
        """Put a new actor in the place of one that died, and start it."""
        ray.kill(self.actors[rank])
        self.actors[rank] = self._make[rank]()
        gather({self.submit(rank, "start"): self.rank_name(rank)}, "start", timeout_s)

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
    pending = {group.submit(rank, "start"): group.rank_name(rank) for group, rank in ranks}
    gather(pending, "start", timeout_s)
    for group in groups:
        if group.turns is not None:
            group.turns.start(group, timeout_s)


@dataclass(frozen=True)
class Split:
    """A batch split by cost over ranks and micro-batches, and the way back."""

    batch: Batch
    plan: list[list[list[int]]]

    @staticmethod
    def of(batch: Batch, *, ranks: int, token_budget: int, hidden_size: int, whole_groups: bool = False) -> Split:
        """Plan the split of a batch (see `plan_microbatches`); `whole_groups` keeps a group's samples together.

        The budget is raised to the largest group.
        """
        units = batch.groups() if whole_groups else [[sample] for sample in range(len(batch))]
        lens = [int(batch.seq_lens[unit].sum()) for unit in units]
        budget = max([token_budget, *lens]) if whole_groups else token_budget
        plan = plan_microbatches(lens, ranks=ranks, token_budget=budget, hidden_size=hidden_size)
        return Split(batch, [[[s for unit in micro for s in units[unit]] for micro in share] for share in plan])

    def shares(self) -> list[list[Batch]]:
        """The micro-batches of each rank."""
        return [[self.batch.select(samples) for samples in share] for share in self.plan]

    def merge(self, results: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
        """[R] per token of each rank's micro-batches -> [T] in the batch's order, 0 on tokens that are not trained."""
        merged_T = np.zeros(len(self.batch.tokens), np.float32)
        ends = np.cumsum(self.batch.seq_lens)
        for share, values in zip(self.plan, results, strict=True):
            for samples, values_R in zip(share, values, strict=True):
                if not samples:
                    continue
                spans = [np.arange(ends[s] - self.batch.seq_lens[s], ends[s]) for s in samples]
                index_T = np.concatenate(spans)
                merged_T[index_T[self.batch.loss_mask[index_T]]] = values_R
        return merged_T

    def merge_samples(self, results: Sequence[Sequence[Sequence[Any]]]) -> list[Any]:
        """One result per sample of each rank's micro-batches -> [B] in the batch's own order."""
        merged: dict[int, Any] = {}
        for share, values in zip(self.plan, results, strict=True):
            for samples, held in zip(share, values, strict=True):
                merged |= dict(zip(samples, held, strict=True))
        return [merged[sample] for sample in range(len(self.batch))]
