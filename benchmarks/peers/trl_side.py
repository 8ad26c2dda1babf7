"""TRL's side, a process of its own: a trainer on the rows it is given, and a callback that takes the time."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.peers import rewards
from benchmarks.peers.record import Run, Step
from benchmarks.peers.workloads import WORKLOADS, Workload

TIMED = {"_generate": "generate", "_calculate_rewards": "score", "_precompute_ref_logps": "reference"}
"""Methods of TRL's trainers and the parts of a run that they are."""


def settings_of(workload: Workload) -> dict[str, Any]:
    """What differs from the defaults of TRL's configuration: sizes, the objective, and what would slow it down."""
    settings: dict[str, Any] = {
        "max_steps": workload.steps,
        "per_device_train_batch_size": workload.rows_per_step,
        "learning_rate": workload.learning_rate,
        "lr_scheduler_type": "constant",
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "optim": "adamw_torch_fused",
        "model_init_kwargs": {"dtype": "float32", "attn_implementation": "sdpa"},
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    match workload.kind:
        case "grpo":
            settings |= {
                "per_device_train_batch_size": workload.samples_per_step,
                "num_generations": workload.group,
                "max_completion_length": workload.max_new_tokens,
                "beta": 0.0,
                "epsilon": 0.2,
                "num_iterations": 1,
                "loss_type": "grpo",
                "scale_rewards": "group",
                "temperature": 1.0,
                "top_k": 0,
                "shuffle_dataset": False,
            }
        case "sft":
            # One row without padding; no row is longer than the workload's limit, which TRL does not cut to here.
            settings |= {"padding_free": True, "max_length": None, "train_sampling_strategy": "sequential"}
        case "dpo":
            settings |= {
                "max_length": workload.max_length,
                "train_sampling_strategy": "sequential",
                "beta": workload.beta,
                "loss_type": "sigmoid",
                "precompute_ref_log_probs": True,
            }
    return settings


class Clock:
    """Seconds of the wrapped methods since the last lap."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def around(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """The method, timed."""

        @wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.monotonic()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began

        return timed

    def lap(self) -> dict[str, float]:
        """The seconds so far; begins anew."""
        seconds, self.seconds = self.seconds, {}
        return seconds


def train(workload: Workload, *, model: str, rows: Path, folder: Path, threads: int, changes: dict[str, Any]) -> Run:
    """Run the trainer of the workload's kind."""
    started_at = time.time()
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback, set_seed

    torch.set_num_threads(threads)
    set_seed(0)
    prefix = workload.kind.upper()
    module = import_module("trl")
    base = getattr(module, f"{prefix}Trainer")
    clock = Clock()
    timed = {name: clock.around(part, getattr(base, name)) for name, part in TIMED.items() if hasattr(base, name)}
    trainer_class = type(f"Timed{prefix}Trainer", (base,), timed)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = None
    settings = settings_of(workload) | changes
    ends: list[float] = []
    parts: list[dict[str, float]] = []

    class Ends(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not ends:
                ends.append(time.time())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.time())
            parts.append(clock.lap())

    arguments: dict[str, Any] = {
        "model": model,
        "args": getattr(module, f"{prefix}Config")(output_dir=str(folder), **settings),
        "train_dataset": Dataset.from_list([json.loads(line) for line in rows.read_text().splitlines()]),
        "processing_class": tokenizer,
        "callbacks": [Ends()],
    }
    if workload.kind == "grpo":
        arguments["reward_funcs"] = [getattr(rewards, workload.reward)]
    trainer = trainer_class(**arguments)
    reference_s = clock.lap().get("reference", 0.0)
    training_at = time.time()
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "num_tokens" in entry]
    seen = [0.0, *[entry["num_tokens"] for entry in logs]]
    samples = workload.samples_per_step
    steps = [
        Step(
            began_at=ends[i],
            ended_at=ends[i + 1],
            samples=samples,
            trained_tokens=round(seen[i + 1] - seen[i]),
            generated_tokens=round(entry.get("completions/mean_length", 0.0) * samples),
            reward=entry.get("reward"),
            loss=entry.get("loss"),
            phases=parts[i] | {"optimiser and all else": ends[i + 1] - ends[i] - sum(parts[i].values())},
        )
        for i, entry in enumerate(logs)
    ]
    # The reference's pass is made when the trainer is: it belongs to the training, as on the other side.
    return Run("trl", started_at, training_at - reference_s, tuple(steps), reference_s, settings)


def main() -> None:
    """Train as the specification says and write the record beside it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("specification", type=Path)
    path = parser.parse_args().specification
    given = json.loads(path.read_text())
    from dataclasses import replace

    workload = replace(WORKLOADS[given["workload"]], **given["sizes"])
    run = train(
        workload,
        model=given["model"],
        rows=Path(given["rows"]),
        folder=path.parent / "trainer",
        threads=given["threads"],
        changes=given["changes"],
    )
    run.write(path.parent / "record.json")


if __name__ == "__main__":
    main()
