"""The whole run on the real Ray, vLLM and DeepSpeed: a tiny model learns a planted task through GRPO."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine import pipeline
from engine.config import Config

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(900)]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def learned(tiny_model, tmp_path_factory, ray_session):
    """A finished run of two engines and two policy ranks with a reference model."""
    folder = tmp_path_factory.mktemp("grpo")
    (folder / "rows.jsonl").write_text("".join(f'{{"prompt": "number {i}"}}\n' for i in range(16)))
    (folder / "held.jsonl").write_text("".join(f'{{"prompt": "letter {i}"}}\n' for i in range(16)))
    (folder / "task.py").write_text(
        "def share_of_e(completions, **columns):\n"
        "    return [text.count('e') / max(1, len(text)) for text in completions]\n"
    )
    config = Config.model_validate(
        {
            "name": "planted",
            "output_dir": str(folder / "runs"),
            "model": {"path": str(tiny_model)},
            "data": {"train": str(folder / "rows.jsonl"), "evaluation": str(folder / "held.jsonl")},
            "rewards": {"functions": [f"{folder / 'task.py'}:share_of_e"]},
            "rl": {"steps": 20, "prompts_per_step": 8, "samples_per_prompt": 8},
            "algorithm": {"kl_coef": 0.001, "loss_aggregation": "token-mean"},
            "optimizer": {"learning_rate": 0.01},
            "policy": {"ranks": 2, "zero_stage": 2, "tokens_per_microbatch": 512},
            "rollout": {"engines": 2, "max_new_tokens": 8, "max_model_len": 64, "kv_cache_gib": 0.03},
            "evaluation": {"every": 10, "samples_per_prompt": 4, "pass_threshold": 0.5},
            "tracking": {"wandb": "offline"},
        }
    )
    result = pipeline.run(config)
    return config, result, [m for m in read(config.run_dir / "metrics.jsonl") if "policy/loss" in m]


def test_the_planted_task_is_learned(learned):
    _, result, steps = learned
    gain = result.after["eval/reward"] - result.before["eval/reward"]
    error = (result.after["eval/reward_se"] ** 2 + result.before["eval/reward_se"] ** 2) ** 0.5
    assert gain > 5 * error
    assert gain > 0.3
    assert steps[-1]["reward/mean"] > steps[0]["reward/mean"] + 0.3


def test_the_first_step_starts_from_the_starting_policy(learned):
    _, _, steps = learned
    assert abs(steps[0]["policy/kl"]) < 1e-4
    assert steps[0]["policy/ratio_deviation_max"] < 1e-4
    assert steps[-1]["policy/kl"] > 1e-3, "a policy that learned has moved"


def test_the_engines_hold_the_trainers_weights_at_every_step(learned):
    _, _, steps = learned
    assert len(steps) == 20
    assert max(m["mismatch/logp_abs_max"] for m in steps) < 1e-3
    assert [m["rollout/weight_version"] for m in steps] == list(range(1, 21))


def test_the_final_model_loads_and_does_the_task(learned):
    _, result, _ = learned
    model = AutoModelForCausalLM.from_pretrained(result.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(result.model)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "letter 3"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**ids, max_new_tokens=8, do_sample=False)
    text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text.count("e") > len(text) / 2


def test_the_run_folder_holds_the_records(learned):
    config, _, _ = learned
    names = {path.name for path in config.run_dir.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "events.jsonl", "samples", "model", "wandb"} <= names
    events = read(config.run_dir / "events.jsonl")
    assert (events[0]["kind"], events[-1]["kind"], events[-1]["status"]) == ("run_started", "run_ended", "succeeded")
    assert [e["step"] for e in events if e["kind"] == "evaluated"] == [0, 10, 20]
    assert len(list((config.run_dir / "samples").iterdir())) == 20


def test_several_updates_per_step_use_old_log_probs_and_learn_too(raw_config):
    config = Config.model_validate(
        raw_config
        | {
            "rl": {
                "steps": 6,
                "prompts_per_step": 8,
                "samples_per_prompt": 8,
                "minibatches_per_step": 2,
                "epochs_per_step": 2,
            },
            "optimizer": {"learning_rate": 0.01},
            "rollout": {"max_new_tokens": 8, "max_model_len": 64, "kv_cache_gib": 0.03},
            "policy": {"tokens_per_microbatch": 512},
        }
    )
    pipeline.run(config)
    steps = [m for m in read(config.run_dir / "metrics.jsonl") if "policy/loss" in m]
    assert all("time/old_logp" in m and "policy/kl" not in m for m in steps)
    assert steps[0]["policy/ratio_deviation_max"] > 1e-3, "later updates of a step are off-policy"
    assert steps[-1]["reward/mean"] > steps[0]["reward/mean"]
    assert max(m["mismatch/logp_abs_max"] for m in steps) < 1e-3
