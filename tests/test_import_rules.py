"""Who may import whom (DESIGN, section 1), read from the source: also imports inside functions and for types count."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PURE = ("engine.algorithms", "engine.schedule")
GROUND = ("engine.config", "engine.presets", "engine.row", "engine.user_code", *PURE)
PARTS = ("engine.data", "engine.rewards", "engine.environments", "engine.tracking")

MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "engine.presets": (),
    "engine.row": (),
    "engine.config": ("engine.presets",),
    "engine.user_code": ("engine.config",),
    "engine.algorithms": ("engine.algorithms",),
    "engine.schedule": ("engine.schedule",),
    **{part: (*GROUND, part) for part in PARTS},
    "engine.simulation": (*GROUND, "engine.config_file", "engine.preflight", "engine.tracking", "engine.simulation"),
    "engine.roles": (*GROUND, *PARTS),
    "actors": (*GROUND, *PARTS, "engine.roles", "actors"),
}
"""Package or module -> all that it may import of ours."""

MAY_NOT_IMPORT: dict[str, tuple[str, ...]] = {
    "engine.stages": ("actors", "engine.cluster", "engine.pipeline", "engine.cli"),
}

ONLY_IMPORTER_OF_ACTORS = "engine.cluster"


def within(module: str, package: str) -> bool:
    """Whether a module is this package or lies in it."""
    return module == package or module.startswith(package + ".")


def read_modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file of every module of ours under a root."""
    files = [file for package in ("engine", "actors") for file in sorted((root / package).rglob("*.py"))]
    names = [".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for file in files]
    return dict(zip(names, files, strict=True))


def imports_of(name: str, file: Path, modules: dict[str, Path]) -> set[str]:
    """The modules of ours that a module imports; `from package import module` means the module."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(), filename=str(file))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            deeper = {f"{base}.{alias.name}" for alias in node.names}
            found |= {module if module in modules else base for module in deeper}
    return {module for module in found if within(module, "engine") or within(module, "actors")}


def import_graph(root: Path) -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports."""
    modules = read_modules(root)
    return {name: imports_of(name, file, modules) for name, file in modules.items()}


def violations(graph: dict[str, set[str]]) -> list[str]:
    """`importer -> imported` for every import that the rules forbid."""
    wrong = set()
    for importer, imported in ((a, b) for a, targets in graph.items() for b in targets):
        allowed = next((may for package, may in MAY_IMPORT.items() if within(importer, package)), ("engine", "actors"))
        forbidden = next((never for package, never in MAY_NOT_IMPORT.items() if within(importer, package)), ())
        from_outside = within(imported, "actors") and not within(importer, "actors")
        if (
            not any(within(imported, package) for package in allowed)
            or any(within(imported, package) for package in forbidden)
            or (from_outside and importer != ONLY_IMPORTER_OF_ACTORS)
        ):
            wrong.add(f"{importer} -> {imported}")
    return sorted(wrong)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; empty without one."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_every_module_imports_only_what_its_place_allows() -> None:
    graph = import_graph(ROOT)
    assert {"engine.config", "engine.tracking.tracker"} <= set(graph)
    assert violations(graph) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circle(import_graph(ROOT)) == []


def plant(root: Path, files: dict[str, str]) -> dict[str, set[str]]:
    """The import graph of a small tree; `a/b.py` -> its source."""
    for name, source in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return import_graph(root)


@pytest.mark.parametrize(
    ("file", "source", "violation"),
    [
        ("engine/config.py", "import engine.user_code", "engine.config -> engine.user_code"),
        ("engine/user_code.py", "from engine.data import batch", "engine.user_code -> engine.data.batch"),
        ("engine/algorithms/kl.py", "from engine.config import Config", "engine.algorithms.kl -> engine.config"),
        ("engine/schedule/x.py", "def f():\n    import engine.config", "engine.schedule.x -> engine.config"),
        ("engine/data/x.py", "from engine.rewards import contract", "engine.data.x -> engine.rewards"),
        ("engine/tracking/x.py", "from .. import pipeline", "engine.tracking.x -> engine.pipeline"),
        ("engine/tracking/__init__.py", "from ..stages.rl import f", "engine.tracking -> engine.stages.rl"),
        ("engine/roles.py", "from engine.stages.rl import f", "engine.roles -> engine.stages.rl"),
        ("actors/x.py", "from engine.stages import rl", "actors.x -> engine.stages.rl"),
        ("actors/x.py", "import engine.pipeline as p", "actors.x -> engine.pipeline"),
        ("actors/x.py", "from engine import cluster", "actors.x -> engine.cluster"),
        ("engine/stages/rl.py", "from actors.group import g", "engine.stages.rl -> actors.group"),
        ("engine/stages/rl.py", "from engine import cluster", "engine.stages.rl -> engine.cluster"),
        ("engine/pipeline.py", "import actors.group", "engine.pipeline -> actors.group"),
        (
            "engine/cli.py",
            "if TYPE_CHECKING:\n    import actors",
            "engine.cli -> actors",
        ),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, file: str, source: str, violation: str) -> None:
    files = {
        "engine/__init__.py": "",
        "engine/config.py": "import yaml",
        "engine/cluster.py": "import actors.group\nfrom engine.config import Config",
        "engine/pipeline.py": "from engine import cluster",
        "engine/data/batch.py": "import numpy\nfrom engine.algorithms.kl import k\nfrom . import sources",
        "engine/data/sources.py": "",
        "engine/stages/rl.py": "import engine.data.batch, engine.roles",
        "engine/roles.py": "from engine.data.batch import Batch",
        "actors/__init__.py": "",
        "actors/group.py": "from engine.data.batch import Batch\nfrom engine.roles import Workers\nimport ray",
    }
    assert violations(plant(tmp_path, files)) == []
    assert violations(plant(tmp_path, {file: source})) == [violation]


def test_a_planted_circle_is_found(tmp_path: Path) -> None:
    files = {
        "engine/data/a.py": "from engine.data import b",
        "engine/data/b.py": "def later():\n    from .c import x",
        "engine/data/c.py": "",
    }
    assert circle(plant(tmp_path, files)) == []
    graph = plant(tmp_path, {"engine/data/c.py": "import engine.data.a"})
    assert set(circle(graph)) == {"engine.data.a", "engine.data.b", "engine.data.c"}


def test_the_configuration_loads_in_under_a_second_without_torch_or_ray() -> None:
    code = (
        "import time, sys; import engine.config; "  # processor seconds of the whole process: other load does not count
        "print(time.process_time(), *{'torch', 'ray', 'vllm', 'transformers', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, *heavy = done.stdout.split()
    assert heavy == []
    assert float(seconds) < 1.0
