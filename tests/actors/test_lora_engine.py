"""A real vLLM engine runs each LoRA version that is loaded into it, and its log-probs are those of peft."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from actors.adapters import AdaptedModel, add_adapter
from actors.lora_engine import ENGINE_RANKS, engine_lora_arguments
from actors.rollout import engine_arguments
from engine.config import AdapterConfig, Config, UserError

pytestmark = pytest.mark.timeout(600)
ROOT = Path(__file__).parents[2]
LORA = {"kind": "lora", "rank": 4, "alpha": 8}
VERSIONS = [
    LORA,
    LORA,
    LORA | {"rslora": True},
    LORA | {"targets": ["q_proj", "down_proj"]},
]
REFUSED = [LORA | {"dora": True}, LORA | {"rank": 9}, LORA]
PROMPTS = [[7, 8, 9], [20, 21, 22, 23, 24], list(range(40, 120)), [5]]


def configure(model: Path, adapter: dict[str, Any]) -> Config:
    return Config.model_validate(
        {
            "model": {"path": str(model), "adapter": adapter},
            "data": {"train": "unused.jsonl"},
            "rewards": {"functions": ["rewards.py:length"]},
            "rl": {"steps": 1, "prompts_per_step": 4, "samples_per_prompt": 4},
            "rollout": {"max_new_tokens": 16, "max_model_len": 128, "kv_cache_gib": 0.03},
        }
    )


def make_adapter(model: Path, adapter: dict[str, Any], seed: int) -> AdaptedModel:
    """An adapter whose factors are random, so that it matters."""
    adapted = add_adapter(
        AutoModelForCausalLM.from_pretrained(model).eval(), AdapterConfig(**adapter), task="CAUSAL_LM"
    )
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=random))
    return adapted


def mismatch(model: torch.nn.Module, responses: list[dict[str, Any]]) -> float:
    """Largest difference between the engine's log-probs of its tokens and the model's."""
    worst = 0.0
    for prompt, response in zip(PROMPTS, responses, strict=True):
        ids = torch.tensor(prompt + response["ids"])
        with torch.no_grad():
            logp = torch.log_softmax(model(ids[None]).logits[0, len(prompt) - 1 : -1], -1)
        taken = logp.gather(1, ids[len(prompt) :, None])[:, 0]
        worst = max(worst, float((taken - torch.tensor(response["logp"])).abs().max()))
    return worst


@pytest.fixture(scope="module")
def adapters(tiny_model) -> list[AdaptedModel]:
    return [make_adapter(tiny_model, adapter, seed) for seed, adapter in enumerate([*VERSIONS, *REFUSED])]


@pytest.fixture(scope="module")
def report(tiny_model, adapters, tmp_path_factory) -> dict[str, Any]:
    """What one engine did with all versions, one after the other, its prefix cache never reset."""
    folder = tmp_path_factory.mktemp("lora")
    folders = [folder / str(version) for version in range(len(adapters))]
    for adapted, where in zip(adapters, folders, strict=True):
        adapted.save_adapter(where)
    renamed = folders[-1] / "adapter_model.safetensors"
    save_file({n.replace("layers.1.", "layers.7."): t for n, t in load_file(renamed).items()}, renamed)
    job = folder / "job.json"
    engine = engine_arguments(configure(tiny_model, LORA))
    job.write_text(json.dumps({"engine": engine, "prompts": PROMPTS, "adapters": [str(f) for f in folders]}))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("lora_engine_process.py")), str(job)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(job.with_suffix(".out").read_text())


@pytest.mark.parametrize("version", range(len(VERSIONS)))
def test_the_engine_samples_from_the_version_that_was_loaded_last(adapters, report, version):
    result = report["results"][version]
    assert result["error"] is None
    assert mismatch(adapters[version].model, result["responses"]) < 1e-4
    for other in set(range(len(VERSIONS))) - {version}:
        assert mismatch(adapters[other].model, result["responses"]) > 1e-2, "another version would be noticed"


def test_the_frozen_model_is_still_there_below_the_adapter(adapters, report):
    with adapters[0].disabled():
        assert mismatch(adapters[0].model, report["base"]) < 1e-4


def test_the_publishers_tensors_are_left_alone(report):
    assert all(result["untouched"] for result in report["results"])


def test_an_adapter_that_the_engine_cannot_run_is_refused_and_the_one_before_stays(adapters, report):
    refused = report["results"][len(VERSIONS) :]
    reasons = ("DoRA", "rank 9 is greater than", "are not in the engine's model, e.g. model.layers.7")
    for result, reason in zip(refused, reasons, strict=True):
        assert reason in result["error"]
        assert mismatch(adapters[len(VERSIONS) - 1].model, result["responses"]) < 1e-4


@pytest.mark.parametrize(("rank", "engine_rank"), [(1, 1), (2, 8), (8, 8), (17, 32), (257, 320), (512, 512)])
def test_the_engine_is_given_the_next_rank_that_it_accepts(report, tiny_model, rank, engine_rank):
    assert tuple(report["ranks"]) == ENGINE_RANKS
    assert engine_lora_arguments(configure(tiny_model, LORA | {"rank": rank}))["max_lora_rank"] == engine_rank


def test_a_rank_beyond_what_engines_accept_is_refused(tiny_model):
    with pytest.raises(UserError, match=r"model\.adapter\.rank: vLLM takes at most 512, not 513"):
        engine_lora_arguments(configure(tiny_model, LORA | {"rank": 513}))
