"""The plan of a run as a person or a program reads it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from engine.fit import gib
from engine.preflight import RunPlan, StagePlan, seats_by_node

BILLION = 1e9


def show(found: RunPlan, console: Console) -> None:
    """Print it: where, how much memory, how long, what it costs, what is wrong."""
    for name, stage in found.stages.items():
        console.rule(f"{name}: {stage.config.stage} on {stage.config.device}")
        if stage.models:
            _show_stage(stage, found.options.per_node, console)
        for note in stage.notes:
            console.print(f"note: {note}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    if found.stages:
        console.rule("total")
        console.print(_total(found), highlight=False, soft_wrap=True)
    for problem in found.problems:
        console.print(f"problem: {problem}", style="red", highlight=False, markup=False, soft_wrap=True)
    count = len(found.problems)
    console.print(f"{count} problem{'s' * (count > 1)} to mend" if count else "nothing is wrong, as far as can be seen")


def _show_stage(stage: StagePlan, per_node: int, console: Console) -> None:
    shape = stage.models["model.path"].shape
    active = f", {shape.active / BILLION:.3g} billion active in each token" if shape.experts else ""
    console.print(f"model: {shape.kind}, {shape.parameters:,} parameters{active}", highlight=False)
    console.print(f"placement: {stage.config.placement.mode}", highlight=False)
    console.print(_placement(stage, per_node))
    console.print("memory of each rank; its peak is what is held always + the larger of pass and step", highlight=False)
    console.print(_memory(stage))
    if stage.work is not None:
        rate = f"{stage.work.tokens / stage.step_s:,.0f} tokens/s"
        console.print(
            f"time of a step of {stage.work.samples:,} samples, {stage.work.tokens:,.0f} tokens: {rate}",
            highlight=False,
        )
        console.print(_times(stage))


def _placement(stage: StagePlan, per_node: int) -> Table:
    assert stage.device is not None
    table = Table("node", "device", "holds", "memory")
    if stage.config.device == "cpu":
        load = stage.loads[0]
        ranks = ", ".join(f"{m.role} x {m.ranks}" if m.ranks > 1 else m.role for m in stage.memories)
        table.add_row("this machine", "cpu", ranks, _filled(load.bytes, load.capacity))
        return table
    loads = {load.tenants: load for load in stage.loads}
    for node, first, last, named in seats_by_node(stage, per_node):
        load = loads[tuple(name.rpartition(" ")[0] for name in named)]
        devices = f"{first}-{last}" if last > first else str(first)
        table.add_row(
            str(node), f"{stage.device.name} {devices}", " | ".join(named), _filled(load.bytes, load.capacity)
        )
    return table


def _filled(used: int, capacity: int) -> str:
    style = "red" if used > capacity else "green"
    return f"[{style}]{gib(used)} of {gib(capacity)}[/{style}]"


def _memory(stage: StagePlan) -> Table:
    table = Table("role", "item", "each rank", "when")
    for memory in stage.memories:
        table.add_section()
        ranks = f" x {memory.ranks}" if memory.ranks > 1 else ""
        table.add_row(f"{memory.role}{ranks}", "at its peak", gib(memory.peak), style="bold")
        for item in memory.items:
            table.add_row("", item.name, gib(item.bytes), item.when)
    return table


def _times(stage: StagePlan) -> Table:
    step = stage.step_s
    slowest = max(stage.phases, key=lambda phase: phase.seconds)
    table = Table("phase", "seconds", "share")
    for phase in stage.phases:
        bottleneck = " (bottleneck)" if phase is slowest else ""
        table.add_row(phase.name + bottleneck, f"{phase.seconds:.3g}", f"{phase.seconds / step:.0%}")
    table.add_section()
    table.add_row("step", f"{step:.3g}", "")
    for phase in stage.first:
        table.add_row(f"{phase.name}, once before the first", f"{phase.seconds:.3g}", "")
    return table


def _total(found: RunPlan) -> str:
    if found.hours is None:
        return "duration: unknown, since some steps or sizes are not known"
    devices = max(stage.devices for stage in found.stages.values())
    steps = " + ".join(f"{stage.work.steps:,}" for stage in found.stages.values() if stage.work and stage.work.steps)
    what = "machine" if all(stage.config.device == "cpu" for stage in found.stages.values()) else "accelerator"
    long = f"{found.hours:.3g} hours" if found.hours >= 1 else f"{found.hours * 60:.2g} minutes"
    line = f"duration: {long} ({steps} steps) on {devices} {what}{'s' * (devices > 1)}"
    return line + (f"; cost: {found.cost:,.2f} at {found.options.price:g} per {what}-hour" if found.cost else "")


def as_record(found: RunPlan) -> dict[str, Any]:
    """The same for programs: bytes, seconds and hours."""
    return {
        "problems": found.problems,
        "hours": found.hours,
        "cost": found.cost,
        "stages": {name: _stage_record(stage, found.options.per_node) for name, stage in found.stages.items()},
    }


def _stage_record(stage: StagePlan, per_node: int) -> dict[str, Any]:
    seats = seats_by_node(stage, per_node) if stage.memories else ()
    names = ("node", "first_device", "last_device", "holds")
    memory = {
        m.role: {"ranks": m.ranks, "peak": m.peak, "items": [asdict(item) for item in m.items]} for m in stage.memories
    }
    return {
        "stage": stage.config.stage,
        "notes": stage.notes,
        "device": asdict(stage.device) if stage.device else None,
        "devices": stage.devices,
        "models": {key: _sizes(stage, key) for key in stage.models},
        "placement": [dict(zip(names, row, strict=True)) for row in seats],
        "loads": [asdict(load) | {"fits": load.fits} for load in stage.loads],
        "memory": memory,
        "workload": asdict(stage.work) if stage.work else None,
        "costs": asdict(stage.costs) if stage.costs else None,
        "phases": {phase.name: phase.seconds for phase in stage.phases},
        "first": {phase.name: phase.seconds for phase in stage.first},
        "step_seconds": stage.step_s,
        "hours": stage.hours,
    }


def _sizes(stage: StagePlan, key: str) -> dict[str, Any]:
    shape = stage.models[key].shape
    return {
        "kind": shape.kind,
        "parameters": shape.parameters,
        "active": shape.active,
        "embedding": shape.embedding,
        "cache_per_token": shape.cache_per_token,
        "forward_flops_per_token": shape.forward_flops(0) + shape.head_flops(),
    }
