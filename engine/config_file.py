"""From a YAML file, or a mapping, and `a.b=c` overrides to a checked configuration of one stage or several."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from engine.config import NAME_PATTERN, Config, ConfigError
from engine.user_code import location_of

STAGE_PREFIX = "stage:"
"""`stage:sft`, as a model's path, is the model that the stage named sft ended with."""
_KINDS = typing.get_args(Config.model_fields["stage"].annotation)


class PipelineConfig(BaseModel):
    """Several stages, run in order. The folder of each is `run_dir/<name of the stage>`."""

    model_config = ConfigDict(frozen=True)

    run_dir: Path
    """Folder of the whole pipeline: `output_dir/name`."""
    stages: dict[str, Config]
    """What each stage is to do; its settings are laid over those that all stages share."""


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config | PipelineConfig:
    """Read a YAML file, apply `a.b=c` overrides (values are YAML), check everything.

    A file with `stages:` is a pipeline: a mapping of names to sections, each laid over the rest of the file.

    Args:
        source: the file, or what it would hold; there, functions and classes may stand for their locations, for
            instance `{"rewards": {"functions": [correct]}}`.
        overrides: `section.key=value`.

    Raises:
        ConfigError: with one line per mistake: where, what, how to mend it.
        UserError: a function that other processes cannot import.
    """
    path = "configuration" if isinstance(source, Mapping) else Path(source)
    raw = _located(source) if isinstance(source, Mapping) else _read(Path(source))
    for override in overrides:
        _apply_override(raw, override)
    problems: list[str] = []
    config = _pipeline(raw, problems) if "stages" in raw else _validated(raw, (), problems)
    if config is None or problems:
        raise ConfigError("\n".join(f"{path}: {line}" for line in dict.fromkeys(problems)))
    return config


def load_stages(source: Path, overrides: Sequence[str], problems: list[str]) -> dict[str, Config]:
    """The stages of a file (of one, under its name) as far as they can be made out; every mistake becomes a problem.

    A setting that is wrong is left at its default, and a stage that lacks a required one is left out, so that what
    remains can be looked at too.
    """
    try:
        raw = _read(source)
        for override in overrides:
            _apply_override(raw, override)
    except ConfigError as error:
        problems.append(str(error))
        return {}
    found: list[str] = []
    if "stages" in raw:
        stages = _stages(raw, found, _mended)
    else:
        config = _mended(raw, (), found)
        stages = {config.name: config} if config is not None else {}
    problems += [f"{source}: {line}" for line in dict.fromkeys(found)]
    return stages


def _located(value: Any) -> Any:
    """A copy with the location of every function and class in its place."""
    if isinstance(value, Mapping):
        return {key: _located(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_located(item) for item in value]
    return location_of(value) if callable(value) else value


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give the path of a YAML configuration") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; give the path of a YAML file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not text; give the path of a YAML file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; give the path of a YAML file") from None
    except yaml.MarkedYAMLError as error:
        place = f"{path}:{error.problem_mark.line + 1}" if error.problem_mark else f"{path}"
        raise ConfigError(f"{place}: is not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: must be a mapping of sections (model:, data:, stage:, training: ...)")
    return raw


_Validate = Callable[[dict[str, Any], tuple[str, ...], list[str]], Config | None]


def _pipeline(raw: dict[str, Any], problems: list[str]) -> PipelineConfig | None:
    """The pipeline; problems are added to the list."""
    stages = _stages(raw, problems, _validated)
    return None if problems else PipelineConfig(run_dir=next(iter(stages.values())).output_dir, stages=stages)


def _stages(raw: dict[str, Any], problems: list[str], validated: _Validate) -> dict[str, Config]:
    """Each stage's section over what all share; problems are added to the list."""
    shared = {key: value for key, value in raw.items() if key not in ("stages", "name", "output_dir")}
    entries = raw["stages"]
    if not isinstance(entries, Mapping) or not entries:
        problems.append("stages: must be a mapping of names to sections, for instance {sft: {data: ...}}")
        return {}
    folder = Config.model_fields["output_dir"].default
    named = {"name": raw.get("name", "run"), "output_dir": raw.get("output_dir", str(folder))}
    if not (isinstance(named["name"], str) and re.fullmatch(NAME_PATTERN, named["name"])):
        problems.append(f"name: {named['name']!r} must be letters, digits, '.', '_' and '-', a letter or digit first")
    stages: dict[str, Config] = {}
    for name, entry in entries.items():
        if entry is not None and not isinstance(entry, Mapping):
            problems.append(f"stages.{name}: must be a section, but got {entry!r}")
            continue
        merged = _laid_over(shared, {"stage": name} if name in _KINDS and "stage" not in shared else {})
        merged = _laid_over(merged, entry or {})
        if "stage" not in merged:
            problems.append(f"stages.{name}.stage: is required: one of {', '.join(_KINDS)}")
            continue
        if misplaced := [key for key in ("name", "output_dir", "stages") if key in (entry or {})]:
            problems.append(f"stages.{name}.{misplaced[0]}: belongs to the top of the file; take it out")
            continue
        output_dir = f"{named['output_dir']}/{named['name']}"
        config = validated({**merged, "name": name, "output_dir": output_dir}, ("stages", str(name)), problems)
        if config is not None:
            problems += [f"stages.{name}.{p}" for p in _reference_problems(config, stages)]
            stages[str(name)] = config
    return stages


def _reference_problems(config: Config, earlier: Mapping[str, Config]) -> list[str]:
    """`stage:NAME` must name a model of the right kind that an earlier stage makes."""
    problems = []
    for key, path in config.model_paths.items():
        name = path.removeprefix(STAGE_PREFIX)
        if name == path:
            continue
        if name not in earlier:
            known = ", ".join(earlier) or "none"
            problems.append(f"{key}: no earlier stage is called {name!r}; those before this one: {known}")
        elif (earlier[name].stage == "reward_model") == (key in ("model.path", "distill.teacher")):
            ends, wanted = "a language model", "a reward model"
            if earlier[name].stage == "reward_model":
                ends, wanted = wanted, ends
            problems.append(f"{key}: stage {name!r} ends with {ends}, not {wanted}; name another")
        elif earlier[name].trains_adapter and earlier[name].model.export == "adapter":
            problems.append(f"{key}: stage {name!r} saves an adapter alone; set its model.export: merged")
    return problems


def _laid_over(base: Any, top: Any) -> Any:
    """Mappings are merged key by key; anything else in `top` replaces what is in `base`."""
    if not isinstance(base, Mapping) or not isinstance(top, Mapping):
        return top
    return {**base, **{key: _laid_over(base.get(key), value) for key, value in top.items()}}


def _validated(raw: dict[str, Any], where: tuple[str, ...], problems: list[str]) -> Config | None:
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        problems += _explained(error, where)
        return None
    if not where:
        problems += _orphans(config)
    return config


def _explained(error: ValidationError, where: tuple[str, ...]) -> list[str]:
    """One line per mistake, each from the top of the file on."""
    prefix = "".join(f"{part}." for part in where)
    return [f"{prefix}{line}" for e in error.errors() for line in _explain(e)]


def _orphans(config: Config) -> list[str]:
    """Models of other stages, where there are none."""
    return [
        f"{key}: {path} names another stage, but the file has no `stages:`; give a folder"
        for key, path in config.model_paths.items()
        if path.startswith(STAGE_PREFIX)
    ]


class _Unchecked(Config):
    """A configuration whose fields are checked each for itself only."""

    @model_validator(mode="after")
    def _cross_checks(self) -> _Unchecked:
        return self


def _mended(raw: dict[str, Any], where: tuple[str, ...], problems: list[str]) -> Config | None:
    """The configuration without the settings that are wrong, which become problems; None where one is missing."""
    kind: type[Config] = Config
    while True:
        try:
            config = kind.model_validate(raw)
        except ValidationError as error:
            problems += _explained(error, where)
            left = raw
            for mistake in error.errors():
                left = _without(left, mistake["loc"]) if mistake["type"] != "missing" else left
            if left == raw and (kind is _Unchecked or any(mistake["loc"] for mistake in error.errors())):
                return None
            kind, raw = (_Unchecked if left == raw else kind), left
        else:
            problems += [] if where else _orphans(config)
            return config


def _without(value: Any, loc: Sequence[int | str]) -> Any:
    """A copy without what lies at a path of keys; those that pydantic adds for itself are passed over."""
    if not loc:
        return value
    first, rest = loc[0], loc[1:]
    if isinstance(value, Mapping) and first in value:
        if any(isinstance(value[first], Mapping | list) and part in _keys(value[first]) for part in rest):
            return {**value, first: _without(value[first], rest)}
        return {key: held for key, held in value.items() if key != first}
    if isinstance(value, list) and isinstance(first, int) and first < len(value):
        if any(isinstance(value[first], Mapping | list) and part in _keys(value[first]) for part in rest):
            return [_without(held, rest) if i == first else held for i, held in enumerate(value)]
        return [held for i, held in enumerate(value) if i != first]
    return _without(value, rest)


def _keys(value: Mapping[str, Any] | list[Any]) -> Sequence[int | str]:
    return list(value) if isinstance(value, Mapping) else range(len(value))


class _Loader(yaml.SafeLoader):
    """Plain YAML, in which a key that is given twice is an error (PyYAML silently takes the last)."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        """A mapping's node, once its keys are known to differ."""
        node: Any = super().compose_mapping_node(anchor)
        seen = set()
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            if key.value in seen:
                raise yaml.MarkedYAMLError(None, None, f"key {key.value!r} is given twice; keep one", key.start_mark)
            seen.add(key.value)
        return node


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"override {override!r}: must look like section.key=value, for instance rl.steps=10")
    *sections, last = key.split(".")
    node = raw
    for section in sections:
        child = node.setdefault(section, {})
        if child is None:
            child = node[section] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {section!r} is a value, not a section")
        node = child
    try:
        node[last] = yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not valid YAML; quote it") from None


def _explain(error: Any) -> list[str]:
    """One line per mistake from one pydantic error: `where: what; how to mend it`."""
    loc = [str(part) for part in error["loc"] if not str(part).startswith("function-")]
    where, kind = ".".join(loc), error["type"]
    if kind == "extra_forbidden":
        section = _section_at(loc[:-1])
        known = list(section.model_fields) if section else []
        close = difflib.get_close_matches(loc[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys here: {', '.join(known)}"
        return [f"{where}: unknown key; {hint}"]
    if kind == "missing":
        section = _section_at(loc[:-1])
        field = section.model_fields.get(loc[-1]) if section else None
        return [f"{where}: is required: {field.description if field else ''}".rstrip(": ")]
    if kind == "value_error":
        return [f"{where}: {line}" if where else line for line in str(error["ctx"]["error"]).splitlines()]
    return [f"{where}: {error['msg'][0].lower()}{error['msg'][1:]}, but got {error['input']!r}"]


def _section_at(loc: list[str]) -> type[BaseModel] | None:
    """The section class at a path of keys, through lists, unions and annotations."""
    current: Any = Config
    for part in loc:
        if part.isdigit():
            continue
        if not (isinstance(current, type) and issubclass(current, BaseModel)) or part not in current.model_fields:
            return None
        current = _section_in(current.model_fields[part].annotation)
    return current


def _section_in(annotation: Any) -> Any:
    """The section class inside `X`, `X | None`, `list[X]`, `Annotated[X, ...]`."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation
    return next((s for a in typing.get_args(annotation) if isinstance(s := _section_in(a), type)), None)
