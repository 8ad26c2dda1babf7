"""What each phase of a step costs in time: what the estimate of `gnomon plan` and the simulation are made from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    """Seconds: an engine's of one engine, a trainer's of one trainer group, the devices that hold one replica."""

    decode_step_s: float
    """One engine step, however many samples run."""
    decode_sample_s: float
    """Added to it per running sample."""
    decode_context_s: float
    """Added to it per token of context of all running samples."""
    prefill_token_s: float
    """Reading a token of a prompt."""
    forward_token_s: float
    """A scoring pass, per token per trainer group."""
    train_token_s: float
    """Forward and backward, per token per trainer group."""
    update_s: float
    """Fixed, per optimizer update."""
    publish_s: float
    """Bringing new weights to the engines."""
    reward_s: float
    """Latency of scoring a group."""
