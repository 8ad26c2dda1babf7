"""The policy: trained by a policy-gradient loss on packed samples, asked for log-probs, exported to the engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from actors.group import Split, WorkerGroup
from actors.packed_model import PackedLogProbs, PackedRow, load_language_model
from actors.process import RankInfo
from actors.trainer import Trainer
from actors.weights import Snapshot, publish
from engine.algorithms.aggregate import aggregate
from engine.algorithms.kl import kl_estimate
from engine.algorithms.off_policy import importance_weights
from engine.algorithms.policy_losses import ppo_clip
from engine.config import Config
from engine.data.batch import Batch


@dataclass(frozen=True)
class Minibatch:
    """One rank's share of one optimizer update, with the denominators of all ranks together."""

    microbatches: Sequence[Batch]
    total_tokens: int
    """Trained tokens of the whole update."""
    total_sequences: int
    """Samples with a trained token in the whole update."""


@dataclass
class TokenStats:
    """Sums and maxima over trained tokens, merged over micro-batches and ranks."""

    sums: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)

    def add(self, **values_T: torch.Tensor) -> None:
        """Add per-token values to the sums."""
        for name, values in values_T.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(values.double().sum())

    def maximum(self, **values_T: torch.Tensor) -> None:
        """Keep the largest absolute per-token value."""
        for name, values in values_T.items():
            largest = float(values.abs().max()) if values.numel() else 0.0
            self.maxima[name] = max(self.maxima.get(name, 0.0), largest)


class PolicyActor:
    """One rank of the policy."""

    def __init__(self, config: Config, info: RankInfo) -> None:
        self.config = config
        self.info = info

    def start(self) -> None:
        """Join the process group and load the model."""
        config = self.config

        def make() -> tuple:
            model = load_language_model(config)
            return model, PackedLogProbs(model, temperature=config.rollout.temperature)

        self.trainer = Trainer(config, self.info, make, updates=config.rl.steps * config.updates_per_step)

    def hidden_size(self) -> int:
        """Width of the model, for the cost of a sample."""
        return int(self.trainer.model.config.get_text_config().hidden_size)

    def logprobs(self, microbatches: Sequence[Batch]) -> list[np.ndarray]:
        """Log-probs of the trained tokens under the current weights, one [R] float32 per micro-batch."""
        self.trainer.engine.eval()
        with torch.no_grad():
            return [self._score(batch)[1].float().cpu().numpy() for batch in microbatches]

    def update(self, minibatches: Sequence[Minibatch]) -> dict[str, float]:
        """One optimizer update per minibatch. Returns metrics averaged over all updates, equal on every rank."""
        stats = TokenStats()
        updates = []
        for minibatch in minibatches:
            losses = [partial(self._loss, batch, minibatch, stats) for batch in minibatch.microbatches]
            updates.append(self.trainer.update(losses))
        means = {f"policy/{name}": float(np.mean([u[name] for u in updates])) for name in updates[0]}
        return means | self._reduce(stats, tokens=sum(m.total_tokens for m in minibatches))

    def publish(self, version: int) -> Snapshot | None:
        """Export the weights; rank 0 returns the snapshot, the other ranks take part and return None."""
        weights = self.trainer.named_weights()
        if self.info.rank == 0:
            return publish(weights, version)
        for _ in weights:
            pass
        return None

    def save(self, folder: Path) -> None:
        """Write the model in Hugging Face format."""
        self.trainer.save(folder)

    def _score(self, batch: Batch) -> tuple[PackedRow, torch.Tensor, torch.Tensor]:
        row = PackedRow.of(batch, self.trainer.device)
        logp_T, entropy_T = self.trainer.engine(row)
        return row, logp_T, entropy_T

    def _loss(self, batch: Batch, minibatch: Minibatch, stats: TokenStats) -> torch.Tensor:
        """This micro-batch's share of the global loss (arXiv:2402.03300, eq. 3, with a choice of aggregation)."""
        algorithm = self.config.algorithm
        row, logp_T, entropy_T = self._score(batch)
        if len(batch) == 0:
            return logp_T.sum()

        def on_device(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(values[batch.loss_mask]).to(logp_T)

        advantages_T = on_device(batch.annotations["advantages"])
        rollout_logp_T = on_device(batch.rollout_logp)
        # Strictly on-policy the weights that sampled are these, so the old log-probs are the new ones.
        old = batch.annotations.get("old_logp")
        old_logp_T = logp_T.detach() if old is None else on_device(old)
        loss_T = ppo_clip(
            logp_T,
            old_logp_T,
            advantages_T,
            clip_low=algorithm.clip_low,
            clip_high=algorithm.clip_high,
            dual_clip=algorithm.dual_clip,
        )
        correction = algorithm.correction
        weights_T = torch.ones_like(logp_T)
        if correction.mode != "none":
            weights_T = importance_weights(
                old_logp_T,
                rollout_logp_T,
                row.response_lens,
                level=correction.level,
                mode=correction.mode,
                cap=correction.cap,
                floor=correction.floor,
            )
            loss_T = loss_T * weights_T
        if algorithm.kl_coef > 0:
            kl_T = kl_estimate(logp_T, on_device(batch.annotations["ref_logp"]), algorithm.kl_estimator)
            loss_T = loss_T + algorithm.kl_coef * kl_T
            stats.add(kl=kl_T.detach())
        with torch.no_grad():
            ratio_T = (logp_T - old_logp_T).clamp(-20, 20).exp()
            outside_T = (ratio_T < 1 - algorithm.clip_low) & (advantages_T < 0)
            outside_T |= (ratio_T > 1 + algorithm.clip_high) & (advantages_T > 0)
            mismatch_T = old_logp_T - rollout_logp_T
            stats.add(entropy=entropy_T, ratio=ratio_T, clip_fraction=outside_T)
            stats.add(mismatch=mismatch_T.abs(), correction=weights_T)
            stats.maximum(mismatch=mismatch_T, ratio_deviation=ratio_T - 1)
        return aggregate(
            loss_T,
            row.response_lens,
            algorithm.loss_aggregation,
            max_len=self.config.rollout.max_new_tokens,
            total_tokens=minibatch.total_tokens,
            total_sequences=minibatch.total_sequences,
        )

    def _reduce(self, stats: TokenStats, tokens: int) -> dict[str, float]:
        """Global token means and maxima. Every rank reduces the same names, whether or not it had samples."""
        names = ["entropy", "ratio", "clip_fraction", "mismatch", "correction"]
        names += ["kl"] if self.config.algorithm.kl_coef > 0 else []
        sums = self.trainer.all_reduce(torch.tensor([stats.sums.get(n, 0.0) for n in names], dtype=torch.float64))
        tops = ["mismatch", "ratio_deviation"]
        maxima = torch.tensor([stats.maxima.get(n, 0.0) for n in tops], dtype=torch.float64)
        maxima = self.trainer.all_reduce(maxima, dist.ReduceOp.MAX)
        mean = dict(zip(names, (sums / max(tokens, 1)).tolist(), strict=True))
        top = dict(zip(tops, maxima.tolist(), strict=True))
        metrics = {
            "policy/entropy": mean["entropy"],
            "policy/ratio": mean["ratio"],
            "policy/ratio_deviation_max": top["ratio_deviation"],
            "policy/clip_fraction": mean["clip_fraction"],
            "mismatch/logp_abs_mean": mean["mismatch"],
            "mismatch/logp_abs_max": top["mismatch"],
            "mismatch/correction_mean": mean["correction"],
        }
        return metrics | ({"policy/kl": mean["kl"]} if "kl" in mean else {})


class PolicyGroup:
    """The controller's side of the policy: splits batches over its ranks and gathers what they return."""

    def __init__(self, config: Config, workers: WorkerGroup) -> None:
        self.config = config
        self.workers = workers
        self.hidden_size = workers.call("hidden_size", timeout_s=config.timeouts.start)[0]

    def logprobs(self, batch: Batch) -> np.ndarray:
        """[T] float32: log-probs of the trained tokens under the current weights, 0 elsewhere."""
        split = self._split(batch)
        return split.merge(self.workers.scatter("logprobs", split.shares(), timeout_s=self.config.timeouts.forward))

    def update(self, minibatches: Sequence[Batch]) -> dict[str, float]:
        """One optimizer update per minibatch; returns metrics over all of them."""
        per_rank: list[list[Minibatch]] = [[] for _ in self.workers.actors]
        for batch in minibatches:
            response_lens = batch.response_lens
            tokens, sequences = int(response_lens.sum()), int((response_lens > 0).sum())
            for share, minibatch in zip(self._split(batch).shares(), per_rank, strict=True):
                minibatch.append(Minibatch(share, tokens, sequences))
        return self.workers.scatter("update", per_rank, timeout_s=self.config.timeouts.update)[0]

    def publish(self, version: int) -> Snapshot:
        """A snapshot of the current weights, in the object store."""
        return self.workers.call("publish", version, timeout_s=self.config.timeouts.publish)[0]

    def save(self, folder: Path) -> None:
        """Write the model in Hugging Face format, whole or not at all."""
        self.workers.call("save", folder, timeout_s=self.config.timeouts.save)

    def _split(self, batch: Batch) -> Split:
        return Split.of(
            batch,
            ranks=len(self.workers.actors),
            token_budget=self.config.policy.tokens_per_microbatch,
            hidden_size=self.hidden_size,
        )
