"""Training goes on from a state on any number of ranks, with any ZeRO stage: bit for bit where both are the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from actors.policy import PolicyGroup
from engine.config import Config
from tests.cluster.conftest import random_batch
from tests.cluster.test_policy import Session

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(600)]
BEFORE, AFTER = range(2), range(2, 5)
LAYOUTS = {"one": {"ranks": 1}, "two": {"ranks": 2, "zero_stage": 2}, "sharded": {"ranks": 2, "zero_stage": 3}}


def configure(model: Path, layout: str) -> Config:
    return Config.model_validate(
        {
            "model": {"path": str(model)},
            "data": {"train": "unused.jsonl"},
            "rewards": {"functions": ["unused.py:f"]},
            "rl": {"steps": 9, "prompts_per_step": 4, "samples_per_prompt": 4},
            "rollout": {"max_new_tokens": 8, "max_model_len": 64},
            "optimizer": {"learning_rate": 0.01, "schedule": "cosine", "weight_decay": 0.1},
            "policy": LAYOUTS[layout] | {"tokens_per_microbatch": 64},
        }
    )


def train(policy: PolicyGroup, steps: range) -> tuple[list[dict[str, float]], np.ndarray]:
    metrics = [policy.update([random_batch(13, seed=step)]) for step in steps]
    return metrics, policy.logprobs(random_batch(7, seed=99))


def save(policy: PolicyGroup, folder: Path) -> None:
    policy.capture_state()
    policy.write_state(str(folder))


def test_a_state_of_any_layout_is_continued_by_any_other(tiny_model, tmp_path):
    unbroken = {}
    for layout in LAYOUTS:
        with Session(configure(tiny_model, layout)) as policy:
            save(policy, tmp_path / "untrained" / layout)
            train(policy, BEFORE)
            save(policy, tmp_path / layout)
            unbroken[layout] = train(policy, AFTER)
            for source in unbroken:
                policy.load_state(str(tmp_path / source))
                metrics, logp_T = train(policy, AFTER)
                expected, expected_logp_T = unbroken[source]
                if source == layout:
                    assert metrics == expected
                    assert (logp_T == expected_logp_T).all()
                for ours, theirs in zip(metrics, expected, strict=True):
                    assert ours["policy/loss"] == pytest.approx(theirs["policy/loss"], abs=1e-5)
                    assert ours["policy/grad_norm"] == pytest.approx(theirs["policy/grad_norm"], rel=1e-4)
                    assert ours["policy/learning_rate"] == theirs["policy/learning_rate"]
                np.testing.assert_allclose(logp_T, expected_logp_T, atol=1e-4)
            policy.load_state(str(tmp_path / "untrained" / layout))  # moments that were there are gone again
            train(policy, BEFORE)
            assert train(policy, AFTER)[0] == unbroken[layout][0]
    with Session(configure(tiny_model, "one")) as policy:  # a fresh engine, which has never stepped
        policy.load_state(str(tmp_path / "sharded"))
        metrics, _ = train(policy, AFTER)
    losses = [row["policy/loss"] for row in metrics]
    assert losses == pytest.approx([row["policy/loss"] for row in unbroken["sharded"][0]], abs=1e-5)


def test_two_ranks_share_the_writing_and_nothing_is_pickled(tiny_model, tmp_path):
    with Session(configure(tiny_model, "two")) as policy:
        train(policy, BEFORE)
        save(policy, tmp_path)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["rank_00000_00000.safetensors", "rank_00001_00000.safetensors", "trainer.json"]
    held = []
    for file in files[:2]:
        with safe_open(tmp_path / file, "pt") as tensors:
            held.append({name for name in tensors.keys() if not name.startswith("random/")})  # noqa: SIM118
    assert not held[0] & held[1]
    assert 0.5 < len(held[0]) / len(held[1]) < 2
