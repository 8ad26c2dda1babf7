"""Every example runs as it is, but for fewer steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine import pipeline
from engine.config_file import load_config

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_session")
def test_two_rewards_on_two_engines(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    changes = ["rl.steps=1", f"model.path={tiny_model}", f"output_dir={tmp_path}"]
    config = load_config("examples/two_rewards/two_rewards.yaml", changes)
    pipeline.run(config)
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    [step] = [m for m in lines if "policy/loss" in m]
    total = step["reward/names_the_capital/mean"] + 0.2 * step["reward/brevity/mean"]
    assert step["reward/mean"] == pytest.approx(total, abs=1e-5)
    assert step["reward/brevity/mean"] > 0
    assert list((config.run_dir / "wandb").glob("offline-run-*"))


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("name", ["sft_lora", "dpo", "reward_model_hh"])
def test_an_offline_example_trains_and_measures(tiny_model, tmp_path, monkeypatch, name):
    monkeypatch.chdir(ROOT)
    changes = [f"model.path={tiny_model}", f"output_dir={tmp_path}", "optimizer.learning_rate=0.001"]
    changes += ["training.max_length=256"]
    result = pipeline.run(load_config(f"examples/{name}.yaml", changes))
    assert result.model.is_dir()
    assert result.after
    assert result.after != result.before


@pytest.mark.thorough
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("ray_session")
def test_the_full_pipeline_goes_through_all_its_stages(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    stages = ("pretrain", "sft", "reward_model", "preference")
    changes = [f"output_dir={tmp_path}", "evaluation.prompts=8", *(f"stages.{s}.training.updates=2" for s in stages)]
    changes += [f"stages.{s}.rl.{size}" for s in ("ppo", "rl") for size in ("steps=1", "prompts_per_step=4")]
    changes += ["policy.threads=1", "rollout.threads=1"]
    config = load_config("examples/full_pipeline.yaml", changes)
    result = pipeline.run(config)
    assert result.model == (tmp_path / "full-pipeline" / "rl" / "model").absolute()
    stages = (*stages, "ppo", "rl")
    assert {folder.name for folder in config.run_dir.iterdir()} == set(stages)
    assert all((config.run_dir / stage / "model" / "model.safetensors").is_file() for stage in stages)
    metrics = [json.loads(line) for line in (config.run_dir / "ppo" / "metrics.jsonl").read_text().splitlines()]
    [step] = [m for m in metrics if "policy/loss" in m]
    assert step["reward/mean"] == step["reward/reward_model/mean"], "gold is measured and weighs nothing"
    assert {"reward/gold/mean", "critic/loss", "policy/kl_per_sample"} <= step.keys()


@pytest.mark.thorough
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_session")
def test_the_calculator_is_offered_to_a_model_that_has_read_nothing_yet(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    changes = [f"output_dir={tmp_path}", "evaluation.prompts=8", "policy.threads=1", "rollout.threads=1"]
    changes += ["stages.read.training.updates=2", "stages.learn.rl.steps=1", "stages.learn.rl.prompts_per_step=4"]
    config = load_config("examples/calculator/calculator.yaml", changes)
    result = pipeline.run(config)
    assert result.model == (tmp_path / "calculator" / "learn" / "model").absolute()
    lines = (config.run_dir / "learn" / "metrics.jsonl").read_text().splitlines()
    assert any("reward/right/mean" in json.loads(line) for line in lines)


def steps_of(folder: Path) -> list[dict[str, float]]:
    """The metrics of the steps of an `rl` stage."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "reward/mean" in line]


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_session")
def test_the_game_is_played_over_several_turns(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    changes = [f"output_dir={tmp_path}", "evaluation.prompts=8", "policy.threads=1", "rollout.threads=1"]
    changes += ["stages.read.training.updates=40", "stages.play.rl.steps=1", "stages.play.rl.prompts_per_step=4"]
    config = load_config("examples/guess_the_number/guess_the_number.yaml", changes)
    pipeline.run(config)
    [step] = steps_of(config.run_dir / "play")
    assert step["rollout/observed_fraction"] > 0
    assert step["rollout/turns"] > 1
    assert step["reward/mean"] == pytest.approx(step["reward/environment/mean"])
    assert "reward/found/mean" in step


@pytest.mark.thorough
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_session")
def test_outcome_and_process_rewards_start_from_the_same_model(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    changes = [f"output_dir={tmp_path}", "evaluation.prompts=8", "policy.threads=1", "rollout.threads=1"]
    changes += ["stages.read.training.updates=40", "rl.steps=1", "rl.prompts_per_step=4"]
    config = load_config("examples/process_rewards/process_rewards.yaml", changes)
    pipeline.run(config)
    [outcome], [process] = (steps_of(config.run_dir / stage) for stage in ("outcome", "process"))
    assert outcome["reward/mean"] == pytest.approx(outcome["reward/all_right/mean"])
    assert process["reward/mean"] == pytest.approx(process["reward/steps_right/mean"])
    assert process["reward/all_right/mean"] == outcome["reward/all_right/mean"], "the same first samples"
    assert 0 < process["reward/share_right/mean"] < 1
