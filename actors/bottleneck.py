"""Bottleneck adapters (Houlsby et al. 2019, arXiv:1902.00751), which peft does not have.

One small residual network after the feed-forward block of each layer (the placement of Pfeiffer et al. 2020,
arXiv:2005.00247); its last projection starts at zero, so the adapted model starts as the base model. A forward hook on
the block runs it, so that the base model's modules keep their names.

Saved like an adapter of peft: adapter_config.json (`peft_type: BOTTLENECK`) and adapter_model.safetensors, whose names
are those of the adapted model's parameters; `load_bottlenecks` reads them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from engine.config import UserError

FEED_FORWARD = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "fc2")
"""What transformers' models call the module that ends a layer's feed-forward block."""

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


class Bottleneck(nn.Module):
    """x + up(gelu(down(x))) for x [..., H]."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, width)
        self.up = nn.Linear(width, hidden_size)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.enabled = True

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of the same shape; what came in where the adapter is disabled."""
        return hidden + self.up(F.gelu(self.down(hidden))) if self.enabled else hidden


def add_bottlenecks(model: PreTrainedModel, width: int) -> list[Bottleneck]:
    """Freeze the model and give each of its layers a trainable bottleneck.

    Raises:
        UserError: the model's feed-forward blocks are not where they are looked for.
    """
    config = model.config.get_text_config()
    blocks = [module for name, module in model.named_modules() if _ends_a_feed_forward_block(name)]
    if len(blocks) != config.num_hidden_layers:
        raise UserError(
            f"model.adapter.kind: bottleneck finds {len(blocks)} feed-forward blocks in the {config.num_hidden_layers} "
            f"layers of {type(model).__name__}; use lora"
        )
    model.requires_grad_(False)
    bottlenecks = []
    for block in blocks:
        parameter = next(block.parameters())
        bottleneck = Bottleneck(config.hidden_size, width).to(device=parameter.device, dtype=model.dtype)
        block.add_module("bottleneck", bottleneck)
        block.register_forward_hook(_through_bottleneck)
        bottlenecks.append(bottleneck)
    return bottlenecks


def load_bottlenecks(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The same model with the saved bottlenecks (and the saved head, if one was trained) added, for inference.

    Raises:
        UserError: the folder holds another kind of adapter, or one of another model.
    """
    described = json.loads((folder / CONFIG_FILE).read_text())
    if described["peft_type"] != "BOTTLENECK":
        raise UserError(f"{folder}: holds {described['peft_type']}, not bottlenecks; load it with peft")
    add_bottlenecks(model, described["width"])
    weights = load_file(folder / WEIGHTS_FILE)
    wanted = {name for name in model.state_dict() if ".bottleneck." in name}
    try:
        unexpected = model.load_state_dict(weights, strict=False).unexpected_keys
    except RuntimeError as error:  # shapes differ
        raise UserError(f"{folder}: was trained on another model than {model.name_or_path}: {error}") from None
    wrong = set(unexpected) | (wanted - set(weights))
    if wrong:
        raise UserError(f"{folder}: was trained on another model than {model.name_or_path}: {min(wrong)}")
    return model.requires_grad_(False)


def describe_bottlenecks(model: PreTrainedModel, width: int, task: str) -> dict[str, Any]:
    """What adapter_config.json holds."""
    return {
        "peft_type": "BOTTLENECK",
        "task_type": task,
        "base_model_name_or_path": model.name_or_path,
        "width": width,
        "activation": "gelu",
        "placement": "after_feed_forward",
    }


def _ends_a_feed_forward_block(name: str) -> bool:
    """Whether a module is named `...<layer number>.<feed-forward>`."""
    *_, layer, last = ("", "", *name.split("."))
    return last in FEED_FORWARD and layer.isdigit()


def _through_bottleneck(block: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    """Forward hook: a mixture of experts may return its router's scores beside the hidden states."""
    bottleneck: Any = block.bottleneck
    if isinstance(output, tuple):
        return (bottleneck(output[0]), *output[1:])
    return bottleneck(output)
