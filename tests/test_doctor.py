"""The doctor sees what is missing or known to break, and says how to mend it."""

from __future__ import annotations

import io
import shutil
import stat
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from rich.console import Console

from engine.doctor import Finding, Report, diagnose, print_report


def find(report: Report, topic: str) -> Finding:
    [found] = [finding for finding in report.findings if finding.topic == topic]
    return found


def install(site: Path, monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """Make importlib.metadata find these distributions as well, before the real ones."""
    for name, version in versions.items():
        folder = site / f"{name}-{version}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(site))


def executable(path: Path, script: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_a_whole_installation_is_ready_and_its_versions_are_told() -> None:
    report = diagnose()
    assert report.ok, [f for f in report.findings if f.level == "error"]
    for name in ("torch", "ray", "deepspeed", "transformers", "wandb"):
        assert find(report, name) == Finding(name, metadata.version(name))
    assert "CPU build" in find(report, "vllm").value
    for topic in ("processor", "memory", "/dev/shm", "disk", "GPUs", "C compiler"):
        assert find(report, topic).value


def test_it_answers_without_importing_the_heavy_libraries() -> None:
    code = "import sys; from engine.doctor import diagnose; diagnose(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "vllm", "ray", "deepspeed", "transformers", "datasets", "wandb"} & set(loaded)


def test_without_the_libraries_it_is_not_ready_and_each_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing_installed(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", nothing_installed)
    report = diagnose()
    assert not report.ok
    for name in ("torch", "ray", "deepspeed", "vllm"):
        assert find(report, name).level == "error"
        assert find(report, name).remedy.startswith("pip install --no-deps -r requirements/cpu.txt")
    assert find(report, "reasoning-gym").level == "warning"  # only the quickstart needs it


def test_torchvision_beside_a_cpu_torch_is_an_error_with_the_command_that_mends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, torchvision="0.28.0", torchcodec="0.17.0")
    report = diagnose()
    assert not report.ok
    assert "pip uninstall torchvision torchcodec" in find(report, "torch companions").remedy


def test_both_builds_of_vllm_at_once_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, vllm="0.32.0")
    report = diagnose()
    assert not report.ok
    assert "fresh environment" in find(report, "vllm").remedy


def test_a_cuda_torch_under_the_cpu_build_of_vllm_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, torch="2.13.0")
    report = diagnose()
    assert not report.ok
    assert "+cpu" in find(report, "torch build").remedy


def test_gpus_are_listed_and_a_cpu_torch_beside_them_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executable(
        tmp_path / "bin" / "nvidia-smi",
        r"printf '0, Planted GPU, 80 MiB\n1, Planted GPU, 80 MiB\n'",
    )
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    report = diagnose()
    assert [f.value[:14] for f in report.findings if f.topic == "GPUs"] == ["0, Planted GPU", "1, Planted GPU"]
    assert find(report, "GPU stack").level == "warning"
    assert "requirements/gpu.txt" in find(report, "GPU stack").remedy
    assert report.ok


def test_a_broken_gpu_driver_is_a_warning_not_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executable(tmp_path / "bin" / "nvidia-smi", "exit 9")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    report = diagnose()
    assert find(report, "GPUs").level == "warning"
    assert report.ok


def test_a_missing_compiler_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CC", raising=False)
    report = diagnose()
    assert report.ok
    assert "install gcc" in find(report, "C compiler").remedy


def test_little_memory_and_a_full_disk_are_warnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    monkeypatch.setattr("engine.doctor._container_limit", lambda: 2**30)
    report = diagnose(tmp_path)
    assert find(report, "memory").level == "warning"
    assert "container limit" in find(report, "memory").value
    assert "--shm-size" in find(report, "/dev/shm").remedy
    assert "output_dir" in find(report, "disk").remedy
    assert report.ok


def test_the_printed_report_holds_every_finding_and_every_remedy() -> None:
    report = Report()
    report.add("memory", "3 GiB")
    report.add("torch", "not installed", "error", "pip install [it]")
    out = io.StringIO()
    print_report(report, Console(file=out, width=100))
    text = out.getvalue()
    assert "3 GiB" in text
    assert "torch: pip install [it]" in text
    assert "Not ready" in text
