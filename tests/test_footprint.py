"""Memory, item by item: ZeRO's arithmetic, adapters as peft makes them, who gets which items."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from actors.adapters import add_adapter
from engine.config import AdapterConfig, Config
from engine.footprint import GIB, Item, Model, RoleMemory, adapter_parameters, memory_of, zero_items
from engine.layout import roles_of
from engine.model_shape import shape_of
from tests.test_model_shape import small

BILLION = 10**9
MODEL = Model(shape_of(small("llama")), saved_per_token=1000)


def sizes(items: list[Item]) -> dict[str, int]:
    """Bytes by name."""
    return {item.name: item.bytes for item in items}


def zero(stage: int, ranks: int, *, trained: int = BILLION, size: int = 2) -> dict[str, int]:
    """What DeepSpeed keeps of a model that is trained whole."""
    return sizes(zero_items(trained=trained, frozen_bytes=0, size=size, stage=stage, ranks=ranks, gpu=True))


def configure(**sections: Any) -> Config:
    """A run whose models are stood for by sizes."""
    base: dict[str, Any] = {
        "device": "cuda",
        "model": {"path": "any"},
        "data": {"train": "rows.jsonl"},
        "rewards": {"functions": ["exact"]},
    }
    return Config.model_validate(base | sections)


def memory(config: Config, role: str, **models: Model) -> RoleMemory:
    """Of one role; other models than the first by key, with _ for a dot."""
    [found] = [r for r in roles_of(config) if r.name == role]
    named = {key.replace("__", "."): model for key, model in models.items()}
    return memory_of(config, found, {"model.path": MODEL} | named)


STATE = ("weights", "gradients", "float32 master weights", "optimizer moments")


def test_mixed_precision_adam_keeps_16_bytes_for_each_parameter() -> None:
    """arXiv:1910.02054, section 3.1."""
    assert sum(zero(0, 1)[name] for name in STATE) == 16 * BILLION


@pytest.mark.parametrize(("stage", "each"), [(0, 16), (1, 4 + 12 / 64), (2, 2 + 14 / 64), (3, 16 / 64)])
def test_zero_divides_state_then_gradients_then_weights_over_the_ranks(stage: int, each: float) -> None:
    """Figure 1 there, with 64 ranks: 16, 4.19, 2.22 and 0.25 bytes for each parameter (120, 31.4, 16.6, 1.9 GB)."""
    assert sum(zero(stage, 64)[name] for name in STATE) == pytest.approx(each * BILLION)


def test_float32_without_zero_has_no_second_copy_of_the_weights() -> None:
    assert zero(0, 1, size=4)["float32 master weights"] == 0
    assert sum(zero(0, 1, size=4)[name] for name in STATE) == 16 * BILLION


def test_zero_3_has_the_whole_weights_once_while_it_starts() -> None:
    assert zero(3, 8)["whole weights, before they are divided"] == 2 * BILLION
    assert zero(2, 8)["whole weights, before they are divided"] == 0


@given(
    trained=st.integers(1, 10**12),
    ranks=st.integers(1, 512),
    stage=st.sampled_from([1, 2, 3]),
    size=st.sampled_from([2, 4]),
)
def test_shards_hold_everything_and_more_ranks_never_hold_more(trained: int, ranks: int, stage: int, size: int) -> None:
    one, more = (zero(stage, n, trained=trained, size=size) for n in (ranks, ranks * 2))
    assert ranks * one["optimizer moments"] >= 8 * trained
    assert ranks * one["float32 master weights"] >= 4 * trained
    for name in STATE:
        assert more[name] <= one[name] <= zero(0, 1, trained=trained, size=2)[name] * 2
        assert one[name] >= 0


@given(trained=st.integers(1, 10**12), ranks=st.integers(1, 512), size=st.sampled_from([2, 4]))
def test_a_higher_stage_keeps_no_more_state(trained: int, ranks: int, size: int) -> None:
    kept = [sum(zero(stage, ranks, trained=trained, size=size)[name] for name in STATE) for stage in (1, 2, 3)]
    assert kept == sorted(kept, reverse=True)


def test_a_peak_is_what_is_always_held_and_the_larger_of_pass_and_update() -> None:
    items = (
        Item("a", 100),
        Item("b", 30, "pass"),
        Item("c", 5, "pass"),
        Item("d", 20, "step"),
        Item("e", 900, "start"),
    )
    found = RoleMemory("policy", 1, True, items)
    assert (found.peak, found.start) == (135, 900)


@pytest.mark.parametrize(
    "adapter",
    [
        {"kind": "lora", "rank": 4},
        {"kind": "lora", "rank": 8, "dora": True},
        {"kind": "lora", "rank": 4, "targets": ["q_proj", "down_proj"]},
        {"kind": "bottleneck", "rank": 8},
        {"kind": "prompt", "virtual_tokens": 6},
        {"kind": "prefix", "virtual_tokens": 6},
    ],
    ids=lambda adapter: "-".join(map(str, adapter.values())),
)
def test_an_adapter_has_as_many_parameters_as_the_one_that_is_trained(adapter: dict[str, Any]) -> None:
    config = AdapterConfig.model_validate(adapter)
    real = add_adapter(AutoModelForCausalLM.from_config(small("llama")), config, task="CAUSAL_LM")
    assert adapter_parameters(MODEL.shape, config) == real.count_parameters()[0]


def test_with_an_adapter_the_base_weights_have_neither_gradients_nor_moments() -> None:
    whole = sizes(list(memory(configure(), "policy").items))
    adapted = sizes(list(memory(configure(model={"path": "any", "adapter": {"kind": "lora"}}), "policy").items))
    added = adapter_parameters(MODEL.shape, AdapterConfig(kind="lora"))
    assert adapted["weights"] == whole["weights"] + 2 * added
    assert adapted["optimizer moments"] == 8 * added
    assert adapted["log-probs"] < whole["log-probs"]  # the output layer has no gradient


def test_four_bits_keep_about_a_quarter_of_the_linear_layers() -> None:
    lora = {"kind": "lora", "rank": 1}
    plain = memory(configure(model={"path": "any", "adapter": lora}), "policy")
    four = memory(configure(model={"path": "any", "adapter": lora | {"four_bit": True}}), "policy")
    linears = sum(linear.inputs * linear.outputs for linear in MODEL.shape.linears)
    saved = sizes(list(plain.items))["weights"] - sizes(list(four.items))["weights"]
    assert saved == pytest.approx(1.5 * linears, rel=0.02)


def test_checkpointing_keeps_the_inputs_of_the_layers_and_one_layers_activations() -> None:
    tokens = {"tokens_per_microbatch": 4096}
    model = {"path": "any", "gradient_checkpointing": True}
    assert sizes(list(memory(configure(policy=tokens), "policy").items))["activations"] == 1000 * 4096
    found = sizes(list(memory(configure(policy=tokens, model=model), "policy").items))
    assert found["inputs of the layers"] == 2 * 64 * 2 * 4096
    assert found["activations of one layer"] == 500 * 4096
    assert "activations" not in found


@pytest.mark.parametrize(("device", "chunks"), [("cuda", 2), ("cpu", 1)])
def test_log_probs_need_a_chunk_or_two_of_logits_however_long_the_micro_batch_is(device: str, chunks: int) -> None:
    def workspace(tokens: int) -> int:
        found = memory(
            configure(
                device=device, model={"path": "any", "dtype": "bfloat16"}, policy={"tokens_per_microbatch": tokens}
            ),
            "policy",
        )
        return sizes(list(found.items))["log-probs"] - tokens * 64 * 2

    assert workspace(8192) == workspace(4096)
    assert workspace(4096) == chunks * 1024 * 160 * 4 + 160 * 64 * (4 + 4 + 2)  # float32 weight, its gradient, the cast


def test_an_engine_holds_weights_and_the_cache_that_is_asked_for() -> None:
    found = sizes(list(memory(configure(rollout={"kv_cache_gib": 3}), "rollout").items))
    assert found["weights"] == 2 * MODEL.shape.parameters
    assert found["key-value cache"] == 3 * GIB


def test_a_critic_has_its_own_ranks_and_no_output_layer() -> None:
    config = configure(algorithm="ppo", critic={"ranks": 4}, policy={"zero_stage": 1, "ranks": 2})
    found = memory(config, "critic")
    assert found.ranks == 4
    assert sizes(list(found.items))["weights"] == 2 * (MODEL.shape.body + MODEL.shape.hidden)
    assert sizes(list(found.items))["optimizer moments"] == 2 * (MODEL.shape.body + MODEL.shape.hidden)
    assert "log-probs" not in sizes(list(found.items))


def test_frozen_models_have_weights_and_no_state() -> None:
    config = configure(algorithm={"name": "grpo", "kl_coef": 0.1}, rewards={"models": [{"path": "rm", "name": "rm"}]})
    other = Model(shape_of(small("llama", num_hidden_layers=1)), saved_per_token=500)
    for role, shape in (("reference", MODEL.shape.parameters), ("reward_model/rm", other.shape.body)):
        found = memory(config, role, rewards__models__0__path=other)
        assert sizes(list(found.items))["weights"] == 2 * shape
        assert not {"gradients", "optimizer moments"} & set(sizes(list(found.items)))


def test_a_teacher_sits_whole_beside_the_student_on_every_rank() -> None:
    teacher = Model(shape_of(small("llama", num_hidden_layers=4)), saved_per_token=2000)
    config = configure(stage="distill", distill={"teacher": "t"}, policy={"ranks": 4, "zero_stage": 3})
    found = sizes(list(memory(config, "policy", distill__teacher=teacher).items))
    assert found["teacher's weights"] == 2 * teacher.shape.parameters
