"""Arithmetic of a decoder-only transformer with a gated feed-forward part, counted from its configuration.

A multiply and an add are two. Per token and weight of a matrix: 2 forward, 4 backward. What is not counted: norms,
activations, softmax, sampling, the optimizer, and whatever is computed a second time unless it is named.

    body        2 * P per token, P the weights of the layers' matrices (embeddings look up, and cost nothing)
    output      2 * V * H per token whose distribution is needed: trained (response) or generated tokens alone
    attention   2 * 2 * n * A per token with n before it, A = heads * head size, for scores and for the weighted sum
    training    3 times these; `recompute`: the output layer once more, where its logits are not kept for the backward
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Shape:
    """What counts of a model."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @staticmethod
    def of(model: str | Path) -> Shape:
        """From the folder's config.json."""
        raw = json.loads((Path(model) / "config.json").read_text())
        heads = raw["num_attention_heads"]
        return Shape(
            layers=raw["num_hidden_layers"],
            hidden=raw["hidden_size"],
            intermediate=raw["intermediate_size"],
            heads=heads,
            kv_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            vocabulary=raw["vocab_size"],
        )

    @property
    def body(self) -> int:
        """P: weights of the layers' matrices."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def output(self) -> int:
        """Weights of the output layer."""
        return self.vocabulary * self.hidden

    def attention(self, first: float, last: float) -> float:
        """One sequence's tokens at positions [first, last), each of which sees those before it and itself."""
        seen = (last * (last + 1) - first * (first + 1)) / 2
        return 4 * seen * self.heads * self.head_dim * self.layers


@dataclass(frozen=True)
class Training:
    """FLOPs of one update."""

    useful: float
    """What any implementation has to do."""
    recompute: float


def forward(shape: Shape, *, prompts: float, prompt_len: float, samples: float, response_len: float) -> float:
    """Each prompt once, however many samples share it, then the responses: read or generated, all equally long."""
    computed = prompts * prompt_len + samples * response_len
    attention = prompts * shape.attention(0, prompt_len)
    attention += samples * shape.attention(prompt_len, prompt_len + response_len)
    return 2 * shape.body * computed + 2 * shape.output * samples * response_len + attention


def training(shape: Shape, *, prompts: float, prompt_len: float, samples: float, response_len: float) -> Training:
    """An update on the responses, of which every token has a loss."""
    once = forward(shape, prompts=prompts, prompt_len=prompt_len, samples=samples, response_len=response_len)
    return Training(3 * once, 2 * shape.output * samples * response_len)
