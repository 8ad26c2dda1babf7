"""`gnomon plan`: everything that can be said of a run before Ray, a GPU or any weights are there.

    YAML --> stages, as far as they can be made out --> models' sizes --> who sits where, memory, times
                                                   \\-> rows, rewards, folders (engine/plan.py)

Mistakes are collected, never raised: one look shows them all.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from engine import plan
from engine.activations import saved_bytes_per_token
from engine.config import Config, UserError
from engine.config_file import STAGE_PREFIX, load_stages
from engine.data.examples import Example
from engine.fit import Load, loads_of, memories_of, memory_problems
from engine.footprint import Model, RoleMemory
from engine.hardware import Accelerator, accelerator
from engine.layout import layout_of
from engine.model_folder import architecture, resolved, start_folder
from engine.model_shape import read_model_config, shape_of
from engine.schedule.costs import Costs
from engine.schedule.placement import Layout
from engine.step_time import Hardware, Phase, Workload, costs_of, first_phases, step_phases

MEASURED_ROWS = 1000
"""Rows whose mean length stands for all."""
HOUR = 3600.0


@dataclass(frozen=True)
class Options:
    """What the command line says beside the configuration."""

    accelerator: str | None = None
    """Of `engine.hardware.NAMES`; None is `cpu` for device: cpu, else H100."""
    per_node: int = 8
    """Devices of one node."""
    price: float | None = None
    """Of an accelerator-hour (on the CPU: of an hour of the machine)."""
    response_tokens: int | None = None
    """Mean length of a generated answer; None is the longest allowed."""
    rows: bool = True
    """Whether data rows are read."""


@dataclass
class StagePlan:
    """What was found out about one stage."""

    config: Config
    notes: list[str] = field(default_factory=list)
    models: dict[str, Model] = field(default_factory=dict)
    """By key of `config.model_paths`; empty where a size is missing, and then so is what follows."""
    layout: Layout | None = None
    device: Accelerator | None = None
    memories: Sequence[RoleMemory] = ()
    loads: Sequence[Load] = ()
    work: Workload | None = None
    costs: Costs | None = None
    phases: Sequence[Phase] = ()
    """Of one step."""
    first: Sequence[Phase] = ()
    """Once, before the first."""

    @property
    def devices(self) -> int:
        """Accelerators that the stage holds; the CPU counts as one machine."""
        return 1 if self.config.device == "cpu" else sum(load.devices for load in self.loads)

    @property
    def step_s(self) -> float:
        """Seconds of a step; where generation runs ahead, the longer of it and all else."""
        generating = sum(phase.seconds for phase in self.phases if phase.name == "rollout")
        others = sum(phase.seconds for phase in self.phases) - generating
        beside = self.config.stage == "rl" and self.config.rl.max_staleness > 0
        return max(generating, others) if beside else generating + others

    @property
    def hours(self) -> float | None:
        """Of the whole stage, without evaluations, checkpoints and the start; None where the steps are not known."""
        if self.work is None or self.work.steps is None:
            return None
        return (self.step_s * self.work.steps + sum(phase.seconds for phase in self.first)) / HOUR


@dataclass
class RunPlan:
    """What was found out about a run."""

    options: Options
    stages: dict[str, StagePlan] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def hours(self) -> float | None:
        """Of all stages; None where one is not known."""
        each = [stage.hours for stage in self.stages.values()]
        return math.fsum(h for h in each if h is not None) if each and None not in each else None

    @property
    def cost(self) -> float | None:
        """Price of all stages' accelerator-hours."""
        if self.options.price is None or self.hours is None:
            return None
        return math.fsum(stage.devices * (stage.hours or 0.0) * self.options.price for stage in self.stages.values())


def examine(source: Path, overrides: Sequence[str], options: Options) -> RunPlan:
    """All that can be found out about a run; nothing is written where it would run."""
    found = RunPlan(options)
    stages = load_stages(source, overrides, found.problems)
    mended = ["settings that are wrong are taken at their defaults"] if found.problems else []
    with tempfile.TemporaryDirectory(prefix="gnomon-plan-") as folder:
        made: dict[str, Path] = {}
        for name, given in stages.items():
            problems: list[str] = []
            config = resolved(given.model_copy(update={"output_dir": Path(folder)}), _with_stand_ins(given, made))
            made[name] = Path(config.model.path)
            if any(path.startswith(STAGE_PREFIX) for path in config.model_paths.values()):
                found.stages[name] = StagePlan(given, ["not planned: it starts from a stage that is not known"])
                continue
            unmade = {key for key, path in given.model_paths.items() if path.startswith(STAGE_PREFIX)}
            found.stages[name] = _stage_plan(config, given, unmade, options, problems)
            found.stages[name].notes += mended
            prefix = f"stage {name}: " if len(stages) > 1 else ""
            found.problems += [prefix + problem for problem in problems]
    return found


def _with_stand_ins(config: Config, made: Mapping[str, Path]) -> dict[str, Path]:
    """Folders for all `stage:NAME`: that of the model the stage starts from, or one that is not there."""
    names = {path.removeprefix(STAGE_PREFIX) for path in config.model_paths.values() if path.startswith(STAGE_PREFIX)}
    return {name: made.get(name, Path(STAGE_PREFIX + name)) for name in names}


def _stage_plan(config: Config, given: Config, unmade: set[str], options: Options, problems: list[str]) -> StagePlan:
    """One stage; `config` is the given one with folders in place of `stage:NAME`."""
    stage = StagePlan(config)
    paths, made = config.model_paths, {"model.path"} if config.model.new is not None else set[str]()
    weightless = {key for key, path in paths.items() if _bare(path, "*.safetensors")} - made
    unread = {key for key, path in paths.items() if _bare(path, "token*", "vocab*", "spiece*")}
    for key in sorted(weightless - unmade):
        stage.notes.append(f"{key}: {given.model_paths[key]} holds no weights: good for a plan, not for a run")
    for key in sorted(unread):
        stage.notes.append(f"{key}: {given.model_paths[key]} holds no tokenizer: its tokens are not checked")
    if not options.rows:
        unread |= made  # the tokenizer would be trained on them
        stage.notes.append("data: rows were not read (--no-rows)")
    checked = plan.inspect(config, problems, unmade=unmade | weightless, unread=unread, rows=options.rows)
    stage.notes += [f"data: {len(checked.skipped)} rows are skipped"] if checked.skipped else []
    _estimate(stage, checked, options, problems)
    return stage


def _bare(path: str, *patterns: str) -> bool:
    """Whether a local folder has a config.json and nothing of these names."""
    folder = Path(path)
    return (folder / "config.json").is_file() and not any(f for p in patterns for f in folder.glob(p))


def _estimate(stage: StagePlan, checked: plan.Plan, options: Options, problems: list[str]) -> None:
    """Sizes, places, memory and times, as far as the configuration allows."""
    config = stage.config
    stage.layout = layout_of(config)
    try:
        name = options.accelerator or ("cpu" if config.device == "cpu" else "H100")
        device = _accelerator(name)
        if (device.name == "cpu") != (config.device == "cpu"):
            raise UserError(f"--accelerator: {name} does not go with device: {config.device}; change one of the two")
        stage.device = device
        models = _models(config, stage.notes)
    except UserError as error:
        if str(error) not in problems:
            problems.append(str(error))
        return
    stage.models = models
    stage.memories = memories_of(config, models)
    stage.loads = loads_of(config, models, stage.device.memory)
    what = "this machine" if config.device == "cpu" else f"{stage.device.name}"
    problems += _refused(config, models) + memory_problems(config, models, stage.device.memory, what)
    trainer, engine = (stage.device.with_threads(n) for n in (config.policy.threads, config.rollout.threads))
    hardware = Hardware(trainer, engine, options.per_node)
    stage.work = _workload(config, checked, options, stage.notes)
    stage.costs = costs_of(config, models, hardware, stage.work)
    stage.phases = step_phases(config, models, hardware, stage.costs, stage.work)
    stage.first = first_phases(config, models, hardware, stage.costs, stage.work)
    if config.rewards.functions and config.generates:
        stage.notes.append("time: reward functions, environments and judges are taken to cost nothing")


_accelerator = cache(accelerator)


def _models(config: Config, notes: list[str]) -> dict[str, Model]:
    """Every model that the stage reads.

    Raises:
        UserError: one has no configuration that transformers can build a language model from.
    """
    trusted = config.model.trust_remote_code
    if config.model.new is not None and not (start_folder(config) / "config.json").is_file():
        architecture(config.model.new, size=config.model.new.vocabulary_size).save_pretrained(start_folder(config))
    models = {
        key: _model(_Fields(read_model_config(path, trust_remote_code=trusted, key=key)), config.dtype, trusted, key)
        for key, path in config.model_paths.items()
    }
    for key, model in models.items():
        if not model.saved_per_token:
            notes.append(f"{key}: what its backward pass keeps could not be found out; activations are left out")
    return models


def _refused(config: Config, models: Mapping[str, Model]) -> list[str]:
    """Models whose log-probs trainers cannot compute, and will refuse to load."""
    asked = {"model.path"} if config.stage != "reward_model" else set[str]()
    asked |= {"distill.teacher"} if config.distill.mode == "on_policy" else set()
    return [
        f"{key}: {config.model_paths[key]} changes its logits after the projection "
        f"({', '.join(model.shape.after_head)}), which the chunked log-probs do not compute; use another model"
        for key, model in models.items()
        if key in asked and model.shape.after_head
    ]


class _Fields:
    """A model's configuration, equal to another of the same content, so that a model is measured once."""

    def __init__(self, source: Any) -> None:
        self.source = source
        self._content = repr(source)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Fields) and other._content == self._content

    def __hash__(self) -> int:
        return hash(self._content)


@cache
def _model(fields: _Fields, dtype: str, trust_remote_code: bool, key: str) -> Model:
    source = fields.source
    try:
        shape = shape_of(source, trust_remote_code=trust_remote_code)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    try:
        saved = saved_bytes_per_token(source, getattr(torch, dtype), trust_remote_code=trust_remote_code)
    except Exception:  # a model's forward pass is a program that was not written for fake tensors
        saved = 0
    return Model(shape, saved)


def _workload(config: Config, checked: plan.Plan, options: Options, notes: list[str]) -> Workload:
    """What a step is made of: lengths of the rows, where they were read, else the limits."""
    longest = config.rollout.max_new_tokens
    if config.environment is not None:
        longest = config.environment.max_tokens or config.rollout.max_model_len - 1
    response = float(min(options.response_tokens or longest, longest))
    if config.stage == "rl" or (config.stage == "distill" and config.distill.mode == "on_policy"):
        notes.append(f"time: answers are taken to have {response:g} tokens (--response-tokens says otherwise)")
    prompts = [len(p.token_ids) for p in itertools.islice(checked.train_prompts, MEASURED_ROWS)]
    if config.stage == "rl":
        prompt = _mean(prompts, default=config.max_prompt_tokens)
        samples = config.rl.prompts_per_step * config.rl.samples_per_prompt
        return Workload(prompt, response, samples, config.rl.prompts_per_step, config.rl.steps)
    rows, training = config.training.rows_per_update, config.training
    steps = checked.updates or training.updates
    examples: list[Example] = list(itertools.islice(checked.train, MEASURED_ROWS))
    bare = [len(e.prompt.token_ids) for e in examples if e.prompt is not None and not e.sequences]
    if config.stage == "distill" and (bare or not examples):
        return Workload(_mean(bare, default=config.max_prompt_tokens), response, rows, rows, steps)
    sequences = [sequence for example in examples for sequence in example.sequences]
    if not sequences:
        notes.append(f"time: rows are taken to have training.max_length {training.max_length} tokens each")
        pairs = config.stage == "preference" and config.preference.loss != "kto"
        each = 2 if pairs or config.stage == "reward_model" else 1
        return Workload(0.0, float(training.max_length), each * rows, rows, steps)
    trained = _mean([int(s.mask.sum()) for s in sequences], default=0)
    whole = _mean([len(s.tokens) for s in sequences], default=0)
    return Workload(whole - trained, trained, round(len(sequences) / len(examples) * rows), rows, steps)


def _mean(lengths: Sequence[int], *, default: float) -> float:
    return sum(lengths) / len(lengths) if lengths else float(default)


def seats_by_node(stage: StagePlan, per_node: int) -> Iterator[tuple[int, int, int, list[str]]]:
    """(node, first device, last device, tenants with their ranks): neighbours that hold the same roles in one row."""
    assert stage.layout is not None
    tenants: list[list[tuple[str, int]]] = [[] for _ in stage.layout.bundles]
    devices = {memory.role for memory in stage.memories if memory.on_device}
    for role, seats in stage.layout.seats.items():
        for rank, seat in enumerate(seats):
            if role in devices:
                tenants[seat.bundle].append((role, rank))
    held = [who for who in tenants if who]
    for (node, _), group in itertools.groupby(
        enumerate(held), key=lambda place: (place[0] // per_node, tuple(role for role, _ in place[1]))
    ):
        places = list(group)
        first, last = places[0], places[-1]
        named = [
            f"{role} {low}" + (f"-{high}" if high > low else "")
            for (role, low), (_, high) in zip(first[1], last[1], strict=True)
        ]
        yield node, first[0] % per_node, last[0] % per_node, named


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A block in which transformers keeps its advice to itself."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
