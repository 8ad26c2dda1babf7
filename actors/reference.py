"""The reference model: the frozen starting policy, asked for log-probs only. Started only when the KL term counts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from actors.group import Split, WorkerGroup
from actors.packed_model import PackedLogProbs, PackedModel, PackedRow, load_language_model
from engine.config import Config
from engine.data.batch import Batch


class ReferenceActor:
    """One data-parallel copy of the reference model."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.device = torch.device(config.device)

    def start(self) -> None:
        """Load the model."""
        module = PackedLogProbs(
            PackedModel(load_language_model(self.config)), temperature=self.config.rollout.temperature
        )
        self.module = module.to(self.device).requires_grad_(False).eval()

    @torch.inference_mode()
    def logprobs(self, microbatches: Sequence[Batch]) -> list[np.ndarray]:
        """Log-probs of the trained tokens, one [R] float32 per micro-batch."""
        return [self.module(PackedRow.of(batch, self.device))[0].float().cpu().numpy() for batch in microbatches]


class ReferenceGroup:
    """The controller's side of the reference: splits batches over its copies."""

    def __init__(self, config: Config, workers: WorkerGroup, hidden_size: int) -> None:
        self.config = config
        self.workers = workers
        self.hidden_size = hidden_size

    def logprobs(self, batch: Batch) -> np.ndarray:
        """[T] float32: log-probs of the trained tokens under the starting policy, 0 elsewhere."""
        split = Split.of(
            batch,
            ranks=len(self.workers.actors),
            token_budget=self.config.policy.tokens_per_microbatch,
            hidden_size=self.hidden_size,
        )
        return split.merge(self.workers.scatter("logprobs", split.shares(), timeout_s=self.config.timeouts.forward))
