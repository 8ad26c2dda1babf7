"""A cluster, a folder and tiny models, for runs that are to be broken."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray

from engine.ray_token import use_private_token
from tests.chaos.runs import Observed
from tests.conftest import build_tiny_model

PROMPTS, SAMPLES = 4, 4
SILENCE_S = 8.0
TOKEN = "GNOMON_CHAOS_TOKEN"
"""Environment variable with the token of the reward server."""


class Workshop:
    """A cluster, a folder and tiny models, for runs that are broken."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.switches = folder / "switches"
        self.switches.mkdir()
        self.task = Path(shutil.copy(Path(__file__).with_name("task.py"), folder / "task.py"))
        self.model = build_tiny_model(folder / "model")
        rows = folder / "rows.jsonl"
        rows.write_text("".join(json.dumps({"prompt": f"number {i}"}) + "\n" for i in range(16)))
        pairs = folder / "pairs.jsonl"
        pair = {"chosen": " two", "rejected": " one"}
        pairs.write_text("".join(json.dumps(pair | {"prompt": f"number {i}"}) + "\n" for i in range(16)))
        self.rows, self.pairs = rows, pairs
        self.address = ray.get_runtime_context().gcs_address

    def run(self, name: str, **changes: Any) -> Observed:
        """A run of the tiny model."""
        raw: dict[str, Any] = {
            "name": name,
            "output_dir": str(self.folder / "runs"),
            "model": {"path": str(self.model)},
            "data": {"train": str(self.rows)},
            "rewards": {"functions": [f"{self.task}:share_of_e"]},
            "algorithm": {"name": "grpo", "loss": f"{self.task}:loss"},
            "rl": {"steps": 20, "prompts_per_step": PROMPTS, "samples_per_prompt": SAMPLES},
            "policy": {"tokens_per_microbatch": 512},
            "rollout": {"max_new_tokens": 8, "max_model_len": 64, "kv_cache_gib": 0.03},
            "checkpoint": {"every": 2, "keep": 2},
            "timeouts": {"silence": SILENCE_S},
            "ray": {"cpus_per_rank": 0.5, "stop_after_incidents": 10_000},
        }
        return Observed(self.folder, raw | changes, self.address)

    def reward_model(self) -> Path:
        """One that was trained for a moment, at the first call."""
        made = self.folder / "runs" / "reward-model" / "model"
        if made.is_dir():
            return made
        training = {"updates": 2, "rows_per_update": 4, "max_length": 64}
        run = self.run("reward-model", stage="reward_model", training=training, data={"train": str(self.pairs)})
        run.start()
        assert run.wait(300) == 0, run.tail()
        return made

    def ppo(self, name: str, steps: int) -> Observed:
        """A run with every kind of actor that has a model."""
        return self.run(
            name,
            algorithm={"name": "ppo", "loss": f"{self.task}:loss", "kl_coef": 0.01},
            rewards={"functions": [f"{self.task}:share_of_e"], "models": [str(self.reward_model())]},
            rl={"steps": steps, "prompts_per_step": PROMPTS, "samples_per_prompt": SAMPLES},
            rollout={"engines": 2, "max_new_tokens": 8, "max_model_len": 64, "kv_cache_gib": 0.03},
        )


@contextlib.contextmanager
def workshop() -> Iterator[Workshop]:
    """On a cluster of this process's own."""
    use_private_token()
    os.environ.setdefault(TOKEN, secrets.token_hex(16))  # before the cluster's processes start, who inherit it
    with tempfile.TemporaryDirectory(prefix="gnomon-chaos-") as folder:
        ray.init(
            address="local",
            num_cpus=16,
            include_dashboard=False,
            object_store_memory=2**30,
            log_to_driver=False,
            logging_level="ERROR",
        )
        try:
            yield Workshop(Path(folder))
        finally:
            ray.shutdown()
