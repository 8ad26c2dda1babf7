"""`gnomon plan` as it is called: what it prints, its exit code, every mistake at once, and nothing left behind."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig

from engine.cli import USER_ERROR, main
from tests.test_import_rules import import_graph, read_modules
from tests.test_model_shape import PUBLISHED, small

ROOT = Path(__file__).parents[1]


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Plans a configuration; returns (exit code, what was printed)."""
    monkeypatch.setenv("COLUMNS", "120")

    def call(raw: dict[str, Any], *arguments: str) -> tuple[int, str]:
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(raw, sort_keys=False))
        monkeypatch.setattr(sys, "argv", ["gnomon", "plan", str(file), *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0), capsys.readouterr().out

    return call


def bare(folder: Path, name: str = "") -> str:
    """A folder that holds a published model's config.json, or a small one's, and nothing else."""
    fields = dict(PUBLISHED[name][1]) if name else {}
    config = AutoConfig.for_model(fields.pop("model_type"), **fields) if name else small("llama")
    config.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def large(raw_config: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """405 billion parameters on 8 GPUs."""
    sections = {"device": "cuda", "policy": {"ranks": 8, "zero_stage": 3}, "rollout": {"kv_cache_gib": 4}}
    return raw_config | {"model": {"path": bare(tmp_path / "405b", "Llama-3.1-405B")}} | sections


def test_a_small_run_on_the_cpu_is_planned_whole(plan: Any, raw_config: dict[str, Any]) -> None:
    code, out = plan(raw_config)
    assert code == 0
    for expected in ("placement: separate", "policy, rollout, rewards", "key-value cache", "activations", "bottleneck"):
        assert expected in out
    assert "(2 steps) on 1 machine" in out
    assert "nothing is wrong" in out


def test_a_plan_for_programs_is_one_json_object(plan: Any, raw_config: dict[str, Any]) -> None:
    code, out = plan(raw_config, "--json", "--price", "2")
    found = json.loads(out)
    stage = found["stages"]["test"]
    assert code == 0
    assert found["problems"] == []
    assert found["cost"] == pytest.approx(2 * found["hours"])
    assert list(stage["phases"]) == ["rollout", "update", "publish"]
    assert stage["step_seconds"] == pytest.approx(sum(stage["phases"].values()))
    assert stage["memory"]["policy"]["peak"] <= sum(item["bytes"] for item in stage["memory"]["policy"]["items"])
    assert stage["workload"]["prompt"] < 20  # the rows were read


def test_a_folder_with_a_configuration_alone_is_planned_with_notes(plan: Any, large: dict[str, Any]) -> None:
    _, out = plan(large)
    assert "405,853,388,800 parameters" in out
    assert "holds no weights: good for a plan, not for a run" in out
    assert "holds no tokenizer" in out


def test_405_billion_parameters_on_8_gpus_end_with_exit_code_2_and_what_would_help(
    plan: Any, large: dict[str, Any]
) -> None:
    code, out = plan(large, "--accelerator", "H200")
    assert code == USER_ERROR
    assert "problem: memory: policy needs" in out
    assert "model.gradient_checkpointing=true" in out
    assert "problem: memory: rollout needs" in out
    assert "problems to mend" in out


def test_mistakes_of_every_kind_are_told_at_once(plan: Any, raw_config: dict[str, Any], tmp_path: Path) -> None:
    rows = tmp_path / "bad.jsonl"
    rows.write_text('{"prompt": "fine"}\n{"promt": "misspelt"}\n')
    raw = raw_config | {"data": {"train": str(rows)}, "optimizer": {"schedule": "cos"}}
    raw["rewards"] = {"functions": [str(tmp_path / "nowhere.py") + ":f"]}
    raw["rollout"] = raw["rollout"] | {"temperature": 0, "kv_cache_gib": 1e-6}
    code, out = plan(raw, "rl.stpes=3")
    assert code == USER_ERROR
    for expected in (
        "rl.stpes: unknown key; did you mean 'steps'?",
        "optimizer.schedule: input should be",
        "rollout.temperature: 0 is greedy",
        "no such file",
        "1 bad of 2 rows",
        "rollout.kv_cache_gib: 1e-06 cannot hold one sample",
        "settings that are wrong are taken at their defaults",
        "6 problems to mend",
    ):
        assert expected in out


@pytest.mark.parametrize("missing", ["model", "data"])
def test_a_stage_without_a_required_section_is_told_and_left_out(
    plan: Any, raw_config: dict[str, Any], missing: str
) -> None:
    code, out = plan({key: value for key, value in raw_config.items() if key != missing})
    assert code == USER_ERROR
    assert f"{missing}: is required" in out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["device=cuda", "--accelerator", "H300"], "'H300' is not known; known: A100-80G, H100"),
        (["device=cuda", "--accelerator", "cpu"], "does not go with device: cuda"),
        (["model.path=no/such/folder"], "no such folder"),
    ],
)
def test_what_the_command_line_has_wrong_is_a_problem_too(
    plan: Any, raw_config: dict[str, Any], arguments: list[str], expected: str
) -> None:
    code, out = plan(raw_config, *arguments)
    assert (code, expected in out) == (USER_ERROR, True)


def test_a_model_that_trainers_refuse_is_a_problem(plan: Any, raw_config: dict[str, Any], tmp_path: Path) -> None:
    small("gemma2", final_logit_softcapping=30.0).save_pretrained(tmp_path / "gemma2")
    code, out = plan(raw_config, f"model.path={tmp_path / 'gemma2'}")
    assert code == USER_ERROR
    assert "changes its logits after the projection (final_logit_softcapping)" in out


def test_ranks_are_placed_on_devices_and_nodes(plan: Any, raw_config: dict[str, Any], tmp_path: Path) -> None:
    raw = raw_config | {"device": "cuda", "model": {"path": bare(tmp_path / "8b", "Qwen3-8B")}}
    raw |= {"policy": {"ranks": 6, "zero_stage": 1}, "rollout": {"engines": 2, "kv_cache_gib": 4}}
    _, out = plan(raw, "--accelerator", "B200", "--per-node", "4", "--json")
    [stage] = json.loads(out)["stages"].values()
    rows = [(row["node"], row["first_device"], row["last_device"], row["holds"]) for row in stage["placement"]]
    assert rows == [(0, 0, 3, ["policy 0-3"]), (1, 0, 1, ["policy 4-5"]), (1, 2, 3, ["rollout 0-1"])]
    assert stage["devices"] == 8


def test_a_pipeline_shows_each_stage_with_the_model_that_it_starts_from(
    plan: Any, raw_config: dict[str, Any], tmp_path: Path
) -> None:
    rows = tmp_path / "sft.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    shared = {key: value for key, value in raw_config.items() if key not in ("rl", "rewards", "data")}
    stages = {
        "sft": {"data": {"train": str(rows)}, "training": {"max_length": 64}},
        "rl": {key: raw_config[key] for key in ("rl", "rewards", "data")} | {"model": {"path": "stage:sft"}},
    }
    code, out = plan(shared | {"stages": stages})
    assert code == 0, out
    assert "sft: sft on cpu" in out
    assert "rl: rl on cpu" in out
    assert "(1 + 2 steps)" in out
    code, out = plan(shared | {"stages": stages}, "stages.sft.training.max_length=2", "stages.rl.model.path=stage:pre")
    assert code == USER_ERROR
    assert "stage sft: " in out
    assert "no earlier stage is called 'pre'" in out


def test_a_new_model_is_planned_from_its_architecture(plan: Any, tmp_path: Path) -> None:
    rows = tmp_path / "text.txt"
    rows.write_text("the quick brown fox jumps over the lazy dog " * 50)
    architecture = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    architecture |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    raw = {
        "stage": "pretrain",
        "output_dir": str(tmp_path / "runs"),
        "model": {"new": {"architecture": architecture, "vocabulary_size": 300}},
        "data": {"train": str(rows)},
        "training": {"max_length": 32, "updates": 3},
    }
    for arguments in ([], ["--no-rows"]):
        code, out = plan(raw, *arguments)
        assert code == 0, out
        assert "model: llama, " in out
    assert not (tmp_path / "runs").exists()


def test_a_plan_leaves_nothing_behind(plan: Any, raw_config: dict[str, Any]) -> None:
    plan(raw_config)
    assert not Path(raw_config["output_dir"]).exists()


def test_a_plan_needs_neither_ray_nor_actors() -> None:
    graph, reached, waiting = import_graph(ROOT), set[str](), ["engine.preflight", "engine.preflight_report"]
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting += graph.get(module, ())
    assert "engine.plan" in reached
    assert not {module for module in reached if module.startswith("actors") or module == "engine.cluster"}
    assert not any("import ray" in file.read_text() for name, file in read_modules(ROOT).items() if name in reached)
