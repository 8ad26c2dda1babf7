"""Episodes of several turns on the real Ray, vLLM and DeepSpeed: a policy learns from an environment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine import pipeline
from engine.config import Config

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(900)]

ENVIRONMENT = '''
import asyncio, time
from engine import Turn

class Letters:
    """Three turns; each is worth its share of the letter e."""

    def __init__(self, hanging=""):
        self.turns, self.hanging = 0, hanging

    async def reset(self, row):
        self.stuck = row.answer == self.hanging
        return [{"role": "user", "content": "begin"}] if row.answer == "2" else []

    async def step(self, message):
        if self.stuck:
            time.sleep(600)
        await asyncio.sleep(0)
        self.turns += 1
        text = message["content"]
        said = [{"role": "user", "content": f"the lazy dog {self.turns}"}]
        return Turn(said, reward=text.count("e") / max(1, len(text)), done=self.turns == 3)
'''


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def episodes(raw: dict[str, Any], folder: Path, **changes: Any) -> Config:
    (folder / "letters.py").write_text(ENVIRONMENT)
    own = {
        "rewards": {},
        "environment": {"path": f"{folder}/letters.py:Letters", "timeout": 20},
        "rollout": {"max_new_tokens": 8, "max_model_len": 128, "kv_cache_gib": 0.05},
        "policy": {"tokens_per_microbatch": 512},
        "tracking": {"samples_per_step": 100},
    }
    return Config.model_validate(raw | own | changes)


@pytest.fixture(scope="module")
def learned(tiny_model, tmp_path_factory, ray_session):
    folder = tmp_path_factory.mktemp("episodes")
    (folder / "rows.jsonl").write_text("".join(f'{{"prompt": "number {i}", "answer": "{i}"}}\n' for i in range(8)))
    raw = {"name": "episodes", "output_dir": str(folder / "runs"), "model": {"path": str(tiny_model)}}
    config = episodes(
        raw | {"data": {"train": str(folder / "rows.jsonl")}},
        folder,
        rl={"steps": 16, "prompts_per_step": 8, "samples_per_prompt": 8},
        algorithm={"name": "grpo", "loss_aggregation": "token-mean"},
        optimizer={"learning_rate": 0.01},
    )
    pipeline.run(config)
    return config, read(config.run_dir / "metrics.jsonl")


def test_the_policy_learns_from_what_the_environment_says_of_its_turns(learned):
    _, steps = learned
    assert steps[-1]["reward/environment/mean"] > steps[0]["reward/environment/mean"] + 1.0  # of 3 in an episode
    assert steps[-1]["rollout/turns"] == 3


def test_engine_and_trainer_agree_on_every_token_that_was_sampled_behind_a_reply(learned):
    _, steps = learned
    assert all(m["rollout/observed_fraction"] > 0.2 for m in steps)
    assert max(m["mismatch/logp_abs_max"] for m in steps) < 1e-3


def test_the_samples_show_the_conversation(learned):
    config, _ = learned
    first = read(config.run_dir / "samples" / "step_000001.jsonl")[0]
    assert [message["role"] for message in first["messages"]][:4] == ["assistant", "user", "assistant", "user"]
    assert first["messages"][1]["content"] == "the lazy dog 1"
    assert first["completion"] == first["messages"][4]["content"]


def test_an_environment_that_hangs_costs_its_own_samples_only(raw_config, tmp_path):
    hanging = {"path": f"{tmp_path}/letters.py:Letters", "arguments": {"hanging": "3"}, "timeout": 1.5, "retries": 0}
    config = episodes(
        raw_config, tmp_path, environment=hanging, rl={"steps": 1, "prompts_per_step": 8, "samples_per_prompt": 2}
    )
    pipeline.run(config.model_copy(update={"data": config.data.model_copy(update={"evaluation": None})}))
    [metrics] = read(config.run_dir / "metrics.jsonl")
    assert metrics["rollout/dropped/environment_timeout"] == 2
    events = [e for e in read(config.run_dir / "events.jsonl") if e["kind"] == "environment_timeout"]
    assert [e["message"] for e in events] == ["step() took longer than 1.5 s"] * 2
