"""Writes docs/configuration.md from the configuration's own types, defaults and docstrings.

python docs/make_configuration.py
"""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from engine.config import Config

TARGET = Path(__file__).with_name("configuration.md")
INTRODUCTION = """# Configuration

One YAML file; `section.key=value` on the command line overrides it. Unknown keys are errors. This page is made from
`engine/config.py` by `python docs/make_configuration.py`.
"""


def reference() -> str:
    """The page: a table for the top level and one for each section, in the order of the file."""
    parts = [INTRODUCTION, *_section("", Config)]
    return "\n".join(parts)


def _section(path: str, section: type[BaseModel]) -> list[str]:
    title = f"## `{path}`" if path else "## Top level"
    lines = [
        title,
        "",
        (section.__doc__ or "").strip().splitlines()[0],
        "",
        "| key | type | default | |",
        "|---|---|---|---|",
    ]
    below: list[str] = []
    for name, field in section.model_fields.items():
        inner = _inner_section(field.annotation)
        key = f"{path}.{name}" if path else name
        if inner is not None:
            below += _section(key, inner)
        kind = "section" if inner is field.annotation else _type_name(field)
        lines.append(f"| `{name}` | {kind} | {_default(field)} | {_flat(field.description)} |")
    return [*lines, "", *below]


def _flat(text: str | None) -> str:
    return " ".join((text or "").split())


def _inner_section(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((s for a in typing.get_args(annotation) if (s := _inner_section(a))), None)


def _type_name(field: FieldInfo) -> str:
    return _shown(field.annotation).replace("|", "\\|")


def _shown(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " | ".join(f"`{a}`" for a in arguments)
    if origin is typing.Annotated:
        return _shown(arguments[0])
    if origin in (list, tuple, dict):
        return f"{origin.__name__} of {', '.join(_shown(a) for a in arguments)}"
    if arguments:
        return " | ".join(_shown(a) for a in arguments)
    if annotation is type(None):
        return "none"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return {"str": "text", "Path": "path", "Any": "anything"}.get(annotation.__name__, annotation.__name__)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if isinstance(field.default, BaseModel) or field.default is PydanticUndefined:
        return ""
    shown = yaml.safe_dump(_plain(field.default), default_flow_style=True).strip().removesuffix("\n...")
    return f"`{shown}`"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value


if __name__ == "__main__":
    TARGET.write_text(reference())
