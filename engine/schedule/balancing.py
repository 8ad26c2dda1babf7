"""Splits ragged samples over data-parallel ranks and packs each rank's share into token-budgeted micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapreplace


def cost_of(tokens: int, hidden_size: int, seen: int = 0) -> int:
    """What `tokens` tokens cost that see each other and `seen` earlier ones: linear layers and attention, to scale."""
    return tokens * (6 * hidden_size + tokens + 2 * seen)


def plan_microbatches(
    seq_lens: Sequence[int], *, ranks: int, token_budget: int, costs: Sequence[int] | None = None
) -> list[list[list[int]]]:
    """Which samples each rank runs together: `plan[rank][micro_batch]` is a list of sample positions.

    Balanced by cost (`cost_of`), not by count; by tokens where no costs are given. Every rank gets the same number of
    micro-batches, since collectives inside a forward pass (ZeRO-3) need all ranks; a rank with fewer gets empty ones at
    its end. No micro-batch exceeds the budget.

    Raises:
        ValueError: a sample alone exceeds the budget.
    """
    longest = max(seq_lens, default=0)
    if longest > token_budget:
        raise ValueError(f"a sample of {longest} tokens exceeds the budget of {token_budget} tokens per micro-batch")
    costs = seq_lens if costs is None else costs
    by_length = sorted(range(len(seq_lens)), key=lambda i: (-seq_lens[i], i))
    shares: list[list[int]] = [[] for _ in range(ranks)]
    least = [(0, rank) for rank in range(ranks)]  # a heap of (cost, rank)
    for sample in by_length:
        cost, rank = least[0]
        shares[rank].append(sample)
        heapreplace(least, (cost + costs[sample], rank))
    plan = [_pack(share, seq_lens, token_budget) for share in shares]
    most = max(1, *map(len, plan))
    return [bins + [[] for _ in range(most - len(bins))] for bins in plan]


def _pack(longest_first: list[int], seq_lens: Sequence[int], token_budget: int) -> list[list[int]]:
    """First-fit decreasing: at most 11/9 of the fewest bins (Johnson 1973)."""
    bins: list[list[int]] = []
    free: list[int] = []
    for sample in longest_first:
        fits = next((i for i, room in enumerate(free) if seq_lens[sample] <= room), None)
        if fits is None:
            bins.append([sample])
            free.append(token_budget - seq_lens[sample])
        else:
            bins[fits].append(sample)
            free[fits] -= seq_lens[sample]
    return bins
