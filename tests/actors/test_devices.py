"""What a device decides. The GPU's side of each branch is checked by its decision; the CPU's runs in tests/cluster."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from actors import process
from actors.process import backend_for, free_port, offloads
from actors.ragged_attention import RAGGED_SDPA, RAGGED_VARLEN, attention_for
from actors.rollout import engine_arguments, engine_environment
from actors.trainer import deepspeed_config
from engine.cluster import trainer_environment
from engine.config import Config
from engine.layout import layout_of, roles_of


def configure(**changes: Any) -> Config:
    raw = {
        "model": {"path": "m"},
        "data": {"train": "t.jsonl"},
        "rewards": {"functions": ["a.py:f"]},
        "rl": {"steps": 1, "prompts_per_step": 2, "samples_per_prompt": 2},
    }
    return Config.model_validate(raw | changes)


@pytest.mark.parametrize(
    ("device", "installed", "attention"),
    [
        ("cuda", True, RAGGED_VARLEN),
        ("cuda", False, RAGGED_SDPA),
        ("cpu", True, RAGGED_SDPA),
        ("cpu", False, RAGGED_SDPA),
    ],
)
def test_flash_attention_is_for_gpus_that_have_it(device, installed, attention):
    assert attention_for(device, installed) == attention


def test_the_process_group_backend_follows_the_device():
    assert (backend_for("cuda"), backend_for("cpu")) == ("nccl", "gloo")


def test_the_dtype_follows_the_device_unless_given():
    assert (configure(device="cpu").dtype, configure(device="cuda").dtype) == ("float32", "bfloat16")
    assert configure(device="cuda", model={"path": "m", "dtype": "float32"}).dtype == "float32"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_gets_stage_dtype_and_clipping(stage):
    config = configure(device="cuda", policy={"zero_stage": stage}, optimizer={"max_grad_norm": 0.5})
    made = deepspeed_config(config)
    assert made["zero_optimization"] == {"stage": stage, "overlap_comm": True}
    assert (made["bf16"], made["gradient_clipping"]) == ({"enabled": True, "check_grad_overflow": True}, 0.5)
    on_cpu = deepspeed_config(configure(device="cpu"))
    assert (on_cpu["bf16"]["enabled"], on_cpu["zero_optimization"]["overlap_comm"]) == (False, False)
    assert on_cpu["gradient_clipping"] == 0  # the trainer clips by the norm that it reports
    assert deepspeed_config(configure(device="cpu", policy={"zero_stage": 1}))["gradient_clipping"] == 1


def test_cpu_engines_run_eagerly_with_small_blocks_and_gpu_engines_as_vllm_likes():
    on_cpu, on_gpu = (engine_arguments(configure(device=device)) for device in ("cpu", "cuda"))
    assert (on_cpu["enforce_eager"], on_cpu["block_size"], on_cpu["dtype"]) == (True, 32, "float32")
    assert on_gpu["dtype"] == "bfloat16"
    assert not {"enforce_eager", "block_size"} & set(on_gpu)
    for arguments in (on_cpu, on_gpu):
        assert arguments["logprobs_mode"] == "processed_logprobs"
        assert arguments["kv_cache_memory_bytes"] == 2**29


def test_only_cpu_processes_have_their_threads_counted():
    assert engine_environment("cpu", 3)["OMP_NUM_THREADS"] == "3"
    assert "OMP_NUM_THREADS" not in engine_environment("cuda", 3)
    assert all(engine_environment(d, 1)["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0" for d in ("cpu", "cuda"))
    assert trainer_environment("cpu", 2)["DS_ACCELERATOR"] == "cpu"
    assert "DS_ACCELERATOR" not in trainer_environment("cuda", 2)


def reserved(config: Config) -> dict[str, float]:
    """Sum of the layout's bundles."""
    names = {name for bundle in layout_of(config).bundles for name in bundle}
    return {name: sum(bundle.get(name, 0.0) for bundle in layout_of(config).bundles) for name in names}


def test_gpu_roles_take_a_gpu_each_and_the_reference_only_exists_when_it_counts():
    config = configure(device="cuda", policy={"ranks": 4}, rollout={"engines": 3}, ray={"cpus_per_rank": 0.5})
    assert [role.name for role in roles_of(config)] == ["policy", "rollout", "rewards"]
    assert reserved(config) == {"CPU": 4.0, "GPU": 7.0}
    with_kl = configure(device="cpu", algorithm={"kl_coef": 0.1}, reference={"ranks": 2})
    assert [(role.name, role.ranks) for role in roles_of(with_kl)][1] == ("reference", 2)
    assert reserved(with_kl) == {"CPU": 5.0}


@pytest.mark.parametrize(
    ("algorithm", "changes", "roles"),
    [
        ("ppo", {}, {"policy", "critic", "reference", "rollout"}),
        ("ppo", {"model": {"path": "m", "adapter": {"kind": "lora"}}}, {"policy", "critic", "rollout"}),
        ("online_dpo", {}, {"policy", "reference", "rollout"}),
        ("online_dpo", {"preference": {"loss": "simpo"}}, {"policy", "rollout"}),
        ("iterative_dpo", {}, {"policy", "rollout"}),
        ("dapo", {"reference": {"measure": True}}, {"policy", "reference", "rollout"}),
        ("rloo", {"rewards": {"models": ["rm"]}}, {"policy", "reference", "reward_model/reward_model", "rollout"}),
    ],
)
def test_an_algorithm_starts_the_models_that_it_needs_and_no_other(algorithm, changes, roles):
    names = {role.name for role in roles_of(configure(algorithm=algorithm, **changes))}
    assert names - {"rewards"} == roles


def test_a_group_shares_devices_and_the_reward_models_are_meant_by_one_name():
    config = configure(
        device="cuda",
        algorithm="ppo",
        rewards={"models": ["a", {"path": "b", "name": "other"}]},
        placement={"mode": "packed", "groups": [["policy", "critic"], ["reference", "reward_model"]]},
    )
    layout = layout_of(config)
    assert layout.sharing == (("policy", "critic"), ("reference", "reward_model/reward_model", "reward_model/other"))
    assert reserved(config)["GPU"] == 3


def test_memory_is_left_to_others_only_where_roles_take_turns_on_a_gpu():
    for device, mode, leaves in (("cuda", "turns", True), ("cuda", "packed", False), ("cpu", "turns", False)):
        config = configure(device=device, placement={"mode": mode}, policy={"zero_stage": 1})
        assert offloads(config) == leaves
        assert engine_arguments(config).get("enable_sleep_mode", False) == leaves


def test_a_custom_device_is_what_bundles_ask_for():
    config = configure(placement={"device": "accel"}, rollout={"engines": 2})
    assert reserved(config) == {"CPU": 4.0, "accel": 3.0}


def test_a_process_groups_port_is_one_that_the_kernel_hands_to_nobody() -> None:
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert not any(low <= free_port() <= high for _ in range(50))


def test_a_port_in_use_is_not_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket() as held:
        held.bind(("", 0))
        held.listen()
        port = held.getsockname()[1]
        monkeypatch.setattr(process, "range", lambda *_: range(port, port + 1), raising=False)
        monkeypatch.setattr(process, "_DRAWN_PORTS", tmp_path / "absent")
        with pytest.raises(RuntimeError, match="is free"):
            free_port()
