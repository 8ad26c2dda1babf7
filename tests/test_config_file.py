"""One stage or several from a YAML file: sections laid over each other, references, and what is told about mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.config import Config, ConfigError
from engine.config_file import PipelineConfig, load_config, load_stages


@pytest.fixture
def load(tmp_path: Path):
    def go(raw: dict[str, Any], *overrides: str) -> Config | PipelineConfig:
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(raw, sort_keys=False))
        return load_config(file, overrides)

    return go


def pipeline(**stages: Any) -> dict[str, Any]:
    return {"name": "road", "output_dir": "out", "data": {"train": "rows.jsonl"}, "stages": stages}


def test_a_stage_is_laid_over_what_all_share(load):
    raw = pipeline(sft={"model": {"path": "m"}, "policy": {"threads": 2}}, preference={"model": {"path": "stage:sft"}})
    raw["policy"] = {"threads": 1, "tokens_per_microbatch": 2048}
    raw["optimizer"] = {"learning_rate": 0.1}
    config = load(raw, "optimizer.learning_rate=0.2", "stages.preference.optimizer.learning_rate=0.3")
    assert isinstance(config, PipelineConfig)
    assert list(config.stages) == ["sft", "preference"]
    sft, preference = config.stages.values()
    assert (sft.policy.threads, sft.policy.tokens_per_microbatch, preference.policy.threads) == (2, 2048, 1)
    assert (sft.optimizer.learning_rate, preference.optimizer.learning_rate) == (0.2, 0.3)
    assert (sft.stage, preference.stage) == ("sft", "preference")
    assert (config.run_dir, sft.run_dir) == (Path("out/road"), Path("out/road/sft"))


def test_a_stage_may_have_a_name_of_its_own(load):
    raw = pipeline(warm_up={"stage": "sft", "model": {"path": "m"}})
    assert load(raw).stages["warm_up"].stage == "sft"


def test_a_file_without_stages_is_one_stage(load):
    config = load({"stage": "sft", "model": {"path": "m"}, "data": {"train": "rows.jsonl"}})
    assert isinstance(config, Config)


SFT = {"model": {"path": "m"}}


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (
            pipeline(sft={"model": {"path": "stage:pretrain"}}),
            r"stages\.sft\.model\.path: no earlier stage is called 'pre",
        ),
        (pipeline(sft=SFT, preference={"model": {"path": "stage:x"}}), "those before this one: sft"),
        (
            pipeline(reward_model=SFT, sft={"model": {"path": "stage:reward_model"}}),
            "ends with a reward model, not a language model",
        ),
        (
            pipeline(
                sft={"model": {"path": "m", "adapter": {"kind": "lora"}, "export": "adapter"}},
                preference={"model": {"path": "stage:sft"}},
            ),
            "saves an adapter alone; set its model.export: merged",
        ),
        (pipeline(sft={**SFT, "optimiser": {}}), r"stages\.sft\.optimiser: unknown key; did you mean 'optimizer'"),
        (pipeline(warm_up=SFT), r"stages\.warm_up\.stage: is required: one of pretrain, sft"),
        (pipeline(sft={**SFT, "name": "x"}), r"stages\.sft\.name: belongs to the top of the file"),
        (pipeline(sft=3), r"stages\.sft: must be a section"),
        (pipeline(), "stages: must be a mapping"),
        ({"stages": ["sft"]}, "stages: must be a mapping"),
        (
            {"stage": "preference", "model": {"path": "stage:sft"}, "data": {"train": "x"}},
            "names another stage, but the file has no `stages:`",
        ),
        (pipeline(sft={"model": {"new": {"architecture": {}}}}), "random weights are for stage: pretrain, not sft"),
        (pipeline(sft={"model": {"path": "m", "adapter": {"kind": "prompt"}}}), "prompt cannot be merged"),
        (
            pipeline(rl={"model": {"path": "m", "adapter": {"kind": "prefix"}}, "rewards": {"functions": ["f.py:g"]}}),
            "the engines cannot run prefix",
        ),
        (pipeline(distill=SFT), r"distill\.teacher: is required"),
        (pipeline(preference={**SFT, "preference": {"loss": "ipo", "label_smoothing": 0.1}}), "has no meaning for ipo"),
        (pipeline(sft={**SFT, "training": {"max_length": 9999}}), "cannot hold one sample of training.max_length 9999"),
        (pipeline(sft={**SFT, "sft": {"reasoning_format": "{completion}"}}), r"must hold \{reasoning\} and"),
    ],
)
def test_mistakes_are_told_with_their_place(load, raw, says):
    with pytest.raises(ConfigError, match=says):
        load(raw)


def test_a_mapping_is_a_configuration_too_and_functions_stand_for_their_locations():
    raw = pipeline(rl={"model": {"path": "m"}, "rewards": {"functions": [json.dumps, {"function": json.loads}]}})
    raw["data"] = {"train": json.load}
    rl = load_config(raw, ["stages.rl.rl.steps=3"]).stages["rl"]
    assert [f.function for f in rl.rewards.functions] == ["json:dumps", "json:loads"]
    assert (rl.data.train.path, rl.rl.steps) == ("json:load", 3)
    assert raw["data"] == {"train": json.load}, "what was given is left as it is"
    with pytest.raises(ConfigError, match=r"configuration: stages\.rl\.rl\.steps: "):
        load_config(raw, ["stages.rl.rl.steps=0"])


def test_stages_are_made_out_as_far_as_they_go_and_every_mistake_is_told(raw_config, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(raw_config))
    problems = []
    assert load_stages(file, [], problems) == {"test": load_config(file)}
    assert problems == []
    overrides = [
        "rl.steps=-1",
        "rl.stpes=2",
        "rewards.functions=[{function: exact, wieght: 1}]",
        "rollout.temperature=0",
    ]
    [stage] = load_stages(file, overrides, problems).values()
    assert [problem.partition(": ")[2].partition(":")[0] for problem in problems] == [
        "rewards.functions.0.wieght",
        "rl.steps",
        "rl.stpes",
        "rollout.temperature",
    ]
    assert stage.rl.steps == type(stage.rl)().steps
    assert [entry.function for entry in stage.rewards.functions] == ["exact"]
    assert stage.rollout.temperature == 0


@pytest.mark.parametrize(
    "override",
    ["rl", "model=", "stages={}", "algorithm=grop", "data.train={subset: x}", "rewards.functions=3", "name=[]"],
)
def test_stages_that_cannot_be_made_out_are_left_out_with_their_mistakes(raw_config, tmp_path, override):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(raw_config))
    problems = []
    load_stages(file, [override], problems)
    assert problems
    with pytest.raises(ConfigError):
        load_config(file, [override])
