"""Models over packed rows (actors/packed_row.py), with a head for what is asked."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from actors.packed_row import PackedRow
from actors.ragged_attention import attention_for
from engine.algorithms.distillation import chunked_generalized_jsd
from engine.algorithms.logprobs import token_logprobs
from engine.algorithms.products import linear, onednn_is_faster
from engine.config import Config, UserError


def model_arguments(config: Config) -> dict[str, Any]:
    """Arguments with which every model of a run is loaded."""
    return {
        "dtype": getattr(torch, config.dtype),
        "trust_remote_code": config.model.trust_remote_code,
        "attn_implementation": attention_for(config.device, importlib.util.find_spec("flash_attn") is not None),
    }


def load_language_model(config: Config, *, path: str | None = None, quantization: Any = None) -> PreTrainedModel:
    """The starting model (or the one at `path`) on the host, without dropout; random weights if its folder has none.

    `quantization` is a transformers quantization configuration for the frozen weights below an adapter.

    Raises:
        UserError: its output layer is not a plain projection, so log-probs would be wrong.
    """
    arguments = model_arguments(config)
    if path is None and config.model.new is not None:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config.model.path), **arguments)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            path or config.model.path, quantization_config=quantization, **arguments
        )
    head = model.get_output_embeddings()
    scaled = [n for n in ("final_logit_softcapping", "logit_scale", "logits_scaling") if getattr(model.config, n, None)]
    if getattr(head, "bias", None) is not None or scaled:
        raise UserError(
            f"model.path: {path or config.model.path} changes its logits after the projection "
            f"({', '.join(scaled) or 'a bias'}), which the chunked log-probs do not compute; use another model"
        )
    return prepared(model, config.device)


class FastLinear(nn.Linear):
    """A linear layer of a CPU on which torch does not take the fastest library of its own accord."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N]."""
        return linear(x, self.weight, self.bias)


def prepared(model: PreTrainedModel, device: str) -> PreTrainedModel:
    """The same model, with every dropout switched off and, on the CPU, its products by the faster library."""
    for module in model.modules():
        if type(module) is nn.Linear and device == "cpu" and onednn_is_faster():
            module.__class__ = FastLinear
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            vars(module)["attention_dropout"] = 0.0
    return model


class PackedModel(nn.Module):
    """The body of a model over a packed row."""

    def __init__(
        self, model: PreTrainedModel, hidden_states: Callable[[PackedRow], torch.Tensor] | None = None
    ) -> None:
        """An adapter brings its own way to the `hidden_states`."""
        super().__init__()
        self.model = model
        self._hidden_states = hidden_states or partial(packed_hidden_states, model)

    def forward(self, row: PackedRow) -> torch.Tensor:
        """Last hidden states [T, H]."""
        return self._hidden_states(row)


def packed_hidden_states(model: PreTrainedModel, row: PackedRow) -> torch.Tensor:
    """Last hidden states [T, H] of a packed row."""
    return model.base_model(
        input_ids=row.tokens,
        position_ids=row.position_ids,
        attention_mask=None,
        use_cache=False,
        **row.attention_arguments(),
    ).last_hidden_state[0]


class PackedLogProbs(nn.Module):
    """Log-probability and entropy of each trained token, from hidden states, at a temperature."""

    def __init__(self, packed: PackedModel, *, temperature: float) -> None:
        super().__init__()
        self.packed = packed
        self.head = LogProbHead(packed.model.get_output_embeddings().weight, temperature=temperature)

    def forward(self, row: PackedRow) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (logp [R], entropy [R]) in float32."""
        return self.head(self.packed(row)[row.predictors], row.targets)


class LogProbHead(nn.Module):
    """The output embedding as a module of its own, so that ZeRO-3 gathers it for this use."""

    def __init__(self, weight: nn.Parameter, *, temperature: float) -> None:
        super().__init__()
        self.weight = weight
        self.temperature = temperature

    def forward(self, hidden_T: torch.Tensor, targets_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden [R, H], targets [R] -> (logp [R], entropy [R])."""
        return token_logprobs(hidden_T, self.weight, targets_T, temperature=self.temperature)


class PackedDivergence(nn.Module):
    """How far each trained token's distribution is from a frozen teacher's of the same vocabulary."""

    def __init__(self, packed: PackedModel, teacher: PreTrainedModel, *, beta: float, temperature: float) -> None:
        super().__init__()
        self.packed = packed
        self.head = DivergenceHead(packed.model.get_output_embeddings().weight, beta=beta, temperature=temperature)
        self._teacher = [teacher.requires_grad_(False).eval()]  # in a list: no parameter of this module's own

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedDivergence:
        """Moves the teacher along to other devices and types."""
        self._teacher[0]._apply(fn)
        return super()._apply(fn, recurse)

    def forward(self, row: PackedRow) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (generalized Jensen-Shannon divergence [R], the student's entropy [R], without gradient)."""
        [teacher] = self._teacher
        with torch.no_grad():
            teacher_hidden_T = packed_hidden_states(teacher, row)[row.predictors]
        hidden_T = self.packed(row)[row.predictors]
        return self.head(hidden_T, row.targets, teacher_hidden_T, teacher.get_output_embeddings().weight)


class DivergenceHead(nn.Module):
    """The student's output embedding as a module of its own, so that ZeRO-3 gathers it for this use."""

    def __init__(self, weight: nn.Parameter, *, beta: float, temperature: float) -> None:
        super().__init__()
        self.weight = weight
        self.beta, self.temperature = beta, temperature

    def forward(
        self,
        hidden_T: torch.Tensor,
        targets_T: torch.Tensor,
        teacher_hidden_T: torch.Tensor,
        teacher_weight: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [R, H] of both -> (divergence [R], entropy [R]). Rows that pad one embedding are left out."""
        rows = min(len(self.weight), len(teacher_weight))
        divergence_T = chunked_generalized_jsd(
            hidden_T,
            self.weight[:rows],
            teacher_hidden_T,
            teacher_weight[:rows],
            beta=self.beta,
            temperature=self.temperature,
        )
        with torch.no_grad():
            _, entropy_T = token_logprobs(hidden_T, self.weight, targets_T, temperature=self.temperature)
        return divergence_T, entropy_T


class PackedScores(nn.Module):
    """One score per head for each marked token: the last of a response, or the last of each step."""

    def __init__(self, packed: PackedModel, *, before: bool = False) -> None:
        """`before` scores what lies before each marked token: the value of the state in which it was chosen."""
        super().__init__()
        self.packed = packed
        self.before = before

    def forward(self, row: PackedRow) -> torch.Tensor:
        """Returns scores [R, heads] in float32."""
        scored = row.predictors if self.before else row.trained_at
        return self.packed.model.get_submodule("score")(self.packed(row)[scored]).float()


def load_scoring_model(config: Config, path: str, *, per_token: bool, heads: int | None) -> PreTrainedModel:
    """A model whose `score` layer maps hidden states to `heads` numbers (None: as many as its folder says).

    Raises:
        UserError: transformers has no such model for this architecture.
    """
    loader = AutoModelForTokenClassification if per_token else AutoModelForSequenceClassification
    arguments = model_arguments(config) | ({"num_labels": heads} if heads is not None else {})
    try:
        model = loader.from_pretrained(path, **arguments)
    except ValueError as error:
        raise UserError(f"model.path: {path} cannot carry a reward or value head: {error}") from None
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise UserError(
            f"model.path: {type(model).__name__} does not score with one linear layer over hidden states; use another "
            "model"
        )
    return prepared(model, config.device)
