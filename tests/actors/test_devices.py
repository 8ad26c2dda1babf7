"""What a device decides. The GPU's side of each branch is checked by its decision; the CPU's runs in tests/cluster."""

from __future__ import annotations

from typing import Any

import pytest

from actors.packed_model import RAGGED_SDPA, attention_for
from actors.process import backend_for
from actors.rollout import engine_arguments, engine_environment
from actors.trainer import deepspeed_config
from engine.cluster import required, roles_of, trainer_environment
from engine.config import Config


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
        ("cuda", True, "flash_attention_2"),
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
    assert (made["bf16"], made["gradient_clipping"]) == ({"enabled": True}, 0.5)
    on_cpu = deepspeed_config(configure(device="cpu"))
    assert (on_cpu["bf16"], on_cpu["zero_optimization"]["overlap_comm"]) == ({"enabled": False}, False)


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


def test_gpu_roles_take_a_gpu_each_and_the_reference_only_exists_when_it_counts():
    config = configure(device="cuda", policy={"ranks": 4}, rollout={"engines": 3}, ray={"cpus_per_rank": 0.5})
    assert [role.name for role in roles_of(config)] == ["policy", "rollout", "rewards"]
    assert required(roles_of(config)) == {"CPU": 4.0, "GPU": 7.0}
    with_kl = configure(device="cpu", algorithm={"kl_coef": 0.1}, reference={"ranks": 2})
    assert [(role.name, role.ranks) for role in roles_of(with_kl)][1] == ("reference", 2)
    assert required(roles_of(with_kl)) == {"CPU": 5.0}
