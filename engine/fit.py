"""Whether the roles' memory fits the devices that they share, and which settings would make it fit.

    separate   a device holds one rank
    packed     all of its tenants at once, each with its own peak: allocators keep what they once had
    turns      on a GPU the largest tenant, since the others have left; on the CPU there is nowhere to go

On the CPU every process of the run shares the memory of one machine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.config import Config
from engine.footprint import GIB, Model, RoleMemory, answering, memory_of, number_bytes
from engine.layout import layout_of, roles_of

USABLE = 0.95
"""Part of a device's memory that tensors can fill; the rest is lost between blocks (assumed)."""
MOST_RANKS = 1024
"""Ranks that are tried as a remedy."""


@dataclass(frozen=True)
class Load:
    """What one device holds, and how many devices hold the same."""

    tenants: tuple[str, ...]
    devices: int
    bytes: int
    capacity: int
    """Bytes that can be filled."""

    @property
    def fits(self) -> bool:
        """Whether it does."""
        return self.bytes <= self.capacity


@dataclass(frozen=True)
class Remedy:
    """A change of settings, on top of those before it."""

    setting: str
    bytes: int
    """What the device then holds."""


def memories_of(config: Config, models: Mapping[str, Model]) -> list[RoleMemory]:
    """What every role of a stage takes."""
    return [memory_of(config, role, models) for role in roles_of(config)]


def loads_of(config: Config, models: Mapping[str, Model], memory: int) -> list[Load]:
    """What each kind of device holds; `memory` is that of one device, or of the host on the CPU."""
    memories = {found.role: found for found in memories_of(config, models)}
    capacity = int(memory * USABLE)
    if config.device == "cpu":
        total = sum(found.peak * found.ranks for found in memories.values())
        return [Load(tuple(memories), 1, total, capacity)]
    layout = layout_of(config)
    tenants: list[list[str]] = [[] for _ in layout.bundles]
    for role, seats in layout.seats.items():
        for seat in seats:
            if memories[role].on_device:
                tenants[seat.bundle].append(role)
    together = max if config.placement.mode == "turns" else sum
    alike = Counter(tuple(who) for who in tenants if who)
    return [Load(who, n, together(memories[role].peak for role in who), capacity) for who, n in alike.items()]


def memory_problems(config: Config, models: Mapping[str, Model], memory: int, device: str) -> list[str]:
    """What does not fit, with what would help, for the user. `device` names what has the memory."""
    problems = []
    for load in loads_of(config, models, memory):
        if not load.fits:
            problems.append(_load_problem(config, models, memory, load, device))
    if config.device == "cuda":
        for found in memories_of(config, models):
            if found.start > memory * USABLE:
                problems.append(
                    f"memory: {found.role} puts its whole weights, {gib(found.start)}, on the device before ZeRO-3 "
                    f"divides them, and {device} has {gib(int(memory * USABLE))}; no number of ranks helps: take a "
                    "smaller model or a larger device"
                )
    return problems + _cache_problems(config, models)


def _load_problem(config: Config, models: Mapping[str, Model], memory: int, load: Load, device: str) -> str:
    found = remedies(config, models, memory, load)
    need = "needs" if len(load.tenants) == 1 else "need"
    what = f"memory: {' + '.join(load.tenants)} {need} {gib(load.bytes)}, {device} has {gib(load.capacity)}"
    held = {m.role: item.bytes for m in memories_of(config, models) for item in m.items if item.name == "weights"}
    for role in set(load.tenants) - _TRAINED:
        if held.get(role, 0) > load.capacity:
            return (
                f"{what}; {role} holds a whole copy of its model on each device, {gib(held[role])} of weights alone: "
                "take a smaller model or a larger device"
            )
    if not found:
        return f"{what}; no setting helps: take a smaller model or a larger device"
    steps = ", then ".join(f"{remedy.setting}: {gib(remedy.bytes)}" for remedy in found)
    end = "which fits" if found[-1].bytes <= load.capacity else "which is still too much: take a larger device"
    return f"{what}; what helps: {steps}, {end}"


def remedies(config: Config, models: Mapping[str, Model], memory: int, load: Load) -> list[Remedy]:
    """Settings that lower a load, one on top of the other, until it fits or there are no more."""
    found: list[Remedy] = []
    need = load.bytes
    for candidates in (_stages, _checkpointing, _microbatches, _caches, _turns, _ranks, _adapters):
        for setting, changed in candidates(config, models, load, memory):
            after = _need(changed, models, load.tenants, memory)
            if after < 0.98 * need:
                if found and found[-1].setting.partition("=")[0] == setting.partition("=")[0]:
                    found.pop()
                found.append(Remedy(setting, after))
                config, need = changed, after
            if need <= load.capacity:
                return found
    return found


def _need(config: Config, models: Mapping[str, Model], tenants: Sequence[str], memory: int) -> int:
    """Most that a device of these tenants holds."""
    return max(load.bytes for load in loads_of(config, models, memory) if set(load.tenants) & set(tenants))


Candidates = Iterator[tuple[str, Config]]
_TRAINED = {"policy", "critic", "reward_model"}


def _with(config: Config, section: str, **values: Any) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def _stages(config: Config, models: Mapping[str, Model], load: Load, memory: int) -> Candidates:
    if _TRAINED & set(load.tenants) and config.policy.ranks > 1:
        for stage in range(config.policy.zero_stage + 1, 4):
            yield f"policy.zero_stage={stage}", _with(config, "policy", zero_stage=stage)


def _checkpointing(config: Config, models: Mapping[str, Model], load: Load, memory: int) -> Candidates:
    if not config.model.gradient_checkpointing and config.model.adapter.kind != "prefix":
        yield "model.gradient_checkpointing=true", _with(config, "model", gradient_checkpointing=True)


def _microbatches(config: Config, models: Mapping[str, Model], load: Load, memory: int) -> Candidates:
    longest = config.rollout.max_model_len if config.stage in ("rl", "distill") else 0
    longest = max(longest, config.training.max_length if config.stage != "rl" else 0)
    tokens = config.policy.tokens_per_microbatch
    while tokens > longest:
        tokens = max(tokens // 2, longest)
        yield f"policy.tokens_per_microbatch={tokens}", _with(config, "policy", tokens_per_microbatch=tokens)


def _caches(config: Config, models: Mapping[str, Model], load: Load, memory: int) -> Candidates:
    if "rollout" in load.tenants:
        over = _need(config, models, load.tenants, memory) - load.capacity
        smallest = cache_bytes(config, models) / GIB
        size = max(config.rollout.kv_cache_gib - over / GIB, smallest)
        if size < config.rollout.kv_cache_gib:
            size = int(size * 100) / 100 if int(size * 100) / 100 >= smallest else round(smallest + 0.005, 2)
            yield f"rollout.kv_cache_gib={size:g}", _with(config, "rollout", kv_cache_gib=size)


def _turns(config: Config, models: Mapping[str, Model], load: Load, memory: int) -> Candidates:
    if config.placement.mode == "packed" and config.device == "cuda" and config.policy.zero_stage > 0:
        yield "placement.mode=turns", _with(config, "placement", mode="turns")
    if config.placement.mode != "separate" and config.device == "cuda":
        yield "placement.mode=separate", _with(config, "placement", mode="separate", groups=[])


def _ranks(config: Config, models: Mapping[str, Model], load: Load, memory: int) -> Candidates:
    if not _TRAINED & set(load.tenants) or config.device == "cpu":
        return
    ranks = config.policy.ranks
    stage = config.policy.zero_stage or 3
    while (ranks := ranks * 2) <= MOST_RANKS:
        changed = _with(_with(config, "policy", ranks=ranks, zero_stage=stage), "critic", ranks=ranks)
        zero = "" if config.policy.zero_stage else f" with policy.zero_stage={stage}"
        yield f"policy.ranks={ranks}{zero}", changed


def _adapters(config: Config, models: Mapping[str, Model], load: Load, memory: int) -> Candidates:
    if _TRAINED & set(load.tenants) and not config.trains_adapter and config.model.new is None:
        adapter = config.model.adapter.model_copy(update={"kind": "lora"})
        yield "model.adapter.kind=lora", _with(config, "model", adapter=adapter)


def cache_bytes(config: Config, models: Mapping[str, Model]) -> int:
    """Of the longest sample's keys and values in an engine."""
    shape = answering(config, models).shape
    return shape.cache(config.rollout.max_model_len) * number_bytes(config.dtype)


def _cache_problems(config: Config, models: Mapping[str, Model]) -> list[str]:
    """vLLM refuses a cache that cannot hold one sample of the longest length."""
    need = cache_bytes(config, models)
    if not config.generates or need <= config.rollout.kv_cache_gib * GIB:
        return []
    return [
        f"rollout.kv_cache_gib: {config.rollout.kv_cache_gib:g} cannot hold one sample of rollout.max_model_len "
        f"{config.rollout.max_model_len}, whose keys and values take {need / GIB:.3g} GiB; raise it, or lower "
        "rollout.max_model_len"
    ]


def gib(amount: float) -> str:
    """Bytes in words."""
    return f"{amount / GIB:.1f} GiB" if amount >= GIB / 10 else f"{amount / 2**20:.1f} MiB"
