"""What the runs of the suite learn, and two faults that can only come from inside.

A file in `switches/`, beside the copy of this file that the runs use, switches a fault on; the process that meets it
takes the file away.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from engine import Sample, Turn
from engine.algorithms.policy_losses import ppo_clip


def switched_on(fault: str) -> bool:
    """Whether this fault is wanted, for one process once."""
    try:
        (Path(__file__).parent / "switches" / fault).unlink()
    except FileNotFoundError:
        return False
    return True


def share_of_e(sample: Sample) -> float:
    """The reward."""
    return sample.completion.count("e") / max(1, sample.num_tokens)


def loss(
    logp_T: torch.Tensor, old_logp_T: torch.Tensor, advantages_T: torch.Tensor, seq_lens: torch.Tensor
) -> torch.Tensor:
    """PPO's, or not a number; also the way into the policy's process."""
    _make_buckets_fragile()
    loss_T = ppo_clip(logp_T, old_logp_T, advantages_T)
    return loss_T * float("nan") if switched_on("nan") else loss_T


def _make_buckets_fragile() -> None:
    """A bucket of weights loses a bit after its checksum was taken, before it is sent."""
    from actors.weights import Bucket

    if getattr(Bucket.digest, "fragile", False):
        return
    digest = Bucket.digest

    def fragile(bucket: Bucket) -> str:
        checksum = digest(bucket)
        if switched_on("bit"):
            bucket.data[len(bucket.data) // 2] ^= 1
        return checksum

    fragile.fragile = True  # type: ignore[attr-defined]
    Bucket.digest = fragile  # type: ignore[method-assign]


class Echo:
    """An environment of two turns."""

    async def reset(self, row: Any) -> list[dict[str, Any]]:
        """Nothing to open with."""
        return []

    async def step(self, message: dict[str, Any]) -> Turn:
        """Says what it was told."""
        return Turn([{"role": "user", "content": message["content"][:8]}], reward=message["content"].count("e") / 8)
