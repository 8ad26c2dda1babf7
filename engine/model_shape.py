"""The sizes of a model that memory and time follow from, read off its configuration: no weights are needed.

Parameters are counted on the model itself, built on torch's `meta` device (shapes without memory), so they are exact
for every architecture that transformers knows; what a token costs follows from formulas.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from engine.config import UserError


@dataclass(frozen=True)
class Attention:
    """One layer's attention."""

    width: int
    """Query heads times (size of a query + size of a value): what a pair of tokens costs."""
    cache: int
    """Numbers that a token leaves in the key-value cache."""
    window: int | None
    """Tokens back that it sees; None is all."""

    def seen(self, context: float) -> float:
        """Tokens that are looked at from behind a context of so many."""
        return context if self.window is None else min(context, self.window)


@dataclass(frozen=True)
class Linear:
    """A linear layer inside the decoder, where an adapter may sit."""

    name: str
    inputs: int
    outputs: int


@dataclass(frozen=True)
class ModelShape:
    """A language model's sizes. Parameters are numbers, not bytes."""

    kind: str
    """`model_type` of the configuration."""
    parameters: int
    """All, tied ones once."""
    active: int
    """Those that one token is multiplied with: of a mixture's experts the chosen ones, no input embedding and no
    output layer."""
    embedding: int
    """The input embedding's."""
    head: int
    """The output layer's, vocabulary times hidden size, whether tied to the input embedding or not."""
    tied: bool
    """Whether the two are one."""
    experts: int
    """Those inside experts; 0 in a dense model."""
    experts_share: float
    """Part of the experts that one token uses."""
    layers: tuple[Attention, ...]
    """Decoder layers, those without attention left out."""
    depth: int
    """Decoder layers."""
    hidden: int
    """Width between layers."""
    vocabulary: int
    """Rows of the output layer."""
    linears: tuple[Linear, ...]
    """Linear layers, the output layer left out."""
    after_head: tuple[str, ...]
    """What changes the logits after the output layer's product; trainers refuse such a model."""

    @property
    def body(self) -> int:
        """Parameters without the output layer, where that is one of its own: what critics and reward models have."""
        return self.parameters - (0 if self.tied else self.head)

    @property
    def cache_per_token(self) -> int:
        """Numbers that a token leaves in the key-value caches of all layers; times 2 are bytes in bfloat16."""
        return sum(layer.cache for layer in self.layers)

    def cache(self, context: int) -> int:
        """Numbers that a sample of so many tokens keeps: a layer with a window keeps no more than that."""
        return sum(layer.cache * int(layer.seen(context)) for layer in self.layers)

    def forward_flops(self, context: float) -> float:
        """Of one token behind a context of so many, without the output layer: 2 for each weight that it meets
        (Kaplan et al. 2020, arXiv:2001.08361), and 2 for each query-key and score-value product."""
        return 2.0 * self.active + sum(2.0 * layer.width * layer.seen(context) for layer in self.layers)

    def head_flops(self) -> float:
        """Of the output layer, for one token."""
        return 2.0 * self.head

    def weights_met(self, samples: int) -> float:
        """Parameters that one decoding step of so many samples reads: expected, with experts chosen at random."""
        untouched = (1.0 - self.experts_share) ** samples if self.experts else 0.0
        dense = self.parameters - self.experts - (0 if self.tied else self.embedding)
        return dense + self.experts * (1.0 - untouched)


def read_model_config(path: str, *, trust_remote_code: bool = False, key: str = "model.path") -> PreTrainedConfig:
    """The configuration in a model's folder, or of a Hub name.

    Raises:
        UserError: there is none, or transformers does not know the architecture.
    """
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises a dozen kinds here
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        what = f"{Path(path) / 'config.json'}" if Path(path).is_dir() else path
        raise UserError(f"{key}: no model configuration could be read from {what}: {why}") from None


def empty_model(
    config: PreTrainedConfig | Mapping[str, Any], *, dtype: torch.dtype = torch.bfloat16, **arguments: Any
) -> PreTrainedModel:
    """The causal language model on the meta device.

    Args:
        config: a transformers configuration, or its fields with `model_type` among them.
        dtype: of the parameters.
        arguments: further ones for `from_config`.

    Raises:
        UserError: transformers has no such causal language model.
    """
    try:
        if isinstance(config, Mapping):
            fields = dict(config)
            config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, **arguments)
    except Exception as error:  # transformers raises a dozen kinds here
        raise UserError(f"the model cannot be built from its configuration: {' '.join(str(error).split())}") from None


def shape_of(config: PreTrainedConfig | Mapping[str, Any], *, trust_remote_code: bool = False) -> ModelShape:
    """The sizes of a model; under a second, also for hundreds of billions of parameters.

    Raises:
        UserError: transformers has no such causal language model.
    """
    model = empty_model(config, trust_remote_code=trust_remote_code)
    text = model.config.get_text_config()
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    share = _experts_share(text) if experts else 1.0
    parameters = sum(sizes.values())
    tied = head is not None and head.weight is embedding.weight
    head_size = head.weight.numel() if head is not None else 0
    looked_up = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding) and m is not embedding)
    dense = parameters - experts - looked_up - embedding.weight.numel() - (0 if tied else head_size)
    linears = ((n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head)
    return ModelShape(
        kind=text.model_type,
        parameters=parameters,
        active=dense + round(experts * share),
        embedding=embedding.weight.numel(),
        head=head_size,
        tied=tied,
        experts=experts,
        experts_share=share,
        layers=_attention_layers(text),
        depth=text.num_hidden_layers,
        hidden=text.hidden_size,
        vocabulary=head.weight.shape[0] if head is not None else text.vocab_size,
        linears=tuple(Linear(name, m.in_features, m.out_features) for name, m in linears),
        after_head=_after_head(model, head),
    )


def _after_head(model: PreTrainedModel, head: Any) -> tuple[str, ...]:
    """As `actors.packed_model.load_language_model` looks for it."""
    scaled = [n for n in ("final_logit_softcapping", "logit_scale", "logits_scaling") if getattr(model.config, n, None)]
    return (*scaled, *(["a bias"] if getattr(head, "bias", None) is not None else []))


def _experts_share(config: Any) -> float:
    """Part of a mixture's experts that each token uses; configurations name the two numbers differently."""
    totals = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    chosen = ("num_experts_per_tok", "top_k_experts", "moe_top_k", "moe_k", "num_experts_per_token")
    total = next((getattr(config, name) for name in totals if getattr(config, name, None)), None)
    used = next((getattr(config, name) for name in chosen if getattr(config, name, None)), None)
    if total is None or used is None:
        raise UserError(f"the configuration of {config.model_type} does not say how many experts a token uses")
    return used / total


def _attention_layers(config: Any) -> tuple[Attention, ...]:
    """Each layer's attention, by the fields that transformers' configurations share."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    width = heads * 2 * size
    cache = 2 * size * (getattr(config, "num_key_value_heads", None) or heads)
    if getattr(config, "kv_lora_rank", None):  # latent attention (arXiv:2405.04434) keeps one vector for all heads
        query = config.qk_nope_head_dim + config.qk_rope_head_dim
        width, cache = heads * (query + config.v_head_dim), config.kv_lora_rank + config.qk_rope_head_dim
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    seeing = [kind for kind in kinds if "linear" not in kind and kind not in ("mamba", "conv", "recurrent")]
    return tuple(Attention(width, cache, None if kind == "full_attention" else window) for kind in seeing)
