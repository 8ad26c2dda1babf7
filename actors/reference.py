"""The reference model: the frozen starting policy, asked for log-probs only. Started only when something needs them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from actors.frozen import FrozenActor, FrozenGroup
from actors.packed_model import PackedLogProbs, PackedModel, load_language_model
from actors.packed_row import PackedRow
from engine.data.batch import Batch


class ReferenceActor(FrozenActor):
    """One data-parallel copy of the reference model."""

    def make(self) -> nn.Module:
        """The starting model and its packed log-probs."""
        model = load_language_model(self.config)
        self.hidden_size = int(model.config.get_text_config().hidden_size)
        packed = PackedModel(model)
        return PackedLogProbs(packed, temperature=self.config.rollout.temperature)

    @torch.inference_mode()
    def logprobs(self, microbatches: Sequence[Batch]) -> list[np.ndarray]:
        """Log-probs of the trained tokens, one [R] float32 per micro-batch."""
        rows = [PackedRow.of(batch, self.device, hidden_size=self.hidden_size) for batch in microbatches]
        return [self.module(row)[0].float().cpu().numpy() for row in rows]


class ReferenceGroup(FrozenGroup):
    """The controller's side of the reference."""

    def logprobs(self, batch: Batch) -> np.ndarray:
        """[T] float32: log-probs of the trained tokens under the starting policy, 0 elsewhere."""
        split = self.split(batch)
        return split.merge(self.workers.scatter("logprobs", split.shares(), timeout_s=self.config.timeouts.update))
