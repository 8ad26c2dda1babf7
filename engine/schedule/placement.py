"""Decides which actor sits where, and whether a cluster can hold it. Pure: plain numbers in, a plan or a refusal out.

A bundle is what is reserved together on one node, a seat one actor's part of it. The modes differ in who shares:

    separate   every rank of every role has a bundle with a device
    packed     rank i of every role of a group sits in the group's bundle i: one device, the CPUs of all tenants
    turns      the same, but one tenant works at a time: one device, the CPUs of the largest tenant, split evenly

Ray counts in 1/10000 and cuts the rest off (0.57 becomes 0.5699, which three seats of 0.19 overflow), so all sums here
are of whole units, and every amount given out is a float that Ray reads as exactly these units.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

UNITS = 10_000
"""Ray's resolution: parts of one CPU or device."""

MAX_WORK = 300_000
"""Bound of the search for a division among the nodes, in sizes of node looked at: about a second."""

Mode = Literal["separate", "packed", "turns"]

Vector = tuple[int, ...]
"""Units of each resource."""


@dataclass(frozen=True)
class Role:
    """A kind of actor that a run starts. A reward function's pool of processes is not `on_device`."""

    name: str
    ranks: int
    cpus: float  # of each rank
    on_device: bool


@dataclass(frozen=True)
class Seat:
    """What one actor reserves, and in which of `Layout.bundles`."""

    bundle: int
    resources: dict[str, float]


@dataclass(frozen=True)
class Layout:
    """A placement group and who sits where in it."""

    bundles: tuple[dict[str, float], ...]
    seats: dict[str, tuple[Seat, ...]]
    """Role -> one seat per rank, in rank order."""
    sharing: tuple[tuple[str, ...], ...]
    """Groups of two or more roles that really share a bundle."""


def lay_out(roles: Sequence[Role], *, mode: Mode, groups: Sequence[Sequence[str]], device: str | None) -> Layout:
    """Bundles and seats of the roles that a run starts, in the order of `roles`.

    `groups` names the roles that share (packed, turns); without any, all roles on devices share. Roles in no group or
    without a device sit alone, and names of roles that are not started are ignored. `device` is Ray's name of the
    resource that is one device; None reserves CPUs alone.
    """
    bundles: list[dict[str, float]] = []
    seats: dict[str, list[Seat]] = {role.name: [] for role in roles}
    sharing = []
    for group in _grouped(roles, mode, groups):
        for rank in range(max(role.ranks for role in group)):
            tenants = [role for role in group if rank < role.ranks]
            cpus = [_units(role.cpus) for role in tenants]
            whole = sum(cpus)
            if mode == "turns":
                whole = max(cpus)
                cpus = [whole // len(tenants)] * len(tenants)
            for role, share in zip(tenants, cpus, strict=True):
                seats[role.name].append(Seat(len(bundles), _reserved(role, share, device, UNITS // len(tenants))))
            bundles.append(_reserved(tenants[0], whole, device, UNITS))
        started = tuple(role.name for role in group if role.ranks)
        if len(started) > 1:
            sharing.append(started)
    return Layout(tuple(bundles), {role: tuple(own) for role, own in seats.items()}, tuple(sharing))


def shortage(layout: Layout, nodes: Mapping[str, Mapping[str, float]]) -> str | None:
    """Why the nodes (name -> total resources) cannot hold the layout, for the user; None where nothing speaks against.

    Every refusal is exact: what can be placed is never refused. None is no promise: the search for a division among
    the nodes ends undecided after `MAX_WORK`, and Ray may overlook a division, so a placement group needs a deadline.
    """
    tenants: list[list[str]] = [[] for _ in layout.bundles]
    for role, own in layout.seats.items():
        for seat in own:
            tenants[seat.bundle].append(role)
    names = list(dict.fromkeys(name for bundle in layout.bundles for name in bundle))
    bundles = [{name: _units(amount) for name, amount in bundle.items()} for bundle in layout.bundles]
    rooms = {node: {name: _units(total.get(name, 0.0)) for name in names} for node, total in nodes.items()}
    need = {name: sum(bundle.get(name, 0) for bundle in bundles) for name in names}
    have = {name: sum(room[name] for room in rooms.values()) for name in names}

    alike = Counter((" + ".join(who), tuple(bundle.items())) for who, bundle in zip(tenants, bundles, strict=True))
    kinds = [(who, dict(bundle), count) for (who, bundle), count in alike.items()]
    run = f"the run needs {_shown(need)} ({', '.join(f'{who}: {n} x {_grasped(bundle)}' for who, bundle, n in kinds)})"
    if short := {name: need[name] - have[name] for name in names if have[name] < need[name]}:
        return f"{run} but the whole cluster has {_shown(have)}: {_shown(short)} too few"
    for who, bundle, _ in kinds:
        if not any(all(room[name] >= bundle[name] for name in bundle) for room in rooms.values()):
            return f"{run}, but no node has the {_shown(bundle)} that {who} needs in one place: {_nodes(rooms)}"
    order = names[::-1]  # devices first: they leave least choice
    vectors = [tuple(bundle.get(name, 0) for name in order) for bundle in bundles]
    if not _divisible(vectors, [tuple(room[name] for name in order) for room in rooms.values()]):
        return f"{run}, which cannot be divided among the nodes, each part in one place: {_nodes(rooms)}"
    return None


def _grouped(roles: Sequence[Role], mode: str, groups: Sequence[Sequence[str]]) -> list[list[Role]]:
    """The roles by whom they share with; a role alone is a group of one."""
    together = [] if mode == "separate" else groups or [[role.name for role in roles]]
    found: dict[int | str, list[Role]] = {}
    for role in roles:
        number = next((i for i, group in enumerate(together) if role.on_device and role.name in group), None)
        found.setdefault(role.name if number is None else number, []).append(role)
    return list(found.values())


def _reserved(role: Role, cpus: int, device: str | None, share: int) -> dict[str, float]:
    """Ray's resources for units of CPUs and of the device."""
    return {"CPU": _amount(cpus)} | ({device: _amount(share)} if device and role.on_device else {})


def _units(amount: float) -> int:
    """Whole units in an amount, rounded down; float noise of a thousandth of a unit is forgiven."""
    return math.floor(amount * UNITS + 1e-3)


def _amount(units: int) -> float:
    """The least float that Ray cuts to these units."""
    amount = units / UNITS
    return amount if int(amount * UNITS) == units else math.nextafter(amount, math.inf)


def _shown(amounts: Mapping[str, int]) -> str:
    return ", ".join(f"{units / UNITS:.10g} {name}" for name, units in amounts.items())


def _grasped(amounts: Mapping[str, int]) -> str:
    return f"({_shown(amounts)})" if len(amounts) > 1 else _shown(amounts)


def _nodes(rooms: Mapping[str, Mapping[str, int]]) -> str:
    """The nodes by what they have, in few words however many there are."""
    alike: dict[str, list[str]] = {}
    for node, room in rooms.items():
        alike.setdefault(_shown(room), []).append(node)
    counted = {has: f"{len(named)} nodes like " * (len(named) > 1) + named[0] for has, named in alike.items()}
    return ", ".join(f"{who} ({has})" for has, who in counted.items())


def _divisible(bundles: Sequence[Vector], rooms: Sequence[Vector]) -> bool:
    """Whether every bundle finds a room; True when that is undecided after `MAX_WORK`.

    Depth first: the largest bundle next, the tightest room first, so that the first descent is best-fit decreasing
    (Johnson 1973). Rooms of equal size are one choice, and a state reached again is not searched again.
    """
    largest_first = sorted(bundles, reverse=True)

    def choices(placed: int, free: Counter[Vector]) -> Iterator[tuple[int, Counter[Vector]]]:
        for room in sorted(free):
            left = tuple(has - needs for has, needs in zip(room, largest_first[placed], strict=True))
            if min(left) >= 0:
                yield placed + 1, free - Counter([room]) + Counter([left])

    work = 0
    seen = set()
    open_choices = [iter([(0, Counter(rooms))])]
    while open_choices and work < MAX_WORK:
        placed, free = next(open_choices[-1], (-1, Counter()))
        if placed == len(bundles):
            return True
        state = (placed, frozenset(free.items()))
        if placed < 0:
            open_choices.pop()
        elif state not in seen:
            seen.add(state)
            open_choices.append(choices(placed, free))
        work += 1 + len(free)
    return bool(open_choices)
