"""The critic: a language model's body with a value head, regressed on the returns of the policy's samples.

Value t of a sample is that of the state before its token t: it is read off the token before. It starts as the policy
does with a head of zeros, so that the first advantages are the rewards, or as a reward model (arXiv:2203.02155).
Legend: R trained tokens of a micro-batch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from actors.adapters import add_adapter
from actors.packed_model import PackedModel, PackedScores, load_scoring_model
from actors.trained import Minibatch, Stats, TrainedActor, TrainedGroup
from actors.trainer import Trainable
from engine.algorithms.values import clipped_value_loss
from engine.config import Config
from engine.data.batch import Batch


def critic_config(config: Config) -> Config:
    """The run's configuration as the critic's trainer is to read it."""
    critic = config.critic
    return config.model_copy(
        update={
            "policy": config.policy.model_copy(update={"ranks": critic.ranks}),
            "optimizer": config.optimizer.model_copy(update={"learning_rate": critic.learning_rate}),
        }
    )


class CriticActor(TrainedActor):
    """One rank of the critic. Its configuration is `critic_config`'s."""

    prefix = "critic"

    def make(self) -> Trainable:
        """The body with a head for values, and an adapter where the policy trains one."""
        config = self.config
        path = config.critic.path
        model = load_scoring_model(config, path or config.model.path, per_token=True, heads=None if path else 1)
        _make_value_head(model, Path(path) if path else None)
        adapter = add_adapter(model, config.model.adapter, task="TOKEN_CLS") if config.trains_adapter else None
        packed = PackedModel(model, adapter.hidden_states if adapter else None)
        return Trainable(model, adapter, PackedScores(packed, before=True))

    def new_stats(self) -> Stats:
        """Names of the critic's metrics."""
        return Stats(("critic/value", "critic/clip_fraction"))

    def loss(self, batch: Batch, minibatch: Minibatch, stats: Stats) -> torch.Tensor:
        """Squared distance to the returns, clipped, divided by the tokens of the whole update."""
        value_R = self.trainer.engine(self.row(batch))[:, 0]
        if len(batch) == 0:
            return value_R.sum()
        bound = self.config.critic.value_clip
        old_R, return_R = (
            torch.from_numpy(batch.annotations[name][batch.loss_mask]).to(value_R) for name in ("values", "returns")
        )
        clip = math.inf if bound is None else bound
        stats.add({"critic/value": value_R, "critic/clip_fraction": (value_R - old_R).abs() > clip})
        return clipped_value_loss(value_R, old_R, return_R, clip=clip).sum() / minibatch.total_tokens

    @torch.inference_mode()
    def values(self, microbatches: Sequence[Batch]) -> list[np.ndarray]:
        """[R] float32 values of the states before each trained token, per micro-batch."""
        self.trainer.engine.eval()
        rows = [self.row(batch) for batch in microbatches]
        return [self.trainer.engine(row)[:, 0].float().cpu().numpy() for row in rows]


def _make_value_head(model: PreTrainedModel, reward_model: Path | None) -> None:
    """One output with a bias: zeros, or a reward model's shared head in units of its normalised reward."""
    old = model.get_submodule("score")
    assert isinstance(old, torch.nn.Linear)
    head = torch.nn.Linear(old.in_features, 1, dtype=old.weight.dtype)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    if reward_model is not None:
        record = json.loads((reward_model / "reward_model.json").read_text())
        scale = record["std"] or 1.0
        with torch.no_grad():
            head.weight.copy_(old.weight[:1] / scale)
            head.bias.fill_(-record["mean"] / scale)
    model.score = head
    model.config.num_labels = 1


class CriticGroup(TrainedGroup):
    """The controller's side of the critic."""

    def values(self, batch: Batch) -> np.ndarray:
        """[T] float32: values of the states before each trained token, 0 elsewhere."""
        split = self._split(batch)
        return split.merge(self.workers.scatter("values", split.shares(), timeout_s=self.config.timeouts.update))
