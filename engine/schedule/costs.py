"""What the parts of a step cost, as a simulator of the schedule needs to know it: plain numbers, whoever found them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    """Seconds. A group of trainers works on a pass or an update together; an engine works alone."""

    decode_step_s: float
    """One step of an engine, however many samples it decodes."""
    decode_sample_s: float
    """Added to it by each running sample."""
    decode_context_s: float
    """Added to it by each token of the context of all running samples."""
    prefill_token_s: float
    """Each token of a prompt that is not in the engine's cache."""
    forward_token_s: float
    """A scoring pass of a group of trainers: each token."""
    train_token_s: float
    """Forward and backward pass of a group of trainers: each token."""
    update_s: float
    """Each optimizer update, beside its passes."""
    publish_s: float
    """New weights, from the trainers to all engines."""
    reward_s: float
    """From the last sample of a group to its rewards."""
