"""Who shares a device, what does not fit it, and remedies whose numbers are those of the changed configuration."""

from __future__ import annotations

from typing import Any

import pytest

from engine.config import Config
from engine.config_file import load_config
from engine.fit import USABLE, Load, cache_bytes, loads_of, memories_of, memory_problems, remedies
from engine.footprint import GIB, Model
from engine.hardware import accelerator
from engine.model_shape import shape_of
from tests.test_footprint import configure
from tests.test_model_shape import PUBLISHED

BYTES_405B = 96_000_000
"""A token's activations: 126 layers of about 760 KB."""


def model(name: str, saved_per_token: int) -> dict[str, Model]:
    """A published model as the one that a run trains."""
    return {"model.path": Model(shape_of(PUBLISHED[name][1]), saved_per_token)}


LARGE = model("Llama-3.1-405B", BYTES_405B)
MIDDLE = model("Qwen3-8B", 7_800_000)
SMALL = model("Qwen2.5-0.5B", 1_600_000)
H200 = accelerator("H200").memory
POLICY = {"ranks": 8, "zero_stage": 3, "tokens_per_microbatch": 4096}
ROLLOUT = {"engines": 8, "kv_cache_gib": 8}


def peaks(config: Config, models: dict[str, Model]) -> dict[str, int]:
    """Role -> bytes of a rank at its peak."""
    return {found.role: found.peak for found in memories_of(config, models)}


def with_setting(config: Config, setting: str) -> Config:
    """The configuration with what a remedy says."""
    raw = config.model_dump(mode="json", exclude_defaults=True)
    overrides = setting.replace(" with ", " ").split()
    loaded = load_config(raw, overrides)
    assert isinstance(loaded, Config)
    return loaded


def test_separate_roles_have_devices_of_their_own() -> None:
    config = configure(policy=POLICY, rollout=ROLLOUT)
    peak = peaks(config, MIDDLE)
    found = {(load.tenants, load.devices, load.bytes) for load in loads_of(config, MIDDLE, H200)}
    assert found == {(("policy",), 8, peak["policy"]), (("rollout",), 8, peak["rollout"])}


def test_packed_roles_add_up_on_the_devices_that_they_share() -> None:
    rollout = ROLLOUT | {"engines": 6}
    config = configure(policy=POLICY, rollout=rollout, placement={"mode": "packed"})
    peak = peaks(config, MIDDLE)
    found = {load.tenants: (load.devices, load.bytes) for load in loads_of(config, MIDDLE, H200)}
    assert found == {
        ("policy", "rollout"): (6, peak["policy"] + peak["rollout"]),
        ("policy",): (2, peak["policy"]),
    }


def test_roles_that_take_turns_need_as_much_as_the_largest() -> None:
    config = configure(policy=POLICY, rollout=ROLLOUT, placement={"mode": "turns"})
    [load] = loads_of(config, MIDDLE, H200)
    assert load.bytes == max(peaks(config, MIDDLE)[role] for role in ("policy", "rollout"))


def test_on_the_cpu_all_processes_share_the_machine() -> None:
    config = configure(device="cpu", policy={"ranks": 2}, placement={"mode": "turns"})
    [load] = loads_of(config, SMALL, 64 * GIB)
    peak = peaks(config, SMALL)
    assert load.bytes == 2 * peak["policy"] + peak["rollout"] + peak["rewards"]
    assert load.capacity == int(64 * GIB * USABLE)


def test_405_billion_parameters_on_8_devices_do_not_fit_and_it_is_said_what_would_help() -> None:
    config = configure(policy=POLICY, rollout=ROLLOUT)
    trained, engine, start = memory_problems(config, LARGE, H200, "H200")
    assert "policy needs" in trained
    assert "model.gradient_checkpointing=true" in trained
    assert "policy.ranks=" in trained
    assert trained.endswith("which fits")
    assert "rollout holds a whole copy" in engine
    assert "756.0 GiB of weights alone" in engine
    assert "before ZeRO-3 divides them" in start


def test_8_billion_parameters_on_8_devices_fit() -> None:
    assert memory_problems(configure(policy=POLICY, rollout=ROLLOUT), MIDDLE, H200, "H200") == []


CASES: list[tuple[dict[str, Any], dict[str, Model]]] = [
    ({"policy": POLICY, "rollout": ROLLOUT}, LARGE),
    ({"policy": POLICY | {"zero_stage": 0}, "rollout": ROLLOUT}, MIDDLE),
    ({"policy": {"ranks": 1, "tokens_per_microbatch": 32768}, "rollout": ROLLOUT}, MIDDLE),
    ({"policy": POLICY, "rollout": ROLLOUT | {"kv_cache_gib": 110}, "placement": {"mode": "packed"}}, MIDDLE),
    ({"policy": {"tokens_per_microbatch": 262144}, "rollout": {"kv_cache_gib": 8}}, SMALL),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_remedies_are_settings_that_load_and_their_numbers_are_those_of_the_changed_run(case: int) -> None:
    sections, models = CASES[case]
    config = configure(**sections)
    crowded = next(load for load in loads_of(config, models, H200) if not load.fits)
    found = remedies(config, models, H200, crowded)
    assert found
    before = crowded.bytes
    for remedy in found:
        config = with_setting(config, remedy.setting)
        after = max(x.bytes for x in loads_of(config, models, H200) if set(x.tenants) & set(crowded.tenants))
        assert after == pytest.approx(remedy.bytes, rel=1e-6)
        assert after < before
        before = after
    assert found[-1].bytes <= crowded.capacity


def test_a_cache_too_small_for_one_sample_is_told_with_the_size_that_it_needs() -> None:
    config = configure(
        policy={"tokens_per_microbatch": 32768},
        rollout={"kv_cache_gib": 0.5, "max_model_len": 32768},
        model={"path": "any", "gradient_checkpointing": True},
    )
    [problem] = [p for p in memory_problems(config, MIDDLE, 10 * H200, "H200") if "kv_cache" in p]
    need = cache_bytes(config, MIDDLE)
    assert need == 36 * 2 * 8 * 128 * 2 * 32768
    assert f"{need / GIB:.3g} GiB" in problem


def test_a_load_fits_up_to_its_capacity() -> None:
    assert Load(("policy",), 1, 10, 10).fits
    assert not Load(("policy",), 1, 11, 10).fits
