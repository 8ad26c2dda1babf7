"""The policy: a language model trained on the stage's objective, asked for log-probs, exported to the engines."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from actors.adapters import add_adapter, quantization_config
from actors.objectives import Outputs, objective_of
from actors.packed_model import PackedDivergence, PackedLogProbs, PackedModel, load_language_model
from actors.process import RankInfo
from actors.trained import Minibatch, Stats, TrainedActor, TrainedGroup
from actors.trainer import Trainable
from actors.weight_transfer import Route, Sender
from actors.weights import Ack, Publisher, Snapshot
from engine.algorithms.logprobs import greedy_hits, token_logprobs
from engine.config import Config
from engine.data.batch import Batch


class PolicyActor(TrainedActor):
    """One rank of the policy."""

    def __init__(self, config: Config, info: RankInfo, updates: int, route: Route = "memory") -> None:
        """Weights reach the engines by this `route`."""
        super().__init__(config, info, updates)
        self.prefix = "policy" if config.stage == "rl" else "train"
        self.publisher = Publisher()
        self.sender = Sender(route, info, lambda: self.trainer.named_weights(), config.timeouts.publish)

    def make(self) -> Trainable:
        """The language model and its packed log-probs, or its divergence from a teacher."""
        config = self.config
        self.objective = objective_of(config)
        model = load_language_model(config, quantization=quantization_config(config.model.adapter))
        adapter = add_adapter(model, config.model.adapter, task="CAUSAL_LM") if config.trains_adapter else None
        on_policy = config.stage == "rl" or (config.stage == "distill" and config.distill.mode == "on_policy")
        temperature = config.rollout.temperature if on_policy else 1.0
        packed = PackedModel(model, adapter.hidden_states if adapter else None)
        self.log_probs = PackedLogProbs(packed, temperature=temperature)
        module: torch.nn.Module = self.log_probs
        if config.stage == "distill" and config.distill.mode == "on_policy":
            teacher = load_language_model(config, path=config.distill.teacher)
            module = PackedDivergence(packed, teacher, beta=config.distill.beta, temperature=temperature)
        return Trainable(model, adapter, module)

    def new_stats(self) -> Stats:
        """Names of the objective's metrics."""
        return Stats(self.objective.means, self.objective.maxima)

    def enough(self, stats: Stats) -> bool:
        """Whether the policy has moved further from the one that sampled than `algorithm.target_kl`."""
        target = self.config.algorithm.target_kl
        if self.config.stage != "rl" or target is None:
            return False
        return stats.reduce(self.trainer).get("policy/kl_step", 0.0) > target

    def loss(self, batch: Batch, minibatch: Minibatch, stats: Stats) -> torch.Tensor:
        """This micro-batch's share of the objective."""
        row = self.row(batch)
        value_R, entropy_R = self.trainer.engine(row)
        if len(batch) == 0:
            return value_R.sum()
        return self.objective.loss(Outputs(batch, row, value_R, entropy_R, minibatch), stats)

    @torch.inference_mode()
    def logprobs(self, microbatches: Sequence[Batch], without_adapter: bool = False) -> list[np.ndarray]:
        """Log-probs of the trained tokens, one [R] float32 per micro-batch; optionally those of the frozen base."""
        self.trainer.engine.eval()
        adapter = self.trainer.adapter
        with adapter.disabled() if adapter is not None and without_adapter else nullcontext():
            return [self._logprobs(batch) for batch in microbatches]

    @torch.inference_mode()
    def divergences(self, microbatches: Sequence[Batch]) -> list[np.ndarray]:
        """Divergence from the teacher at the trained tokens, one [R] float32 per micro-batch."""
        self.trainer.engine.eval()
        rows = [self.row(batch) for batch in microbatches]
        return [self.trainer.engine(row)[0].float().cpu().numpy() for row in rows]

    @torch.inference_mode()
    def predictions(self, microbatches: Sequence[Batch]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of the trained tokens: (log-prob [R] float32, whether it is the likeliest [R] float32) per micro-batch."""
        self.trainer.engine.eval()
        weight = self.log_probs.head.weight
        results = []
        for batch in microbatches:
            row = self.row(batch)
            hidden = self.log_probs.packed(row)[row.predictors]
            with self.trainer.gathered([weight]):
                logp_R, _ = token_logprobs(hidden, weight, row.targets)  # at temperature 1, whatever is trained at
                hits_R = greedy_hits(hidden, weight, row.targets)
            results.append((logp_R.float().cpu().numpy(), hits_R.float().cpu().numpy()))
        return results

    def publish(self, version: int, spread: bool) -> Snapshot | None:
        """Export the weights; rank 0 returns the snapshot, the other ranks take part and return None.

        `spread` is for engines on other machines.
        """
        trainer = self.trainer
        description = None
        if self.config.model.adapter.shipped_alone:
            weights = trainer.adapter_weights()
            description = trainer.adapter.description() if trainer.adapter else None
        else:
            weights = trainer.named_weights()
        if self.info.rank == 0:
            return self.publisher.publish(weights, version, adapter=description, spread=spread)
        for _ in weights:
            pass
        return None

    def send(self, version: int, engines: Sequence[Any]) -> tuple[Ack, int]:
        """Bring engines to the weights, device to device; every rank says what they are to acknowledge, and the bytes.

        Raises:
            TransferError: an engine failed.
        """
        return self.sender.send(version, engines)

    def _logprobs(self, batch: Batch) -> np.ndarray:
        return self.log_probs(self.row(batch))[0].float().cpu().numpy()


class PolicyGroup(TrainedGroup):
    """The controller's side of the policy."""

    def logprobs(self, batch: Batch) -> np.ndarray:
        """[T] float32: log-probs of the trained tokens under the current weights, 0 elsewhere."""
        return self._logprobs(batch)

    def base_logprobs(self, batch: Batch) -> np.ndarray:
        """[T] float32: the same under the frozen weights below the adapter."""
        return self._logprobs(batch, without_adapter=True)

    def predictions(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Of the trained tokens: log-probs, and 1 where the token is the likeliest; both [T] float32, 0 elsewhere."""
        split = self._split(batch)
        results = self.workers.scatter("predictions", split.shares(), timeout_s=self.config.timeouts.update)
        logp, hits = ([[part[i] for part in share] for share in results] for i in (0, 1))
        return split.merge(logp), split.merge(hits)

    def divergences(self, batch: Batch) -> np.ndarray:
        """[T] float32: divergence of the trained tokens' distributions from the teacher's, 0 elsewhere."""
        split = self._split(batch)
        timeout_s = self.config.timeouts.update
        return split.merge(self.workers.scatter("divergences", split.shares(), timeout_s=timeout_s))

    def needed(self, batch: Batch) -> Batch:
        """Without samples whose advantages are all 0, where nothing but the advantages enters the loss."""
        if self.config.stage != "rl" or not self.config.algorithm.only_advantages:
            return batch
        return batch.select(np.flatnonzero(batch.sum_per_sample(batch.annotations["advantages"] != 0)))

    def publish(self, version: int, *, spread: bool = False) -> Snapshot:
        """A snapshot of the current weights, which holds until the next; `spread` is for engines on other machines."""
        return self.workers.call("publish", version, spread, timeout_s=self.config.timeouts.publish)[0]

    def send(self, version: int, engines: Sequence[Any]) -> tuple[Ack, int]:
        """Bring engines (their actors) to the current weights; what they are to acknowledge, and the bytes."""
        sent: list[tuple[Ack, int]] = self.workers.call(
            "send", version, engines, timeout_s=self.config.timeouts.publish
        )
        return sent[0]

    def _logprobs(self, batch: Batch, **how: bool) -> np.ndarray:
        split = self._split(batch)
        results = self.workers.scatter("logprobs", split.shares(), timeout_s=self.config.timeouts.update, **how)
        return split.merge(results)
