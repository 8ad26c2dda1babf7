"""A frozen reward model as a component of the reward: one number for each response.

Pairwise and ranking models score a response at its last token, with their shared head; process models say how likely
each step is right, and the chances become one number (`rewards.models[].steps`).
Legend: B samples of a micro-batch, S their steps.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoTokenizer

from actors.frozen import FrozenActor, FrozenGroup
from actors.group import WorkerGroup
from actors.packed_model import PackedModel, PackedScores, load_scoring_model
from actors.packed_row import PackedRow
from engine.config import Config, ModelRewardConfig
from engine.data.batch import Batch
from engine.data.steps import step_ends

ModelScores = tuple[np.ndarray, list[np.ndarray | None]]
"""[B] float32 rewards, and for each sample those of its steps, where the model rewards steps."""


class RewardScorerActor(FrozenActor):
    """One data-parallel copy of a reward model."""

    def __init__(self, config: Config, source: ModelRewardConfig) -> None:
        super().__init__(config)
        self.source = source

    def make(self) -> nn.Module:
        """The model, and what its folder records of it."""
        self.record = json.loads((Path(self.source.path) / "reward_model.json").read_text())
        self.process = self.record["kind"] == "process"
        self.tokenizer = AutoTokenizer.from_pretrained(self.source.path)
        model = load_scoring_model(self.config, self.source.path, per_token=self.process, heads=None)
        self.hidden_size = int(model.config.get_text_config().hidden_size)
        return PackedScores(PackedModel(model))

    @torch.inference_mode()
    def scores(self, microbatches: Sequence[Batch]) -> list[list[np.ndarray]]:
        """For each sample of each micro-batch its reward, [1] float32, or with `steps: each` one for each step."""
        return [self._scores(batch) if len(batch) else [] for batch in microbatches]

    def _scores(self, batch: Batch) -> list[np.ndarray]:
        marked = replace(batch, loss_mask=self._marks(batch))
        score_S = (
            self.module(PackedRow.of(marked, self.device, hidden_size=self.hidden_size))[:, 0].float().cpu().numpy()
        )
        if self.process:
            per_sample = np.split(1 / (1 + np.exp(-score_S)), np.cumsum(marked.response_lens)[:-1])
            return [_joined(chances, self.source.steps).astype(np.float32) for chances in per_sample]
        if self.source.normalize:
            score_S = (score_S - self.record["mean"]) / (self.record["std"] or 1.0)
        return list(score_S.astype(np.float32)[:, None])

    def _marks(self, batch: Batch) -> np.ndarray:
        """[T] bool: the tokens that are scored."""
        marks_T = np.zeros(len(batch.tokens), bool)
        ends_B = np.cumsum(batch.seq_lens)
        if not self.process:
            marks_T[ends_B - 1] = True
            return marks_T
        for end, length in zip(ends_B, batch.response_lens, strict=True):
            steps = step_ends(batch.tokens[end - length : end].tolist(), self.tokenizer, self.record["step_separator"])
            marks_T[end - length + np.array(steps)] = True
        return marks_T


def _joined(chances: np.ndarray, how: str) -> np.ndarray:
    match how:
        case "min":
            return chances.min(keepdims=True)
        case "mean":
            return chances.mean(keepdims=True)
        case "last":
            return chances[-1:]
        case "product":
            return chances.prod(keepdims=True)
    return chances


class RewardScorerGroup(FrozenGroup):
    """The controller's side of a reward model."""

    def __init__(self, config: Config, source: ModelRewardConfig, workers: WorkerGroup, hidden_size: int) -> None:
        super().__init__(config, workers, hidden_size)
        self.each = source.steps == "each"

    def scores(self, batch: Batch) -> ModelScores:
        """The reward of each sample, and of its steps with `steps: each`."""
        split = self.split(batch)
        results = self.workers.scatter("scores", split.shares(), timeout_s=self.config.timeouts.update)
        per_sample = split.merge_samples(results)
        values_B = np.array([values.sum() for values in per_sample], np.float32)
        return values_B, [values.astype(np.float64) if self.each else None for values in per_sample]
