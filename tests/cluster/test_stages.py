"""Every offline stage on the real DeepSpeed (and vLLM, where answers are scored): it learns what its rows teach."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from actors.bottleneck import load_bottlenecks
from engine import pipeline
from engine.config import Config
from engine.stages.loop import Result
from tests.conftest import thorough

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(600)]
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"]


def two_words(count: int, seed: int = 0) -> list[tuple[str, str]]:
    pick = random.Random(seed)
    return [tuple(pick.sample(WORDS, 2)) for _ in range(count)]


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path):
    """Runs a stage on rows; half of them are held out."""

    def go(stage: str, rows: list[dict[str, Any]], **sections: Any) -> tuple[Result, list[dict[str, float]]]:
        for name, part in (("train", rows[::2]), ("held", rows[1::2])):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        raw: dict[str, Any] = {
            "name": "run",
            "output_dir": str(tmp_path),
            "stage": stage,
            "model": {"path": str(tiny_model)},
            "data": {"train": str(tmp_path / "train.jsonl"), "evaluation": str(tmp_path / "held.jsonl")},
            "training": {"updates": 30, "rows_per_update": 16, "max_length": 64},
            "policy": {"tokens_per_microbatch": 1024},
            "optimizer": {"learning_rate": 0.01},
        }
        for name, section in sections.items():
            raw[name] = raw.get(name, {}) | section if isinstance(section, dict) else section
        config = Config.model_validate(raw)
        result = pipeline.run(config)
        lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
        return result, [m for m in map(json.loads, lines) if "train/loss" in m]

    return go


def sft_rows() -> list[dict[str, Any]]:
    return [{"prompt": f"{a} {b}", "completion": f"{b}"} for a, b in two_words(64)]


def test_pretraining_from_random_weights_beats_a_unigram_model(run, tmp_path):
    pick = random.Random(0)
    rows = [{"text": " ".join(WORDS[(start + i) % 8] for i in range(20))} for start in pick.choices(range(8), k=64)]
    architecture = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
    }
    model = {"path": "", "new": {"architecture": architecture, "vocabulary_size": 300}}
    result, steps = run("pretrain", rows, model=model)
    assert result.after["eval/perplexity"] < result.after["eval/unigram_perplexity"]
    assert result.before["eval/perplexity"] > result.before["eval/unigram_perplexity"]
    assert steps[-1]["train/loss"] < steps[0]["train/loss"]
    AutoModelForCausalLM.from_pretrained(result.model)
    assert len(AutoTokenizer.from_pretrained(result.model)) <= 300


def test_sft_answers_held_out_prompts_better_and_forgetting_is_measured(run, tmp_path):
    (tmp_path / "general.txt").write_text("one and two are three and the quick brown fox " * 4)
    (tmp_path / "task.py").write_text(
        "def exact(sample):\n    return float(sample.completion.strip() == sample.row.completion)\n"
    )
    result, _ = run(
        "sft",
        sft_rows(),
        data={"general_text": str(tmp_path / "general.txt")},
        rewards={"functions": [f"{tmp_path / 'task.py'}:exact"]},
        rollout={"max_new_tokens": 8, "max_model_len": 64, "kv_cache_gib": 0.03},
        training={"updates": 60},
    )
    before, after = result.before, result.after
    assert after["eval/perplexity"] < before["eval/perplexity"] / 5
    assert after["eval/reward"] > before["eval/reward"] + 0.3
    assert after["eval/token_accuracy"] > 0.6
    assert before["eval/general_perplexity"] != after["eval/general_perplexity"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("kind", ["ia3", "bottleneck", "prompt", "prefix"])
def test_adapters_learn_over_frozen_weights(run, tiny_model, kind):
    base = weights(tiny_model)
    adapter = {"kind": kind, "rank": 8, "virtual_tokens": 4}
    result, steps = run(
        "sft", sft_rows(), model={"adapter": adapter, "export": "adapter"}, optimizer={"learning_rate": 0.05}
    )
    assert steps[-1]["train/loss"] < steps[0]["train/loss"] - 0.1
    assert result.after["eval/perplexity"] < result.before["eval/perplexity"]
    assert all((weights(tiny_model)[name] == base[name]).all() for name in base)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    loaded = (
        load_bottlenecks(model, result.model)
        if kind == "bottleneck"
        else PeftModel.from_pretrained(model, result.model)
    )
    assert loaded is not None


CALM = {"learning_rate": 0.003}
"""With which the loss of a reward model of this size goes to 0; above, it swings, and so does what is held out."""


def preference_rows() -> list[dict[str, Any]]:
    return [{"prompt": f"{a} {b}", "chosen": b, "rejected": a} for a, b in two_words(64)]


@pytest.mark.parametrize("loss", ["sigmoid", "orpo", "kto", *thorough("hinge", "robust", "ipo", "simpo")])
def test_preference_losses_prefer_the_chosen_answers(run, loss):
    result, steps = run(
        "preference",
        preference_rows(),
        preference={"loss": loss, "label_smoothing": 0.1 if loss == "robust" else 0.0, "beta": 0.5},
        optimizer={"learning_rate": 0.003},
    )
    assert steps[-1]["train/loss"] < steps[0]["train/loss"]
    if loss == "kto":
        assert result.after["eval/reward_desirable"] > result.after["eval/reward_undesirable"] + 0.1
    else:
        assert result.after["eval/preference_accuracy"] > 0.75
        assert result.after["eval/implicit_margin"] > result.before["eval/implicit_margin"]


def test_with_lora_the_frozen_weights_are_the_reference(run):
    result, steps = run("preference", preference_rows(), model={"adapter": {"kind": "lora"}}, training={"updates": 80})
    assert abs(steps[0]["train/margin"]) < 1e-5
    assert steps[0]["train/loss"] == pytest.approx(0.693147, abs=1e-5)
    assert result.after["eval/preference_accuracy"] > 0.75


def score(folder: Path, loader: Any, texts: list[str]) -> torch.Tensor:
    model, tokenizer = loader.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    return torch.stack([model(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts]).detach()


def test_a_pairwise_reward_model_loads_in_transformers_and_stores_its_statistics(run):
    rows = [row | {"margin": 0.1} for row in preference_rows()]
    result, _ = run("reward_model", rows, reward_model={"center_coef": 0.01}, training={"updates": 80}, optimizer=CALM)
    assert result.after["eval/accuracy"] > 0.8
    assert result.after["eval/accuracy"] > result.before["eval/accuracy"]
    record = json.loads((result.model / "reward_model.json").read_text())
    assert record["kind"] == "pairwise"
    assert record["std"] > 0
    tokenizer = AutoTokenizer.from_pretrained(result.model)
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}], tokenize=False
        )
        for row in rows[1::2]
        for side in ("chosen", "rejected")
    ]
    scores = score(result.model, AutoModelForSequenceClassification, texts)[:, 0]
    assert (scores[0::2] > scores[1::2]).float().mean() == pytest.approx(result.after["eval/accuracy"], abs=0.02)
    assert scores.mean() == pytest.approx(record["mean"], abs=1e-4)
    model = AutoModelForSequenceClassification.from_pretrained(result.model)
    padded = tokenizer([texts[0], texts[0] * 2], return_tensors="pt", padding=True)
    assert model(**padded).logits[0, 0].item() == pytest.approx(scores[0].item(), abs=1e-4), "padding changes nothing"


def test_rankings_with_ties_are_learned(run):
    rows = [{"prompt": f"{a} {b}", "responses": [a, b, "dog", a], "ranks": [2, 1, 2, 2]} for a, b in two_words(64)]
    result, _ = run(
        "reward_model",
        [r for r in rows if "dog" not in r["prompt"]],
        reward_model={"kind": "ranking"},
        training={"updates": 80},
    )
    assert result.after["eval/accuracy"] > result.before["eval/accuracy"] + 0.2


def test_annotators_who_disagree_each_get_a_head(run):
    rows = preference_rows()
    for i, row in enumerate(rows):
        row["annotator"] = "first" if i // 2 % 2 else "second"
        if row["annotator"] == "second":
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    result, _ = run(
        "reward_model", rows, reward_model={"annotator_heads": True}, training={"updates": 80}, optimizer=CALM
    )
    assert result.after["eval/accuracy_worst_annotator"] > 0.6, "one head for both would be right at most half the time"
    record = json.loads((result.model / "reward_model.json").read_text())
    assert record["annotators"] == ["first", "second"]
    assert score(result.model, AutoModelForSequenceClassification, ["fox"]).shape == (1, 3)


def test_a_process_reward_model_tells_right_steps_from_wrong_ones(run):
    right = WORDS[:4]
    rows = [{"prompt": "go", "steps": [a, b], "labels": [a in right, b in right]} for a, b in two_words(64)]
    result, _ = run("reward_model", rows, reward_model={"kind": "process"})
    assert result.after["eval/accuracy"] > 0.75
    loaded = AutoModelForTokenClassification.from_pretrained(result.model)
    assert loaded.num_labels == 1


@pytest.fixture(scope="module")
def teacher(tiny_model, tmp_path_factory):
    """The tiny model, sure of one word."""
    folder = tmp_path_factory.mktemp("teacher")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{a} {b}", "completion": "fox"}) + "\n" for a, b in two_words(64)))
    raw = {
        "name": "teacher",
        "output_dir": str(folder),
        "stage": "sft",
        "model": {"path": str(tiny_model)},
        "data": {"train": str(rows)},
        "training": {"updates": 40, "rows_per_update": 16, "max_length": 64},
        "optimizer": {"learning_rate": 0.01},
    }
    return pipeline.run(Config.model_validate(raw)).model


@pytest.mark.parametrize("mode", ["on_policy", "sequence"])
def test_a_student_takes_over_its_teachers_answers(run, teacher, mode):
    result, steps = run(
        "distill",
        [{"prompt": f"{a} {b}"} for a, b in two_words(64)],
        distill={"teacher": str(teacher), "mode": mode},
        rollout={"max_new_tokens": 6, "max_model_len": 64, "kv_cache_gib": 0.03},
    )
    assert steps[-1]["train/loss"] < steps[0]["train/loss"] / 3
    if mode == "on_policy":
        assert result.after["eval/divergence"] < result.before["eval/divergence"] / 3
    else:
        assert result.after["eval/perplexity"] < result.before["eval/perplexity"] / 10


def test_sharded_weights_are_measured_and_saved_whole(run):
    policy = {"ranks": 2, "zero_stage": 3}
    result, steps = run("sft", sft_rows(), policy=policy, training={"updates": 8})
    assert steps[-1]["train/loss"] < steps[0]["train/loss"]
    assert result.after["eval/perplexity"] < result.before["eval/perplexity"]
    AutoModelForCausalLM.from_pretrained(result.model)
