"""From one number per token to one number per sample, and to the scalar loss.

Legend: T tokens of all samples, one sample after the other; B samples; `seq_lens [B]` counts the tokens of each.
A sample may have no token at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

Lengths = torch.Tensor | np.ndarray | Sequence[int]
Mode = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
MODES = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")


def aggregate(
    per_token_T: torch.Tensor,
    seq_lens: Lengths,
    mode: Mode,
    *,
    max_len: int | None = None,
    total_tokens: float | None = None,
    total_sequences: float | None = None,
) -> torch.Tensor:
    """The scalar loss of per-token losses.

    A sample without a token counts in neither numerator nor denominator; a call without any token gives 0, still
    attached to the graph. With the global denominators given, the results of micro-batches add up to the result of
    the whole, however it was split.

    Args:
        per_token_T: [T] losses.
        seq_lens: [B] tokens of each sample.
        mode: "token-mean": every token weighs the same (DAPO, arXiv:2503.14476). "seq-mean-token-mean": the mean
            over samples of the mean over tokens (GRPO, arXiv:2402.03300). "seq-mean-token-sum": the mean over
            samples of the sum over tokens. "seq-mean-token-sum-norm": that, divided by `max_len` (Dr. GRPO,
            arXiv:2503.20783).
        max_len: the constant of "seq-mean-token-sum-norm", in tokens; unused elsewhere.
        total_tokens: denominator of "token-mean": tokens of all micro-batches on all ranks. None: those of this call.
        total_sequences: denominator of the other modes: samples with a token, likewise.

    Raises:
        ValueError: for an unknown mode, a missing `max_len`, a denominator that is not positive, or lengths that do
            not add up to T.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
    lens_B = checked_lens(seq_lens, per_token_T)
    if mode == "token-mean":
        return per_token_T.sum() / _denominator(total_tokens, len(per_token_T), "total_tokens")
    sequences = _denominator(total_sequences, int((lens_B > 0).sum()), "total_sequences")
    if mode == "seq-mean-token-mean":
        return (per_token_T / torch.repeat_interleave(lens_B, lens_B)).sum() / sequences
    if mode == "seq-mean-token-sum":
        return per_token_T.sum() / sequences
    if max_len is None or max_len <= 0:
        raise ValueError(f"mode {mode!r} divides by max_len, a positive number of tokens, not {max_len}")
    return per_token_T.sum() / sequences / max_len


def checked_lens(seq_lens: Lengths, x_T: torch.Tensor) -> torch.Tensor:
    """`seq_lens` as int64 [B] on the device of `x_T`.

    Raises:
        ValueError: if `x_T` is not flat, or the lengths are negative or do not add up to its size.
    """
    lens_B = as_lens(seq_lens)
    if x_T.dim() != 1 or int(lens_B.sum()) != len(x_T):
        raise ValueError(f"seq_lens must add up to the tokens: {lens_B.tolist()} for {list(x_T.shape)}")
    return lens_B.to(device=x_T.device)


def as_lens(seq_lens: Lengths) -> torch.Tensor:
    """`seq_lens` as int64 [B].

    Raises:
        ValueError: if a length is negative.
    """
    lens_B = seq_lens.long() if isinstance(seq_lens, torch.Tensor) else torch.tensor(seq_lens, dtype=torch.int64)
    if bool((lens_B < 0).any()):
        raise ValueError(f"seq_lens must be at least 0: {lens_B.tolist()}")
    return lens_B


def sum_per_sample(x_T: torch.Tensor, lens_B: torch.Tensor) -> torch.Tensor:
    """[B] sums over each sample's tokens, 0 for an empty one; the same bits on every call, also on a GPU."""
    return torch.segment_reduce(x_T.contiguous(), "sum", lengths=lens_B, initial=0, unsafe=True)  # lens are checked


def mean_per_sample(x_T: torch.Tensor, lens_B: torch.Tensor) -> torch.Tensor:
    """[B] means over each sample's tokens, 0 for an empty one."""
    return sum_per_sample(x_T, lens_B) / lens_B.clamp(min=1)


def _denominator(total: float | None, own: int, name: str) -> float:
    """The global count if given, else this call's own; 1 where both say that there is nothing to divide."""
    if total is None or (total == 0 and own == 0):
        return max(own, 1)
    if total <= 0:
        raise ValueError(f"{name} must be positive, not {total}: this call alone has {own}")
    return total
