"""Models over packed samples: one row without padding, attention within each sample, and a head for what is asked.

Samples lie one after the other in a single row; `position_ids` restart with each, and the boundaries travel as the
`cu_seq_lens` arguments that flash attention takes. Where flash attention is not to be had (the CPU, or a GPU without
the package) `ragged_sdpa` reads the same arguments and attends sample by sample.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)
from transformers.masking_utils import AttentionMaskInterface

from engine.algorithms.distillation import chunked_generalized_jsd
from engine.algorithms.logprobs import token_logprobs
from engine.config import Config, UserError
from engine.data.batch import Batch

RAGGED_SDPA = "ragged_sdpa"


def ragged_sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor,
    scaling: float | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sample of a packed row: [1, heads, T, head_dim] -> [1, T, heads, head_dim].

    Raises:
        UserError: the model's attention has sinks or soft-capped scores, which this kernel does not compute.
    """
    if s_aux is not None or softcap is not None:
        raise UserError(
            f"model.path: the attention of {type(module).__name__} needs flash attention; use another model"
        )
    spans = torch.diff(cu_seq_lens_q).tolist()
    grouped = query.shape[1] != key.shape[1]
    outs = []
    for q, k, v in zip(query.split(spans, 2), key.split(spans, 2), value.split(spans, 2), strict=True):
        mask = _window_mask(q.shape[2], sliding_window, q.device)
        outs.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
            )
        )
    return torch.cat(outs, 2).transpose(1, 2).contiguous(), None


def _window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """[length, length] bool: each position sees itself and the `window - 1` before it; None where it sees all."""
    if window is None or length <= window:
        return None
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None]
    return (distance >= 0) & (distance < window)


AttentionInterface.register(RAGGED_SDPA, ragged_sdpa)
AttentionMaskInterface.register(RAGGED_SDPA, lambda *args, **kwargs: None)


def attention_for(device: str, flash_attention_installed: bool) -> str:
    """Name of the attention that a packed row needs on this device."""
    return "flash_attention_2" if device == "cuda" and flash_attention_installed else RAGGED_SDPA


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
    return without_dropout(model)


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, with every dropout switched off."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            vars(module)["attention_dropout"] = 0.0
    return model


@dataclass(frozen=True)
class PackedRow:
    """One micro-batch on its device. R = trained (response) tokens, T = all tokens."""

    tokens: torch.Tensor
    """[1, T] int64."""
    position_ids: torch.Tensor
    """[1, T] int64, from 0 in each sample."""
    cu_seq_lens: torch.Tensor
    """[B + 1] int32: where samples begin and end."""
    max_seq_len: int
    """Longest sample."""
    predictors: torch.Tensor
    """[R] int64: the position before each trained token."""
    targets: torch.Tensor
    """[R] int64: the trained tokens."""
    response_lens: torch.Tensor
    """[B] int64: trained tokens of each sample."""

    @staticmethod
    def of(batch: Batch, device: torch.device) -> PackedRow:
        """Pack a batch. An empty one becomes a single token without a target, so that every rank runs a pass."""
        if len(batch) == 0:
            tokens, seq_lens, trained_at = np.zeros(1, np.int64), np.ones(1, np.int64), np.zeros(0, np.int64)
        else:
            tokens, seq_lens = batch.tokens.astype(np.int64), batch.seq_lens.astype(np.int64)
            trained_at = np.flatnonzero(batch.loss_mask)
        ends = np.cumsum(seq_lens)
        positions = np.arange(len(tokens)) - np.repeat(ends - seq_lens, seq_lens)
        assert (positions[trained_at] > 0).all(), "the first token of a sample has no predictor and cannot be trained"

        def on_device(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        return PackedRow(
            tokens=on_device(tokens)[None],
            position_ids=on_device(positions)[None],
            cu_seq_lens=on_device(np.concatenate([[0], ends]).astype(np.int32)),
            max_seq_len=int(seq_lens.max()),
            predictors=on_device(trained_at - 1),
            targets=on_device(tokens[trained_at]),
            response_lens=on_device(batch.response_lens),
        )


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
        cu_seq_lens_q=row.cu_seq_lens,
        cu_seq_lens_k=row.cu_seq_lens,
        max_length_q=row.max_seq_len,
        max_length_k=row.max_seq_len,
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
        self.offset = 0 if before else 1

    def forward(self, row: PackedRow) -> torch.Tensor:
        """Returns scores [R, heads] in float32."""
        return self.packed.model.get_submodule("score")(self.packed(row)[row.predictors + self.offset]).float()


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
    return without_dropout(model)
