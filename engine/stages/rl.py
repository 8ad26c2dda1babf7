"""Online reinforcement learning: generate, score, compare, update, publish.

    prompts --> engines --(finished groups)--> rewards --> advantages --> critic, policy --> publish --> engines

The controller waits for the slowest group that a step cannot do without and its rewards, then for the updates; each
wait has a deadline. Strictly on-policy (`rl.max_staleness: 0`) every token of a step was sampled from the weights that
the step updates; else tokens are at most so many versions old, each knows its version, and importance weights correct
for it (`algorithm.correction`). What an algorithm is, is said by the knobs of `AlgorithmConfig`; engine/presets.py
names the usual settings of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.algorithms.kl import AdaptiveKL, FixedKL, kl_estimate
from engine.algorithms.values import explained_variance
from engine.config import ASKING, AlgorithmConfig, Config
from engine.data.batch import Batch
from engine.plan import Plan
from engine.roles import Trained, Workers
from engine.schedule.ledger import SampleLedger
from engine.stages.advantage import with_advantages
from engine.stages.early_passes import EarlyPasses, Pass
from engine.stages.evaluation import evaluate_answers
from engine.stages.experience import Experience, Group, RewardScheme, to_batch
from engine.stages.guard import NumericsGuard
from engine.stages.loop import Stopwatch
from engine.stages.measures import measures
from engine.stages.supply import Supply
from engine.tracking.alarms import RewardAlarms
from engine.tracking.tracker import Tracker

FIRST_STEP_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
"""How far apart two actors' log-probs of the same tokens may be on average before anything was learned."""


class RLStage:
    """The loop of an online algorithm and what it keeps between steps."""

    def __init__(self, config: Config, workers: Workers, tracker: Tracker, plan: Plan) -> None:
        assert workers.policy is not None, "the cluster starts what roles_of names"
        assert workers.sampling is not None
        self.config = config
        self.policy = workers.policy
        self.critic = workers.critic
        self.reference = workers.reference
        self.rollouts = workers.sampling.rollouts
        self.tracker = tracker
        self.models: dict[str, Trained] = {"policy": self.policy} | ({"critic": self.critic} if self.critic else {})
        self.name = config.algorithm.name
        self.total_steps = config.rl.steps
        self.held_out_prompts = plan.held_out_prompts
        self.experience = Experience(workers.sampling, tracker, RewardScheme.of(plan))
        self.ledger = SampleLedger()
        self.passes = EarlyPasses(self._early_passes())
        self.supply = Supply(config, plan, tracker, self.experience, self.ledger, self.passes)
        self.kl = kl_controller(config.algorithm)
        self.guard = NumericsGuard(tracker, stop_after=config.optimizer.stop_after_skipped)
        self.alarms = alarms_of(config, plan)
        self.watch = Stopwatch(tracker)

    def begin(self, step: int) -> None:
        """Bring the engines to the policy's weights."""
        self.rollouts.publish(step)
        self.supply.begin(step)

    def step(self, step: int) -> dict[str, float]:
        """Generate, score, compare, update, publish."""
        with self.watch.timed("rollout", step):
            drawn, groups = self.supply.take(step)
        metrics = measures(drawn) | {"rollout/epoch": float(self.supply.sampler.epoch)}
        if any(group.kept() for group in groups):
            batch = to_batch(groups)
            metrics |= self.supply.stale_shares(batch)
            self._record_lengths(batch, step)
            batch = self._annotate(batch, step)
            metrics |= self._measure_kl(batch)
            if self.guard.check(batch, step):
                metrics |= self._learn(batch, step)
        self._settle(metrics, step, [i for group in drawn for i in group.sample_ids])
        updated = metrics.get("policy/updates", 0) > 0
        if updated:
            with self.watch.timed("publish", step):
                metrics |= self.rollouts.publish(step)
        self.supply.trained(step if updated else None)
        self._record(step, drawn)
        for alarm in self.alarms.step(metrics):
            self.tracker.alarm(step, alarm)
        return metrics | self.watch.lap()

    def evaluate(self, step: int) -> dict[str, float]:
        """Rewards of answers to held-out prompts."""
        if not self.held_out_prompts:
            return {}
        metrics = evaluate_answers(self.config, self.experience, self.held_out_prompts)
        for alarm in self.alarms.evaluation(metrics):
            self.tracker.alarm(step, alarm)
        return metrics

    def save(self, folder: Path) -> None:
        """Write the policy."""
        self.policy.save(folder)

    def state(self) -> dict[str, Any]:
        """Order of prompts, account of samples, weight of the KL, statistics of the rewards, memory of the alarms."""
        return {
            "supply": self.supply.state_dict(),
            "ledger": self.ledger.state_dict(),
            "kl_coef": self.kl.value,
            "rewards": self.experience.scheme.composition.state_dict(),
            "alarms": self.alarms.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.supply.load_state_dict(state["supply"])
        self.ledger.load_state_dict(state["ledger"])
        self.kl.value = state["kl_coef"]
        self.experience.scheme.composition.load_state_dict(state["rewards"])
        self.alarms.load_state_dict(state["alarms"])

    def _early_passes(self) -> dict[str, Pass]:
        """What is asked of each model while groups are still generated, by the name that `_annotate` asks under."""
        config = self.config
        if not config.roles_overlap:
            return {}
        passes: dict[str, Pass] = {}
        if config.compares_with_start and self.reference is not None:
            passes["reference"] = self.reference.logprobs
        if self.critic is not None and config.rl.max_staleness == 0:  # else it may be in training
            passes["values"] = self.critic.values
        return passes

    def _annotate(self, batch: Batch, step: int) -> Batch:
        """Log-probs under other weights and values, only where something needs them."""
        config, algorithm = self.config, self.config.algorithm
        start_logp = None
        if config.compares_with_start:
            asked = self.reference.logprobs if self.reference else self.policy.base_logprobs
            start_logp = self._pass("reference", asked, batch, step)
            batch = batch.annotate(start_logp=start_logp)
        in_reward = algorithm.kl_coef > 0 and algorithm.kl_in == "reward"
        later_updates = config.updates_per_step > 1 and not algorithm.trains_pairs
        if in_reward or later_updates or algorithm.reference == "step":
            batch = batch.annotate(old_logp=self._pass("old_logp", self.policy.logprobs, batch, step))
        if algorithm.reference == "step":
            batch = batch.annotate(ref_logp=batch.annotations["old_logp"])
        elif start_logp is not None:
            batch = batch.annotate(ref_logp=start_logp)
        if algorithm.trains_pairs and "ref_logp" in batch.annotations:
            sums_B = batch.sum_per_sample(batch.annotations["ref_logp"])
            batch = batch.label(ref_logp=sums_B.astype(np.float32))
        if self.critic is not None:
            batch = batch.annotate(values=self._pass("values", self.critic.values, batch, step))
        return batch

    def _pass(self, name: str, call: Pass, batch: Batch, step: int) -> np.ndarray:
        """[T] values of a batch under a model: those that are there already, else by asking it now."""
        with self.watch.timed(name, step):
            early = self.passes.take(name, batch)
            return early if early is not None else self.supply.beside(call, batch, step=step)

    def _learn(self, batch: Batch, step: int) -> dict[str, float]:
        """Advantages, then the updates of critic and policy; the samples are settled in the ledger."""
        config = self.config
        batch = with_advantages(
            batch, config.algorithm, kl_coef=self.kl.value, max_new_tokens=config.rollout.max_new_tokens
        )
        if not self._teaches(batch):
            self.tracker.event("step_without_signal", step=step)
            return {}
        batch = batch.label(kl_coef=np.full(len(batch), self.kl.value, np.float32))
        minibatches = list(self._minibatches(batch, step))
        metrics: dict[str, float] = {}
        if self.critic is not None:
            with self.watch.timed("critic_update", step):
                metrics |= self.supply.beside(self.guard.update, self.critic, minibatches, step, step=step)
            mask = batch.loss_mask
            values_T, returns_T = (torch.from_numpy(batch.annotations[name][mask]) for name in ("values", "returns"))
            metrics["critic/explained_variance"] = explained_variance(values_T, returns_T)
        if self.critic is None or step > config.critic.warmup_steps:
            with self.watch.timed("update", step):
                metrics |= self.supply.beside(self.guard.update, self.policy, minibatches, step, step=step)
        if step == 1 + config.critic.warmup_steps:
            self._check_first_step(metrics)
        if self._learned(metrics):
            self.ledger.train(batch.sample_ids)
        return metrics

    def _teaches(self, batch: Batch) -> bool:
        """Whether an update on these samples would be one."""
        return bool(batch.annotations["advantages"].any()) if self.config.algorithm.only_advantages else len(batch) > 0

    def _learned(self, metrics: dict[str, float]) -> bool:
        """Whether any model took an update."""
        return any(metrics.get(f"{name}/updates", 0) > 0 for name in self.models)

    def _minibatches(self, batch: Batch, step: int) -> Iterator[Batch]:
        """Whole groups, shuffled anew each epoch; a single update takes the batch as it is."""
        if self.config.updates_per_step == 1:
            yield batch
            return
        random = np.random.default_rng([self.config.seed, step])
        for _ in range(self.config.rl.epochs_per_step):
            order = random.permutation(np.unique(batch.group_ids))
            for part in np.array_split(order, self.config.rl.minibatches_per_step):
                minibatch = batch.select(np.flatnonzero(np.isin(batch.group_ids, part)))
                if self._teaches(minibatch):
                    yield minibatch

    def _settle(self, metrics: dict[str, float], step: int, sample_ids: Sequence[int]) -> None:
        """Every sample of the step is trained, or dropped for a reason, when it ends; the KL's weight follows it."""
        learned = self._learned(metrics)
        left = self.ledger.in_flight.intersection(sample_ids)
        if left:
            self.ledger.drop(left, "not_selected" if learned else "nothing_learned")
        self.ledger.check()
        self.tracker.event("settled", step=step, samples=self.ledger.news())
        metrics |= {"rollout/admitted": float(self.ledger.admitted), "rollout/trained": float(self.ledger.trained)}
        metrics |= {f"rollout/dropped/{reason}": float(n) for reason, n in self.ledger.dropped.items()}
        if learned and "policy/kl_coef" in metrics:
            self.kl.update(
                metrics["policy/kl_per_sample"], self.config.rl.prompts_per_step * self.config.rl.samples_per_prompt
            )

    def _check_first_step(self, metrics: dict[str, float]) -> None:
        """Nothing was learned yet: engines, policy and reference are the same weights.

        Raises:
            RuntimeError: they are not; masks, temperatures or weights differ between the actors.
        """
        tolerance = FIRST_STEP_TOLERANCE[self.config.dtype]
        for name in ("mismatch/logp_abs_mean", "policy/kl"):
            value = metrics.get(name, 0.0)
            if abs(value) > tolerance:
                raise RuntimeError(f"{name} is {value:.2e} at the first step, not 0 within {tolerance:g}")

    def _measure_kl(self, batch: Batch) -> dict[str, float]:
        """KL(policy that sampled || starting policy), where the latter was asked."""
        if "start_logp" not in batch.annotations:
            return {}
        sampled_T = batch.annotations.get("old_logp", batch.rollout_logp)
        logp_T, start_T = (
            torch.from_numpy(values_T[batch.loss_mask]).double()
            for values_T in (sampled_T, batch.annotations["start_logp"])
        )
        metrics = {
            "policy/kl": float(kl_estimate(logp_T, start_T, "k3").mean()),
            "policy/kl_per_sample": float((logp_T - start_T).sum()) / len(batch),
        }
        return metrics | ({"policy/kl_coef": self.kl.value} if self.config.algorithm.kl_coef > 0 else {})

    def _record_lengths(self, batch: Batch, step: int) -> None:
        """Write down what a step takes."""
        response_lens = batch.response_lens
        lengths = {"lengths": response_lens.tolist(), "prompt_lengths": (batch.seq_lens - response_lens).tolist()}
        self.tracker.event("consumed", step=step, **lengths)

    def _record(self, step: int, groups: Sequence[Group]) -> None:
        """Write some of a step's samples."""
        rows = [
            {
                "prompt": group.prompt.prompt,
                "completion": generation.text,
                "reward": None if i in dropped else float(group.scores.totals[i]),
                "dropped": dropped.get(i),
                "finish_reason": generation.finish_reason,
                "messages": list(generation.messages),
                "sample_id": group.sample_ids[i],
            }
            for group, dropped in ((group, group.dropped()) for group in groups)
            for i, generation in enumerate(group.generations)
        ]
        self.tracker.samples(step, rows[: self.config.tracking.samples_per_step])


def alarms_of(config: Config, plan: Plan) -> RewardAlarms:
    """The alarms of a run's components."""
    models = {model.name for model in config.rewards.models}
    asking = zip(plan.components, config.rewards.functions, strict=False)  # functions come first
    judges = models | {component.name for component, entry in asking if entry.function in ASKING}
    weights = {component.name: component.weight for component in plan.components}
    return RewardAlarms(weights, judges)


def kl_controller(algorithm: AlgorithmConfig) -> FixedKL | AdaptiveKL:
    """What says how much the KL weighs."""
    if algorithm.kl_target is None:
        return FixedKL(algorithm.kl_coef)
    return AdaptiveKL(algorithm.kl_coef, algorithm.kl_target, algorithm.kl_horizon)
