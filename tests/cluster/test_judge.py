"""Judge and verifier in a run that ask a model on vLLM's server; transformers computes the same answers."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine import pipeline
from engine.config import Config
from engine.rewards.endpoint import Completion
from engine.rewards.judge import probabilities

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(600)]
STEPS, PROMPTS, SAMPLES = 2, 2, 4


@pytest.fixture(scope="module")
def judged(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: None
) -> tuple[Config, list[dict[str, Any]], list[dict[str, Any]]]:
    """A finished run, its metrics by step, and every question with its answer, as the judge's cache keeps them."""
    folder = tmp_path_factory.mktemp("judge")
    model = shutil.copytree(tiny_model, folder / "model")
    settings = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 4096}
    (model / "config.json").write_text(json.dumps(settings))
    rows = [{"prompt": f"number {i}", "rival": f"the lazy dog {i}"} for i in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asking = {"server": "judge", "constrain": True, "cache": str(folder / "cache")}
    config = Config.model_validate(
        {
            "name": "judged",
            "output_dir": str(folder / "runs"),
            "model": {"path": str(tiny_model)},
            "data": {"train": str(folder / "rows.jsonl")},
            "rewards": {
                "servers": [{"name": "judge", "path": str(model), "max_model_len": 3000, "kv_cache_gib": 0.05}],
                "functions": [
                    {"function": "judge", "arguments": asking | {"mode": "pairwise", "column": "rival"}},
                    {"function": "generative_verifier", "arguments": asking, "weight": 0},
                ],
            },
            "rl": {"steps": STEPS, "prompts_per_step": PROMPTS, "samples_per_prompt": SAMPLES},
            "policy": {"tokens_per_microbatch": 512},
            "rollout": {"max_new_tokens": 8, "max_model_len": 64, "kv_cache_gib": 0.03},
        }
    )
    pipeline.run(config)
    metrics = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    kept = [json.loads(path.read_text()) for path in sorted((folder / "cache").rglob("*.json"))]
    return config, metrics, kept


def test_every_sample_was_judged_in_both_orders_and_verified(judged: Any) -> None:
    _, metrics, kept = judged
    assert [m["rollout/dropped/reward_error"] for m in metrics if "rollout/dropped/reward_error" in m] == []
    for step in metrics:
        share, bias = step["reward/judge/shown_second/mean"], step["reward/judge/position_bias/mean"]
        assert step["reward/mean"] == pytest.approx(share + bias, abs=1e-5)
        assert 0 < step["reward/generative_verifier/mean"] < 1
    kinds = Counter(tuple(entry["request"]["structured_outputs"]["choice"]) for entry in kept)
    assert set(kinds) == {("A", "B"), ("Yes", "No")}
    assert kinds["A", "B"] == 2 * kinds["Yes", "No"], "equal responses share their answers, in both orders alike"


def test_the_shares_are_those_of_the_model(judged: Any) -> None:
    config, _, kept = judged
    path = config.rewards.servers[0].path
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    first = {"A": "A", "B": "B", "Yes": "Y", "No": "N"}
    for entry in kept:
        labels = entry["request"]["structured_outputs"]["choice"]
        ids = tokenizer.apply_chat_template(
            entry["request"]["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        with torch.inference_mode():
            logits = model(ids).logits[0, -1]
        share = torch.softmax(logits[[tokenizer.convert_tokens_to_ids(first[label]) for label in labels]], 0)
        got = probabilities(Completion.model_validate(entry["response"]), labels, only=True)
        assert [got[label] for label in labels] == pytest.approx(share.tolist(), abs=1e-3)


def test_the_server_ends_with_the_run(judged: Any) -> None:
    config, _, _ = judged
    path = config.rewards.servers[0].path
    serving = [p for p in psutil.process_iter() if p.is_running() and path in " ".join(_command(p))]
    assert psutil.wait_procs(serving, timeout=10)[1] == []


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
