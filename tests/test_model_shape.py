"""Parameters against published counts and real models, FLOPs against torch's counter, caches against transformers'."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from engine.config import UserError
from engine.model_shape import read_model_config, shape_of

LLAMA_405B = {
    "model_type": "llama",
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}

PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "Llama-3.1-405B": (405_853_388_800, LLAMA_405B),
    "Llama-3.1-8B": (
        8_030_261_248,
        LLAMA_405B
        | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    ),
    "Qwen2.5-0.5B": (
        494_032_768,
        {
            "model_type": "qwen2",
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
        },
    ),
    "Qwen3-8B": (
        8_190_735_360,
        {
            "model_type": "qwen3",
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
        },
    ),
    "Qwen3-30B-A3B": (
        30_532_122_624,
        {
            "model_type": "qwen3_moe",
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "vocab_size": 151936,
        },
    ),
    "Mistral-7B-v0.1": (7_241_732_096, {"model_type": "mistral"}),
    "gemma-2-2b": (2_614_341_888, {"model_type": "gemma2"}),
    "gemma-3-1b": (
        999_885_952,
        {
            "model_type": "gemma3_text",
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "num_hidden_layers": 26,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "vocab_size": 262144,
        },
    ),
    "gpt-neox-20b": (20_554_567_680, {"model_type": "gpt_neox"}),
}
"""Name on the Hub -> (parameters of its safetensors, configuration)."""

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 160,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
KINDS = ("llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "gemma2", "gemma3_text", "gpt_neox")


def small(kind: str, **changes: Any) -> Any:
    """A configuration of two narrow layers."""
    fields = SMALL | (MIXTURE if kind == "qwen3_moe" else {}) | changes
    known = AutoConfig.for_model(kind)
    return AutoConfig.for_model(kind, **{name: value for name, value in fields.items() if hasattr(known, name)})


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_models_parameters_are_those_that_are_published(name: str) -> None:
    parameters, fields = PUBLISHED[name]
    assert shape_of(fields).parameters == parameters


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_counted_once_whether_embeddings_are_tied_or_not(kind: str, tied: bool) -> None:
    config = small(kind, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config)
    shape = shape_of(config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.tied == tied
    assert shape.embedding == shape.head == model.get_output_embeddings().weight.numel()
    assert shape.body == sum(p.numel() for p in model.base_model.parameters())


def test_of_a_mixture_a_token_meets_the_chosen_experts_only() -> None:
    shape = shape_of(small("qwen3_moe"))
    assert shape.experts == 2 * 4 * 3 * 64 * 32  # layers, experts, matrices
    assert shape.active == shape.parameters - shape.experts // 2 - shape.embedding - shape.head
    assert shape.weights_met(1) == pytest.approx(shape.active + shape.head)
    assert shape.weights_met(1000) == pytest.approx(shape.parameters - shape.embedding)


def test_of_qwen3_30b_a3b_three_billion_parameters_are_active() -> None:
    shape = shape_of(PUBLISHED["Qwen3-30B-A3B"][1])
    assert shape.active + shape.embedding + shape.head == pytest.approx(3.3e9, rel=0.03)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_neox"])
def test_forward_flops_are_those_that_torch_counts(kind: str) -> None:
    config, tokens = small(kind), 48
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    shape = shape_of(config)
    expected = tokens * (shape.forward_flops(tokens) + shape.head_flops())
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.02)  # vectors count as weights that are met


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_neox"])
def test_the_cache_of_a_token_is_what_transformers_keeps(kind: str) -> None:
    config, cache = small(kind), DynamicCache()
    with torch.no_grad():
        AutoModelForCausalLM.from_config(config)(input_ids=torch.zeros(1, 5, dtype=torch.long), past_key_values=cache)
    kept = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert shape_of(config).cache_per_token * 5 == kept == shape_of(config).cache(5)


def test_a_layer_with_a_window_keeps_and_sees_no_more_than_that() -> None:
    kinds = ["sliding_attention", "full_attention"]
    shape = shape_of(small("gemma3_text", layer_types=kinds, sliding_window=8))
    one = shape.cache_per_token // 2
    assert shape.cache(5) == 2 * 5 * one
    assert shape.cache(100) == (8 + 100) * one
    wide = shape_of(small("gemma3_text", layer_types=["full_attention"] * 2))
    assert shape.forward_flops(100) < wide.forward_flops(100)
    assert shape.forward_flops(8) == wide.forward_flops(8)


def test_a_folder_without_a_readable_configuration_is_named(tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(UserError, match=rf"critic.path.*{tmp_path}"):
        read_model_config(str(tmp_path), key="critic.path")


def test_a_model_that_is_no_language_model_is_refused() -> None:
    with pytest.raises(UserError, match="cannot be built"):
        shape_of({"model_type": "vit"})
