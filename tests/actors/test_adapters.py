"""Every kind of adapter learns, leaves the frozen weights alone to the bit, and can be saved, merged, switched off."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

from actors.adapters import AdaptedModel, add_adapter, quantization_config
from actors.bottleneck import load_bottlenecks
from actors.packed_model import PackedLogProbs, PackedModel, packed_hidden_states
from actors.packed_row import PackedRow
from actors.ragged_attention import RAGGED_SDPA
from engine.config import AdapterConfig, UserError
from tests.cluster.conftest import random_batch

LORA = {"kind": "lora", "rank": 4, "alpha": 8}
MERGEABLE = {
    "lora": LORA,
    "rslora": LORA | {"rslora": True},
    "dora": LORA | {"dora": True},
    "some layers": LORA | {"targets": ["q_proj", "down_proj"]},
    "ia3": {"kind": "ia3"},
}
KINDS = MERGEABLE | {
    "bottleneck": {"kind": "bottleneck", "rank": 4},
    "prompt": {"kind": "prompt", "virtual_tokens": 3},
    "prefix": {"kind": "prefix", "virtual_tokens": 3},
}
SIZES = {
    # q 64x64, k and v 64x32, o 64x64, gate and up 64x128, down 128x64; two layers
    "lora": 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128)),
    "dora": 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128)) + 2 * (3 * 64 + 2 * 32 + 2 * 128),
    "some layers": 2 * 4 * ((64 + 64) + (64 + 128)),
    "ia3": 2 * (32 + 32 + 128),
    "bottleneck": 2 * (64 * 4 + 4 + 4 * 64 + 64),
    "prompt": 3 * 64,
    "prefix": 3 * 2 * 2 * 32,
}


def plain(path: Path, attention: str = "sdpa") -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation=attention).eval()


def adapt(path: Path, kind: str) -> AdaptedModel:
    torch.manual_seed(1)
    return add_adapter(plain(path, RAGGED_SDPA), AdapterConfig(**KINDS[kind]), task="CAUSAL_LM")


def packed_row(samples: int = 5) -> PackedRow:
    return PackedRow.of(random_batch(samples), torch.device("cpu"))


def log_probs(adapted: AdaptedModel) -> PackedLogProbs:
    return PackedLogProbs(PackedModel(adapted.model, adapted.hidden_states), temperature=1.0)


def score(adapted: AdaptedModel) -> torch.Tensor:
    with torch.inference_mode():
        return log_probs(adapted)(packed_row())[0].clone()


def score_plain(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return PackedLogProbs(PackedModel(model), temperature=1.0)(packed_row())[0]


def train(adapted: AdaptedModel, updates: int = 5) -> list[float]:
    module = log_probs(adapted).train()
    learning_rate = 0.1 if adapted.description()["peft_type"] == "IA3" else 0.01
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=learning_rate)
    losses = []
    for _ in range(updates):
        loss = -module(packed_row())[0].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    adapted.model.eval()
    return losses


def frozen_checksum(adapted: AdaptedModel) -> str:
    digest = hashlib.sha256()
    for parameter in adapted.model.parameters():
        if not parameter.requires_grad:
            digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def one_by_one(model: torch.nn.Module, row: PackedRow) -> torch.Tensor:
    """[T, H]: last hidden states of each sample alone, in transformers' own way."""
    samples = row.tokens[0].split(torch.diff(row.cu_seq_lens).tolist())
    with torch.no_grad():
        states = [model(sample[None], output_hidden_states=True).hidden_states[-1][0] for sample in samples]
    return torch.cat([hidden[-len(sample) :] for hidden, sample in zip(states, samples, strict=True)])


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_updates_lower_the_loss_and_leave_the_base_as_it_was(tiny_model, kind):
    adapted, base = adapt(tiny_model, kind), score_plain(plain(tiny_model, RAGGED_SDPA))
    before = frozen_checksum(adapted)
    losses = train(adapted)
    assert losses[-1] < losses[0] - 0.005, losses
    assert losses == sorted(losses, reverse=True)
    assert frozen_checksum(adapted) == before
    assert (score(adapted) - base).abs().max() > 1e-3, "the adapter does something"
    with adapted.disabled():
        assert torch.equal(score(adapted), base), "not even rounding differs"
    assert (score(adapted) - base).abs().max() > 1e-3, "and again afterwards"
    assert any(p.requires_grad for p in adapted.model.parameters()), "and can still be trained"


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "ia3", "bottleneck"])
def test_training_starts_from_the_base_model(tiny_model, kind):
    base = score_plain(plain(tiny_model, RAGGED_SDPA))
    torch.testing.assert_close(score(adapt(tiny_model, kind)), base, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", SIZES)
def test_only_the_adapter_is_trained(tiny_model, kind):
    base_size = sum(p.numel() for p in plain(tiny_model).parameters())
    assert adapt(tiny_model, kind).count_parameters() == (SIZES[kind], base_size + SIZES[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_adapter(tiny_model, kind):
    first, second = (dict(adapt(tiny_model, kind).adapter_weights()) for _ in range(2))
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", MERGEABLE)
def test_merged_weights_give_a_plain_model_what_the_adapter_gives(tiny_model, tmp_path, kind):
    adapted = adapt(tiny_model, kind)
    train(adapted)
    before = frozen_checksum(adapted)
    model = plain(tiny_model, RAGGED_SDPA)
    merged = {}
    for name, tensor in adapted.merged_weights():
        assert torch.is_grad_enabled(), "a generator must not switch gradients off for whoever reads it"
        merged[name] = tensor.clone()
    assert list(merged) == [name for name, _ in model.named_parameters()]
    assert frozen_checksum(adapted) == before
    model.load_state_dict(merged, strict=False)
    torch.testing.assert_close(score_plain(model), score(adapted), atol=1e-5, rtol=0)

    adapted.model.save_pretrained(tmp_path, state_dict=merged)
    torch.testing.assert_close(score_plain(plain(tmp_path, RAGGED_SDPA)), score(adapted), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_merging_knows_transposed_layers_and_biases(kind):
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=2)).eval()
    with torch.no_grad():
        for name, parameter in gpt2.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    twin = GPT2LMHeadModel(gpt2.config).eval()
    adapted = add_adapter(gpt2, AdapterConfig(**KINDS[kind]), task="CAUSAL_LM")
    with torch.no_grad():
        for parameter in gpt2.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.rand_like(parameter))
        twin.load_state_dict(dict(adapted.merged_weights()), strict=False)
        ids = torch.arange(20)[None]
        torch.testing.assert_close(twin(ids).logits, gpt2(ids).logits, atol=1e-5, rtol=1e-5)
        with adapted.disabled():
            assert (twin(ids).logits - gpt2(ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_gives_an_unpacked_model_the_same_states(tiny_model, tmp_path, kind):
    """For prompt and prefix tuning this is the proof that virtual tokens in a packed row are those of peft."""
    adapted = adapt(tiny_model, kind)
    train(adapted)
    adapted.save_adapter(tmp_path)
    if kind == "bottleneck":
        loaded = load_bottlenecks(plain(tiny_model), tmp_path)
    else:
        loaded = PeftModel.from_pretrained(plain(tiny_model), tmp_path).eval()
    row = packed_row(9)
    with torch.no_grad():
        states = adapted.hidden_states(row)
    torch.testing.assert_close(states, one_by_one(loaded, row), atol=2e-5, rtol=0)
    assert (states - one_by_one(plain(tiny_model), row)).abs().max() > 1e-3
    described = json.loads((tmp_path / "adapter_config.json").read_text())
    assert described == adapted.description()
    assert described["base_model_name_or_path"] == str(tiny_model)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_gradients_of_virtual_tokens_do_not_depend_on_packing(tiny_model, kind):
    adapted = adapt(tiny_model, kind)
    [trained] = [p for p in adapted.model.parameters() if p.requires_grad]
    batch = random_batch(4)

    def gradient(batches) -> torch.Tensor:
        trained.grad = None
        for part in batches:
            log_probs(adapted)(PackedRow.of(part, torch.device("cpu")))[0].sum().backward()
        return trained.grad.clone()

    together, apart = gradient([batch]), gradient([batch.select([i]) for i in range(4)])
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-4)
    assert (together.abs().sum(1) > 0).all(), "every virtual token learns"


def test_a_prefix_starts_as_the_keys_and_values_of_real_tokens(tiny_model):
    _, prefix = next(adapt(tiny_model, "prefix").adapter_weights())
    model = plain(tiny_model)
    values = prefix.view(3, 2, 2, 32)[:, 0, 1]  # virtual token, layer, keys or values: no position in the values
    embedded = model.model.layers[0].input_layernorm(model.get_input_embeddings().weight)
    possible = model.model.layers[0].self_attn.v_proj(embedded)
    assert (torch.cdist(values, possible).min(1).values < 1e-3).all()


def test_a_prefix_refuses_gradient_checkpointing_which_would_drop_it(tiny_model):
    adapted = adapt(tiny_model, "prefix")
    adapted.model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(UserError, match=r"model\.gradient_checkpointing"):
        adapted.hidden_states(packed_row())


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "bottleneck", "prompt"])
def test_gradient_checkpointing_changes_no_gradient(tiny_model, kind):
    gradients = []
    for checkpointing in (False, True):
        adapted = adapt(tiny_model, kind)
        if checkpointing:
            adapted.model.gradient_checkpointing_enable({"use_reentrant": False})
        log_probs(adapted).train()(packed_row())[0].sum().backward()
        gradients.append([p.grad for p in adapted.model.parameters() if p.requires_grad])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["lora", "ia3", "bottleneck", "prompt", "prefix"])
@pytest.mark.parametrize(
    ("loader", "task"),
    [(AutoModelForSequenceClassification, "SEQ_CLS"), (AutoModelForTokenClassification, "TOKEN_CLS")],
)
def test_the_head_of_a_reward_model_is_trained_and_saved_with_the_adapter(tiny_model, tmp_path, kind, loader, task):
    torch.manual_seed(2)
    adapted = add_adapter(
        loader.from_pretrained(tiny_model, num_labels=2, attn_implementation=RAGGED_SDPA),
        AdapterConfig(**KINDS[kind]),
        task=task,
    )
    optimizer = torch.optim.AdamW([p for p in adapted.model.parameters() if p.requires_grad], lr=1e-2)
    row = packed_row()
    losses = []
    for _ in range(3):
        loss = (adapted.model.score(adapted.hidden_states(row)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]

    adapted.save_adapter(tmp_path)
    torch.manual_seed(3)
    fresh = loader.from_pretrained(tiny_model, num_labels=2, attn_implementation=RAGGED_SDPA)
    if kind == "bottleneck":
        load_bottlenecks(fresh, tmp_path)
    else:
        PeftModel.from_pretrained(fresh, tmp_path)
    states = torch.randn(7, 64)
    with torch.no_grad():
        torch.testing.assert_close(fresh.score(states), adapted.model.score(states))
    if kind in ("lora", "ia3"):
        merged = dict(adapted.merged_weights())
        again = loader.from_pretrained(tiny_model, num_labels=2, attn_implementation=RAGGED_SDPA)
        assert list(merged) == [name for name, _ in again.named_parameters()]
        again.load_state_dict(merged)
        with torch.no_grad():
            scores = adapted.model.score(adapted.hidden_states(row))
            torch.testing.assert_close(again.score(packed_hidden_states(again, row)), scores, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["bottleneck", "prompt", "prefix"])
def test_what_cannot_be_merged_says_so(tiny_model, kind):
    with pytest.raises(ValueError, match="cannot be merged"):
        adapt(tiny_model, kind).merged_weights()


@pytest.mark.parametrize(
    ("kind", "target", "message"),
    [
        ("lora", "query", r"model\.adapter\.targets: LlamaForCausalLM has no layer query; it has .*q_proj"),
        ("ia3", "query", "has no layer query"),
        ("lora", "lm_head", "lm_head is an embedding"),
        ("ia3", "embed_tokens", "embed_tokens is an embedding"),
    ],
)
def test_targets_that_are_not_there_or_must_stay_frozen_are_refused(tiny_model, kind, target, message):
    config = AdapterConfig(kind=kind, targets=["q_proj", target])
    with pytest.raises(UserError, match=message):
        add_adapter(plain(tiny_model), config, task="CAUSAL_LM")


def test_ia3_scales_the_input_of_feed_forward_layers_that_were_named(tiny_model):
    config = AdapterConfig(kind="ia3", targets=["v_proj", "mlp.down_proj"])
    adapted = add_adapter(plain(tiny_model), config, task="CAUSAL_LM")
    shapes = {name.split(".")[-2]: tuple(t.shape) for name, t in adapted.adapter_weights()}
    assert shapes == {"v_proj": (32, 1), "down_proj": (1, 128)}


def test_an_architecture_that_peft_does_not_know_needs_targets_for_ia3(tiny_model):
    model = plain(tiny_model)
    model.config.model_type = "something_new"
    with pytest.raises(UserError, match=r"model\.adapter\.targets: .* something_new"):
        add_adapter(model, AdapterConfig(kind="ia3"), task="CAUSAL_LM")


def test_a_model_whose_feed_forward_blocks_are_not_found_gets_no_bottlenecks(tiny_model):
    model = plain(tiny_model)
    model.config.num_hidden_layers = 3
    with pytest.raises(UserError, match="finds 2 feed-forward blocks in the 3 layers"):
        add_adapter(model, AdapterConfig(kind="bottleneck"), task="CAUSAL_LM")


def test_bottlenecks_of_another_kind_or_another_model_are_refused(tiny_model, tmp_path):
    adapt(tiny_model, "lora").save_adapter(tmp_path / "lora")
    with pytest.raises(UserError, match="load it with peft"):
        load_bottlenecks(plain(tiny_model), tmp_path / "lora")
    adapt(tiny_model, "bottleneck").save_adapter(tmp_path / "bottleneck")
    config = plain(tiny_model).config
    config.num_hidden_layers = 3
    with pytest.raises(UserError, match="was trained on another model"):
        load_bottlenecks(AutoModelForCausalLM.from_config(config), tmp_path / "bottleneck")


def test_no_adapter_is_not_a_kind_of_adapter(tiny_model):
    with pytest.raises(ValueError, match="not an adapter"):
        add_adapter(plain(tiny_model), AdapterConfig(), task="CAUSAL_LM")


def test_four_bits_are_asked_for_only_when_wanted_and_only_where_bitsandbytes_is(monkeypatch):
    assert quantization_config(AdapterConfig(kind="lora")) is None
    wanted = AdapterConfig(kind="lora", four_bit=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs bitsandbytes"):
        quantization_config(wanted)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.49.0")
    config = quantization_config(wanted)
    assert (config.load_in_4bit, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert config.bnb_4bit_compute_dtype is torch.bfloat16
