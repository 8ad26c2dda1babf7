"""What `gnomon simulate` does: options to a scenario, and its results to a table."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from engine.config import Config, UserError
from engine.config_file import load_config
from engine.preflight import Options as PlanOptions
from engine.preflight import examine
from engine.schedule.costs import Costs
from engine.simulation.calibrate import Check, checks, fit, read_run, setting_of
from engine.simulation.lengths import FORMS, parse_lengths
from engine.simulation.scenario import Failures, Workload
from engine.simulation.sweep import LEGEND, Compared, sweep

N = TypeVar("N", int, float)


@dataclass(frozen=True)
class Options:
    """The options as they are written; None was not given."""

    accelerators: str | None
    trainers: str | None
    max_staleness: str
    lengths: str | None
    prompt_tokens: int | None
    accelerator: str | None
    costs: Path | None
    calibrate: Sequence[Path]
    grow: bool
    steps: int
    failures: float
    restart_s: float | None


@dataclass(frozen=True)
class Simulated:
    """All that the command found."""

    runs: list[Compared]
    costs: Costs
    checks: list[Check]
    prompt_tokens: int

    def to_json(self, price: float | None) -> str:
        """For programs."""
        return json.dumps(
            {
                "costs": asdict(self.costs),
                "prompt_tokens": self.prompt_tokens,
                "checks": [asdict(check) for check in self.checks],
                "runs": [run.to_json(price) for run in self.runs],
            }
        )

    def lines(self) -> list[str]:
        """For a person, under the table: what the numbers rest on."""
        shown = ", ".join(f"{key} {value:.3g}" for key, value in asdict(self.costs).items())
        found = [LEGEND, f"costs: {shown}; prompts of {self.prompt_tokens} tokens"]
        found += [
            f"{check.folder}: {check.predicted:.3g} s/step predicted, {check.measured:.3g} measured, ratio "
            f"{check.predicted / check.measured:.2f}"
            for check in self.checks
        ]
        found += [
            f"{run.result.setting}: stopped after {run.result.steps} steps: more failures than ray.stop_after_incidents"
            for run in self.runs
            if run.result.stopped
        ]
        largest = max(self.runs, key=lambda run: run.result.setting.accelerators).result
        rates = ", ".join(f"{who} {rate:,.0f}" for who, rate in sorted(largest.decisions.per_second().items()))
        found.append(f"decisions per second, {largest.setting.accelerators} accelerators: {rates}")
        return found


def run_simulation(config_path: Path, overrides: Sequence[str], options: Options) -> Simulated:
    """Simulate a configuration under every combination of the options.

    Raises:
        UserError: an option is wrong or missing, or a folder does not hold what it needs.
    """
    config = load_config(config_path, overrides)
    if not isinstance(config, Config) or config.stage != "rl":
        raise UserError(f"{config_path}: only one stage with stage: rl can be simulated")
    if options.lengths is None:
        raise UserError(f"--lengths: is required: {FORMS}")
    lengths, recorded_prompt = parse_lengths(options.lengths)
    prompt_tokens = options.prompt_tokens or recorded_prompt or config.max_prompt_tokens
    costs, found = _costs(config_path, overrides, options)
    own = setting_of(config)
    workload = Workload.of(config, lengths, prompt_tokens=prompt_tokens, steps=options.steps)
    share = config.policy.ranks / (config.policy.ranks + config.rollout.engines)
    runs = sweep(
        workload,
        costs,
        accelerators=_numbers("--accelerators", options.accelerators, int, [own.accelerators], above=0),
        shares=_numbers("--trainers", options.trainers, float, [share], above=0, below=1),
        staleness=_numbers("--max-staleness", options.max_staleness, int, [], above=-1),
        grown_from=own.accelerators if options.grow else None,
        failures=_failures(config, options),
        seed=config.seed,
    )
    return Simulated(list(runs), costs, found, prompt_tokens)


def _costs(config_path: Path, overrides: Sequence[str], options: Options) -> tuple[Costs, list[Check]]:
    """From a file, from runs (and how well they foretell each other), or as `gnomon plan` estimates them."""
    if options.costs is not None and options.calibrate:
        raise UserError("--costs, --calibrate: both say what the phases cost; give one of them")
    if options.costs is not None:
        return read_costs(options.costs), []
    if options.calibrate:
        recorded = [read_run(folder) for folder in options.calibrate]
        return fit(recorded), checks(recorded)
    alone = [*overrides, "policy.ranks=1", "critic.ranks=1", "rollout.engines=1"]  # costs are those of one of each
    planned = examine(config_path, alone, PlanOptions(accelerator=options.accelerator, rows=False))
    [stage] = planned.stages.values()
    if stage.costs is None:
        raise UserError(
            "--costs: cannot be estimated (`gnomon plan` says why): give a JSON file with the costs of the phases, or "
            "--calibrate with runs"
        )
    return stage.costs, []


def read_costs(path: Path) -> Costs:
    """A JSON file with the fields of `Costs`, alone or under `costs` as `--json` writes them.

    Raises:
        UserError: it cannot be read, a key is missing or unknown, or a value is no time.
    """
    try:
        raw: Any = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--costs: {path} cannot be read: {error}") from None
    raw = raw.get("costs", raw) if isinstance(raw, dict) else raw
    known = list(Costs.__dataclass_fields__)
    if not isinstance(raw, dict) or set(raw) != set(known):
        raise UserError(f"--costs: {path} must hold exactly the keys {', '.join(known)}")
    for key, value in raw.items():
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise UserError(f"--costs: {path}: {key} must be seconds, 0 or more, not {value!r}")
    if raw["decode_step_s"] + raw["decode_sample_s"] <= 0:
        raise UserError(f"--costs: {path}: decode_step_s or decode_sample_s must be above 0")
    return Costs(**{key: float(value) for key, value in raw.items()})


def _failures(config: Config, options: Options) -> Failures | None:
    if options.failures == 0:
        return None
    if options.restart_s is None:
        raise UserError("--restart: is required with --failures: seconds until what an accelerator ran is up again")
    return Failures(options.failures, options.restart_s, config.ray.stop_after_incidents)


def _numbers(
    option: str, text: str | None, kind: Callable[[str], N], default: list[N], *, above: float, below: float = math.inf
) -> list[N]:
    """The numbers of an option, with commas between them."""
    if text is None:
        return default
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(above < number < below for number in numbers):
        wanted = "whole numbers" if kind is int else "numbers"
        limits = f"above {above:g}" + (f" and below {below:g}" if below < math.inf else "")
        raise UserError(f"{option}: {text!r} must be {wanted} {limits}, with commas between them")
    return numbers
