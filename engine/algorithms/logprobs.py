"""What the output layer says of given tokens, straight from hidden states, without the [T, V] matrix of logits.

Legend: T tokens, H hidden size, V vocabulary, C tokens of one chunk, R of one piece of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from engine.algorithms.products import add_product, compute_dtype, factor_dtype, product

NUMBERS_IN_CACHE = 2**19
"""What a CPU core takes of a chunk's logits at a time, so that several passes over them read memory once."""


def token_logprobs(
    hidden_T: torch.Tensor,
    weight: torch.Tensor,
    targets_T: torch.Tensor,
    *,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of each target under softmax(hidden @ weight.T / temperature), and the entropy of that distribution.

    Logits exist for one chunk of tokens at a time and are recomputed in the backward pass: the idea of gradient
    checkpointing (Chen et al. 2016, arXiv:1604.06174), applied to the loss layer as in arXiv:2411.09009. Each of
    `hidden_T` and `weight` receives one gradient per backward pass, however many chunks there are, as ZeRO demands.
    Everything is computed in float32 (float64 if an input is float64), also under autocast; 16-bit factors on a GPU are
    multiplied as they are and summed in float32, where its tensor cores do so (`factor_dtype`).

    Call it inside the forward of the module that owns `weight`: a parameter that ZeRO-3 has sharded is whole only
    during that module's forward and backward.

    Args:
        hidden_T: [T, H] last hidden states; T may be 0.
        weight: [V, H] output embeddings.
        targets_T: [T] int64 token ids.
        temperature: the sampling temperature, above 0.
        chunk_tokens: C; the work memory is about C * V numbers, on a GPU 2 * C * V.

    Returns:
        (logp_T, entropy_T), float32 or float64, the entropy in nats. Both carry a gradient; that of the entropy is
        computed only if the loss uses it.

    Raises:
        ValueError: for sizes that do not fit together, a temperature that is not positive, or an empty chunk.
    """
    check_head(hidden_T, weight, chunk_tokens)
    _check_targets(hidden_T, targets_T)
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}: at 0 there is no distribution")
    return _TokenLogprobs.apply(hidden_T, weight, targets_T, temperature, chunk_tokens)


@torch.no_grad()
def greedy_hits(
    hidden_T: torch.Tensor, weight: torch.Tensor, targets_T: torch.Tensor, *, chunk_tokens: int = 1024
) -> torch.Tensor:
    """[T] bool: whether each target is the token that greedy decoding would take (accuracy under teacher forcing).

    Of equal logits the first in the vocabulary counts. Logits exist for one chunk of tokens at a time, in the
    precision of `token_logprobs`, and nothing carries a gradient.

    Args:
        hidden_T: [T, H] last hidden states; T may be 0.
        weight: [V, H] output embeddings.
        targets_T: [T] int64 token ids.
        chunk_tokens: C; the work memory is about C * V numbers.

    Raises:
        ValueError: for sizes that do not fit together, or an empty chunk.
    """
    check_head(hidden_T, weight, chunk_tokens)
    _check_targets(hidden_T, targets_T)
    dtype, factor = compute_dtype(hidden_T, weight), factor_dtype(hidden_T, weight)
    weight = weight.to(factor)
    hits_T = torch.empty_like(targets_T, dtype=torch.bool)
    with torch.autocast(hidden_T.device.type, enabled=False):
        for span in chunk_spans(len(hidden_T), chunk_tokens):
            hits_T[span] = product(hidden_T[span].to(factor), weight.T, dtype).argmax(1) == targets_T[span]
    return hits_T


class _TokenLogprobs(torch.autograd.Function):
    """The weight is read through `ctx.saved_tensors`, hence as it is (gathered) at the time of the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_T: torch.Tensor,
        weight: torch.Tensor,
        targets_T: torch.Tensor,
        temperature: float,
        chunk_tokens: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.temperature, ctx.chunk_tokens = temperature, chunk_tokens
        ctx.set_materialize_grads(False)
        dtype, factor = compute_dtype(hidden_T, weight), factor_dtype(hidden_T, weight)
        whole_weight = weight.to(factor)
        logp_T = hidden_T.new_empty(len(hidden_T), dtype=dtype)
        entropy_T = torch.empty_like(logp_T)
        with torch.autocast(hidden_T.device.type, enabled=False):
            for span in chunk_spans(len(hidden_T), chunk_tokens):
                logits_CV = product(hidden_T[span].to(factor), whole_weight.T, dtype)
                targets_C1, logp_C, entropy_C = targets_T[span, None], logp_T[span], entropy_T[span]
                for rows in _pieces(logits_CV):
                    work_RV = logits_CV[rows]
                    logp_RV = torch.log_softmax(work_RV.div_(temperature), dim=1)
                    logp_C[rows] = logp_RV.gather(1, targets_C1[rows])[:, 0]
                    entropy_C[rows] = -torch.exp(logp_RV, out=work_RV).mul_(logp_RV).sum(1)
        ctx.save_for_backward(hidden_T, weight, targets_T, entropy_T)
        return logp_T, entropy_T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_logp_T: torch.Tensor | None, grad_entropy_T: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None]:
        hidden_T, weight, targets_T, entropy_T = ctx.saved_tensors
        if grad_logp_T is None:
            grad_logp_T = torch.zeros_like(entropy_T)
        dtype, factor = compute_dtype(hidden_T, weight), factor_dtype(hidden_T, weight)
        wants_hidden, wants_weight, *_ = ctx.needs_input_grad
        grad_hidden_T = torch.empty_like(hidden_T) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if wants_weight else None
        whole_weight = weight.to(factor)
        with torch.autocast(hidden_T.device.type, enabled=False):
            for span in chunk_spans(len(hidden_T), ctx.chunk_tokens):
                hidden_C = hidden_T[span].to(factor)
                logits_CV = product(hidden_C, whole_weight.T, dtype)
                targets_C1, entropy_C1 = targets_T[span, None], entropy_T[span, None]
                scale_C1 = grad_logp_T[span, None] / ctx.temperature
                bonus_C1 = None if grad_entropy_T is None else grad_entropy_T[span, None] / ctx.temperature
                for rows in _pieces(logits_CV):
                    work_RV = logits_CV[rows]
                    logp_RV = torch.log_softmax(work_RV.div_(ctx.temperature), dim=1)
                    torch.exp(logp_RV, out=work_RV)
                    # With p the softmax: d logp(target) / d logits = onehot(target) - p
                    if bonus_C1 is None:
                        work_RV.mul_(-scale_C1[rows])
                    else:  # d entropy / d logits = -p (log p + entropy)
                        logp_RV.add_(entropy_C1[rows]).mul_(bonus_C1[rows]).add_(scale_C1[rows])
                        work_RV.mul_(logp_RV.neg_())
                    work_RV.scatter_add_(1, targets_C1[rows], scale_C1[rows])
                grad_CV = logits_CV.to(factor)
                if grad_hidden_T is not None:
                    grad_hidden_T[span] = product(grad_CV, whole_weight, dtype).to(hidden_T.dtype)
                if grad_weight is not None:
                    add_product(grad_weight, grad_CV.T, hidden_C)
        return grad_hidden_T, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _pieces(chunk_CV: torch.Tensor) -> Iterator[slice]:
    """Rows of a chunk that fit into a CPU's cache together; on a GPU all at once."""
    tokens, vocabulary = chunk_CV.shape
    in_cache = NUMBERS_IN_CACHE * torch.get_num_threads() // vocabulary
    return chunk_spans(tokens, max(1, in_cache) if chunk_CV.device.type == "cpu" else tokens)


def chunk_spans(tokens: int, chunk_tokens: int) -> Iterator[slice]:
    """The slices of at most `chunk_tokens` tokens that make up the whole."""
    return (slice(start, start + chunk_tokens) for start in range(0, tokens, chunk_tokens))


def check_head(hidden_T: torch.Tensor, weight: torch.Tensor, chunk_tokens: int) -> None:
    """Refuses what no output layer can be applied to.

    Raises:
        ValueError: if hidden [T, H] and weight [V, H] do not fit together, or a chunk would be empty.
    """
    if hidden_T.dim() != 2 or weight.dim() != 2 or hidden_T.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden [T, H] and weight [V, H] are needed: {list(hidden_T.shape)}, {list(weight.shape)}")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, not {chunk_tokens}")


def _check_targets(hidden_T: torch.Tensor, targets_T: torch.Tensor) -> None:
    if targets_T.shape != hidden_T.shape[:1]:
        raise ValueError(f"one target per token is needed: {list(targets_T.shape)} for {len(hidden_T)} tokens")
