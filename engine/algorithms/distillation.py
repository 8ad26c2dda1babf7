"""Distillation: how far the student's distribution of each next token is from the teacher's.

    hidden_T, weight ------------> chunk of student logits --+
                                                             +--> generalized_jsd --> [T]
    teacher_hidden_T, weight ----> chunk of teacher logits --+

Legend: T tokens, H hidden size (the teacher has its own), V vocabulary (one for both), C tokens of one chunk.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from engine.algorithms.logprobs import check_head, chunk_spans
from engine.algorithms.products import add_product, compute_dtype, matmul


def generalized_jsd(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, *, beta: float = 0.5, temperature: float = 1.0
) -> torch.Tensor:
    """[T] generalized Jensen-Shannon divergence of student and teacher (GKD, Agarwal et al. 2023, arXiv:2306.13649).

    With m = beta * teacher + (1 - beta) * student: beta * KL(teacher || m) + (1 - beta) * KL(student || m), in nats,
    at most the entropy of (beta, 1 - beta). The ends are defined apart: 0 is KL(teacher || student), 1 is
    KL(student || teacher). There is no factor temperature^2.

    Args:
        student_logits: [T, V] finite logits; only they receive a gradient.
        teacher_logits: [T, V] finite logits.
        beta: in [0, 1].
        temperature: divides both logits, above 0.

    Raises:
        ValueError: for beta or temperature out of range, or logits that are not [T, V] both.
    """
    _check_options(beta, temperature)
    if student_logits.shape != teacher_logits.shape or student_logits.dim() != 2:
        raise ValueError(
            f"logits [T, V] over one vocabulary are needed: student {list(student_logits.shape)}, "
            f"teacher {list(teacher_logits.shape)}"
        )
    student = torch.log_softmax(student_logits / temperature, -1)
    teacher = torch.log_softmax(teacher_logits.detach() / temperature, -1)
    if beta == 0:
        return _kl(teacher, student)
    if beta == 1:
        return _kl(student, teacher)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def chunked_generalized_jsd(
    hidden_T: torch.Tensor,
    weight: torch.Tensor,
    teacher_hidden_T: torch.Tensor,
    teacher_weight: torch.Tensor,
    *,
    beta: float,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
) -> torch.Tensor:
    """[T] `generalized_jsd` straight from hidden states, without the [T, V] matrices of logits.

    Logits exist for one chunk of tokens at a time and are recomputed in the backward pass, as in
    `engine.algorithms.logprobs.token_logprobs`, whose remarks on ZeRO, precision and autocast hold here too: one
    gradient each for `hidden_T` and `weight` per backward pass; computed in float32 (float64 if an input is float64).

    Args:
        hidden_T: [T, H] last hidden states of the student; T may be 0.
        weight: [V, H] output embeddings of the student.
        teacher_hidden_T: [T, H of the teacher]; without gradient, like teacher_weight.
        teacher_weight: [V, H of the teacher].
        beta: in [0, 1].
        temperature: divides both logits, above 0.
        chunk_tokens: C; the work memory is some ten times C * V numbers.

    Returns:
        [T] float32 or float64.

    Raises:
        ValueError: for sizes that do not fit together, beta or temperature out of range, or an empty chunk.
    """
    _check_options(beta, temperature)
    check_head(hidden_T, weight, chunk_tokens)
    check_head(teacher_hidden_T, teacher_weight, chunk_tokens)
    if len(hidden_T) != len(teacher_hidden_T) or len(weight) != len(teacher_weight):
        raise ValueError(
            "student and teacher need the same tokens and vocabulary: "
            f"{len(hidden_T)} and {len(teacher_hidden_T)} tokens, {len(weight)} and {len(teacher_weight)} entries"
        )
    return _ChunkedJSD.apply(hidden_T, weight, teacher_hidden_T, teacher_weight, beta, temperature, chunk_tokens)


class _ChunkedJSD(torch.autograd.Function):
    """The weights are read through `ctx.saved_tensors`, hence as they are at the time of the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_T: torch.Tensor,
        weight: torch.Tensor,
        teacher_hidden_T: torch.Tensor,
        teacher_weight: torch.Tensor,
        beta: float,
        temperature: float,
        chunk_tokens: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden_T, weight, teacher_hidden_T, teacher_weight)
        ctx.beta, ctx.temperature, ctx.chunk_tokens = beta, temperature, chunk_tokens
        dtype = compute_dtype(hidden_T, weight, teacher_hidden_T, teacher_weight)
        weight, teacher_weight = weight.to(dtype), teacher_weight.to(dtype)
        jsd_T = hidden_T.new_empty(len(hidden_T), dtype=dtype)
        with torch.autocast(hidden_T.device.type, enabled=False):
            for span in chunk_spans(len(hidden_T), chunk_tokens):
                student_CV = matmul(hidden_T[span].to(dtype), weight.T)
                teacher_CV = matmul(teacher_hidden_T[span].to(dtype), teacher_weight.T)
                jsd_T[span] = generalized_jsd(student_CV, teacher_CV, beta=beta, temperature=temperature)
        return jsd_T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_jsd_T: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_T, weight, teacher_hidden_T, teacher_weight = ctx.saved_tensors
        dtype = compute_dtype(hidden_T, weight, teacher_hidden_T, teacher_weight)
        wants_hidden, wants_weight, *_ = ctx.needs_input_grad
        grad_hidden_T = torch.empty_like(hidden_T) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if wants_weight else None
        whole_weight, whole_teacher_weight = weight.to(dtype), teacher_weight.to(dtype)
        with torch.autocast(hidden_T.device.type, enabled=False):
            for span in chunk_spans(len(hidden_T), ctx.chunk_tokens):
                hidden_C = hidden_T[span].to(dtype)
                student_CV = matmul(hidden_C, whole_weight.T).requires_grad_()
                teacher_CV = matmul(teacher_hidden_T[span].to(dtype), whole_teacher_weight.T)
                with torch.enable_grad():
                    jsd_C = generalized_jsd(student_CV, teacher_CV, beta=ctx.beta, temperature=ctx.temperature)
                (grad_CV,) = torch.autograd.grad(jsd_C, student_CV, grad_jsd_T[span])
                if grad_hidden_T is not None:
                    grad_hidden_T[span] = matmul(grad_CV, whole_weight).to(hidden_T.dtype)
                if grad_weight is not None:
                    add_product(grad_weight, grad_CV.T, hidden_C)
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden_T, grad_weight, None, None, None, None, None


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """[T] KL(p || q)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _check_options(beta: float, temperature: float) -> None:
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be in [0, 1], not {beta}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, not {temperature}")
