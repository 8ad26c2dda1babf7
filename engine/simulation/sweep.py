"""Many simulated runs side by side: numbers of accelerators, shares of trainers, staleness."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from engine.schedule.costs import Costs
from engine.simulation.loop import simulate
from engine.simulation.scenario import Failures, Result, Setting, Workload

LEGEND = (
    "split, idle: engines and trainers; k: max_staleness; x turns: speed-up over engines and trainers that take turns "
    "on all devices; x sync: over the same split with k = 0; age: of the trained tokens, in versions; lost: share of "
    "all response tokens that was generated in vain"
)


@dataclass(frozen=True)
class Compared:
    """A simulated run, and how much faster it is than the synchronous ones of as many accelerators."""

    result: Result
    over_turns: float | None
    """Than engines and trainers in turns on all of them; None where failures stopped either."""
    over_separate: float | None
    """Than the same split with max_staleness 0; None also where that was not asked for."""

    def to_json(self, price: float | None) -> dict[str, Any]:
        """For programs; `price` is that of an accelerator for an hour."""
        result, setting = self.result, self.result.setting
        return {
            "accelerators": setting.accelerators,
            "engines": setting.engines,
            "trainers": setting.trainers,
            "turns": setting.turns,
            "max_staleness": setting.max_staleness,
            "steps": result.steps,
            "stopped": result.stopped,
            "step_seconds": result.step_seconds if result.steps else None,
            "speedup_over_turns": self.over_turns,
            "speedup_over_separate": self.over_separate,
            "engines_idle": result.engines_idle,
            "trainers_idle": result.trainers_idle,
            "staleness": result.staleness,
            "trained_tokens": result.trained_tokens,
            "lost_tokens": result.lost_tokens,
            "lost_steps": result.lost_steps,
            "engine_failures": result.engine_failures,
            "trainer_failures": result.trainer_failures,
            "samples": {
                "admitted": result.admitted,
                "trained": result.trained,
                "dropped": result.dropped,
                "in_flight": result.in_flight,
            },
            "accelerator_hours": result.accelerator_hours,
            "cost": None if price is None else price * result.accelerator_hours,
            "decisions_per_second": result.decisions.per_second(),
        }


def settings(accelerators: int, shares: Sequence[float], staleness: Sequence[int]) -> list[Setting]:
    """In turns first; then every split with every staleness, without repetitions where shares round to the same."""
    found = [Setting(accelerators, accelerators, turns=True)]
    if accelerators > 1:
        splits = {min(max(1, round(share * accelerators)), accelerators - 1) for share in shares}
        found += [Setting(accelerators - n, n, k) for n in sorted(splits) for k in sorted(set(staleness))]
    return found


def sweep(
    workload: Workload,
    costs: Costs,
    *,
    accelerators: Sequence[int],
    shares: Sequence[float],
    staleness: Sequence[int],
    grown_from: int | None = None,
    failures: Failures | None = None,
    seed: int = 0,
) -> Iterator[Compared]:
    """Yields each run when it is simulated. `grown_from` accelerators have the prompts per step of `workload`, and
    others proportionally many; None: all have the same."""
    for number in accelerators:
        prompts = workload.prompts_per_step
        if grown_from is not None:
            prompts = max(1, round(prompts * number / grown_from))
        own = replace(workload, prompts_per_step=prompts)
        in_turns: Result | None = None
        separate: dict[int, Result] = {}
        for setting in settings(number, shares, staleness):
            result = simulate(own, setting, costs, failures=failures, seed=seed)
            if setting.turns:
                in_turns = result
            elif setting.max_staleness == 0:
                separate[setting.trainers] = result
            same_split = None if setting.turns else separate.get(setting.trainers)
            yield Compared(result, _speedup(result, in_turns), _speedup(result, same_split))


def _speedup(result: Result, base: Result | None) -> float | None:
    if base is None or base.stopped or result.stopped or not result.seconds:
        return None
    return base.seconds / result.seconds


def table_of(runs: Sequence[Compared], price: float | None) -> Table:
    """For a person: one line per run."""
    failing = any(run.result.engine_failures + run.result.trainer_failures for run in runs)
    headings = ["devices", "split", "k", "s/step", "x turns", "x sync", "idle", "age"]
    headings += ["failed", "lost"] if failing else []
    headings += ["cost"] if price is not None else []
    columns = [Column(heading, no_wrap=True) for heading in headings]
    table = Table(*columns, box=SIMPLE_HEAD, padding=0)
    for compared in runs:
        result = compared.result
        cells = [
            str(result.setting.accelerators),
            "turns" if result.setting.turns else f"{result.setting.engines}+{result.setting.trainers}",
            str(result.setting.max_staleness),
            "stopped" if result.stopped else f"{result.step_seconds:.4g}",
            "" if compared.over_turns is None else f"{compared.over_turns:.2f}",
            "" if compared.over_separate is None else f"{compared.over_separate:.2f}",
            f"{result.engines_idle:.0%}/{result.trainers_idle:.0%}",
            f"{sum(age * share for age, share in result.staleness.items()):.2f}",
        ]
        if failing:
            made = result.trained_tokens + result.lost_tokens
            cells += [f"{result.engine_failures}+{result.trainer_failures}"]
            cells += [f"{result.lost_tokens / made:.1%}" if made else ""]
        if price is not None:
            cells.append(f"{price * result.accelerator_hours:,.2f}")
        table.add_row(*cells)
    return table
