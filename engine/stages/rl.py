"""Online reinforcement learning: generate, score, compare within groups, update, publish.

    prompts --> engines --(finished groups)--> rewards --> advantages --> policy update --> publish --> engines

The controller waits for the slowest group of a step and its rewards, then for the update; each wait has a deadline.
Strictly on-policy: every token of a step was sampled from the weights that the step updates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.algorithms.advantages import group_relative
from engine.config import Config
from engine.data.batch import Batch
from engine.data.prompts import Prompt
from engine.data.sampler import RowSampler
from engine.roles import SamplingSettings, Workers
from engine.schedule.ledger import SampleLedger
from engine.stages.evaluation import evaluate_answers
from engine.stages.experience import Group, collect_groups, sample_seeds, to_batch
from engine.stages.loop import Stopwatch
from engine.tracking.tracker import Tracker

FIRST_STEP_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
"""How far apart two actors' log-probs of the same tokens may be on average before anything was learned."""


class RLStage:
    """The loop of an online algorithm and what it keeps between steps."""

    def __init__(
        self,
        config: Config,
        workers: Workers,
        tracker: Tracker,
        train_prompts: Sequence[Prompt],
        held_out_prompts: Sequence[Prompt],
    ) -> None:
        assert workers.policy is not None, "the cluster starts what roles_of names"
        assert workers.sampling is not None
        self.config = config
        self.trained = self.policy = workers.policy
        self.reference = workers.reference
        self.sampling = workers.sampling
        self.tracker = tracker
        self.name = config.algorithm.name
        self.total_steps = config.rl.steps
        self.train_prompts = train_prompts
        self.held_out_prompts = held_out_prompts
        self.sampler = RowSampler(len(train_prompts), seed=config.seed)
        self.ledger = SampleLedger()
        self.settings = SamplingSettings(
            config.rollout.temperature, config.rollout.max_new_tokens, tuple(config.rollout.stop)
        )
        self.watch = Stopwatch()

    def begin(self, step: int) -> None:
        """Bring the engines to the policy's weights."""
        self.sampling.rollouts.publish(step)

    def step(self, step: int) -> dict[str, float]:
        """Generate, score, compare within groups, update, publish."""
        groups = self._rollout(step)
        batch = self._experience(groups)
        batch = self._annotate(batch)
        batch = self._advantages(batch)
        metrics = self._update(batch, step)
        metrics |= self.sampling.rollouts.publish(step)
        self._record(step, groups)
        return metrics | self._measures(groups, batch) | self.watch.lap()

    def evaluate(self, step: int) -> dict[str, float]:
        """Rewards of answers to held-out prompts."""
        if not self.held_out_prompts:
            return {}
        return evaluate_answers(self.config, self.sampling, self.tracker, self.held_out_prompts)

    def save(self, folder: Path) -> None:
        """Write the policy."""
        self.policy.save(folder)

    def state(self) -> dict[str, Any]:
        """Order of prompts, account of samples."""
        return {"sampler": self.sampler.state_dict(), "ledger": self.ledger.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.sampler.load_state_dict(state["sampler"])
        self.ledger.load_state_dict(state["ledger"])

    def _rollout(self, step: int) -> list[Group]:
        """A step's groups, generated and scored."""
        rl = self.config.rl
        prompts = [self.train_prompts[i] for i in self.sampler.next(rl.prompts_per_step)]
        ids = [self.ledger.admit(rl.samples_per_prompt) for _ in prompts]
        seeds = [sample_seeds(self.config.seed, step, i, count=rl.samples_per_prompt) for i in range(len(prompts))]
        with self.watch.timed("rollout"):
            return collect_groups(self.sampling, self.tracker, prompts, ids, seeds, self.settings)

    def _experience(self, groups: list[Group]) -> Batch:
        """The samples that can be trained on; the others leave the ledger with their reason."""
        for group in groups:
            for position, reason in group.scores.dropped.items():
                self.ledger.drop([group.sample_ids[position]], reason)
        return to_batch(groups)

    def _annotate(self, batch: Batch) -> Batch:
        """Log-probs of other weights, only where the loss needs them."""
        if self.config.algorithm.kl_coef > 0:
            with self.watch.timed("reference"):
                reference = self.reference.logprobs if self.reference else self.policy.base_logprobs
                batch = batch.annotate(ref_logp=reference(batch))
        if self.config.updates_per_step > 1:
            with self.watch.timed("old_logp"):
                batch = batch.annotate(old_logp=self.policy.logprobs(batch))
        return batch

    def _advantages(self, batch: Batch) -> Batch:
        """Group-relative advantages (arXiv:2402.03300), computed once on the whole batch."""
        scores_B = torch.from_numpy(batch.totals).double()
        advantages_B = group_relative(
            scores_B, torch.from_numpy(batch.group_ids), scale=self.config.algorithm.advantage_scale
        )
        per_token_T = np.repeat(advantages_B.numpy(), batch.seq_lens) * batch.loss_mask
        return batch.annotate(advantages=per_token_T.astype(np.float32))

    def _update(self, batch: Batch, step: int) -> dict[str, float]:
        """Optimizer updates of one step; the samples are then settled in the ledger."""
        with self.watch.timed("update"):
            metrics = self.policy.update(list(self._minibatches(batch, step)))
        if step == 1:
            self._check_first_step(metrics)
        self.ledger.train(batch.sample_ids)
        self.ledger.check()
        assert not self.ledger.in_flight, f"samples left behind by step {step}: {sorted(self.ledger.in_flight)[:9]}"
        return metrics

    def _minibatches(self, batch: Batch, step: int) -> Iterator[Batch]:
        """Whole groups, shuffled anew each epoch; a single update takes the batch as it is."""
        if self.config.updates_per_step == 1:
            yield batch
            return
        random = np.random.default_rng([self.config.seed, step])
        for _ in range(self.config.rl.epochs_per_step):
            order = random.permutation(np.unique(batch.group_ids))
            for part in np.array_split(order, self.config.rl.minibatches_per_step):
                if len(part):
                    yield batch.select(np.flatnonzero(np.isin(batch.group_ids, part)))

    def _check_first_step(self, metrics: dict[str, float]) -> None:
        """Nothing was learned yet: engines, policy and reference are the same weights.

        Raises:
            RuntimeError: they are not; masks, temperatures or weights differ between the actors.
        """
        tolerance = FIRST_STEP_TOLERANCE[self.config.dtype]
        names = ["mismatch/logp_abs_mean"]
        if self.config.updates_per_step == 1:  # later updates of a step have moved away from the reference
            names.append("policy/kl")
        for name in names:
            value = metrics.get(name, 0.0)
            if abs(value) > tolerance:
                raise RuntimeError(f"{name} is {value:.2e} at the first step, not 0 within {tolerance:g}")

    def _measures(self, groups: list[Group], batch: Batch) -> dict[str, float]:
        """Rewards and lengths of a step."""
        lengths = batch.response_lens
        generations = [g for group in groups for g in group.generations]
        spread = [np.ptp(batch.totals[batch.group_ids == g]) for g in np.unique(batch.group_ids)]
        metrics = {
            "reward/mean": float(batch.totals.mean()),
            "reward/std": float(batch.totals.std()),
            "reward/groups_without_signal": float(np.mean([s == 0 for s in spread])),
            "rollout/response_length": float(lengths.mean()),
            "rollout/truncated_fraction": float(np.mean([g.finish_reason == "length" for g in generations])),
            "rollout/tokens": float(len(batch.tokens)),
            "rollout/epoch": float(self.sampler.epoch),
        }
        metrics |= {f"rollout/dropped/{reason}": float(n) for reason, n in self.ledger.dropped.items()}
        for name, values in batch.rewards.items():
            if not np.isnan(values).all():
                metrics |= {f"reward/{name}/mean": float(np.nanmean(values))}
                metrics |= {f"reward/{name}/std": float(np.nanstd(values))}
        return metrics

    def _record(self, step: int, groups: list[Group]) -> None:
        """Write some of a step's samples."""
        rows = [
            {
                "prompt": group.prompt.prompt,
                "completion": generation.text,
                "reward": None if i in group.scores.dropped else float(group.scores.totals[i]),
                "dropped": group.scores.dropped.get(i),
                "finish_reason": generation.finish_reason,
                "sample_id": group.sample_ids[i],
            }
            for group in groups
            for i, generation in enumerate(group.generations)
        ]
        self.tracker.samples(step, rows[: self.config.tracking.samples_per_step])
