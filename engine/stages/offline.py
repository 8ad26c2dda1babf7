"""The loop over rows that every stage but reinforcement learning runs: an update on some rows at a time.

    rows --(order driven by the seed)--> batch --> update

A stage says what a batch of rows is and what is measured on held-out ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.config import Config
from engine.data.batch import Batch
from engine.data.examples import to_batch
from engine.data.sampler import RowSampler
from engine.plan import Plan
from engine.roles import Trained, Workers
from engine.stages.evaluation import evaluate_answers, evaluate_text
from engine.stages.experience import Experience, RewardScheme
from engine.stages.guard import NumericsGuard
from engine.stages.loop import Stopwatch
from engine.tracking.tracker import Tracker


class OfflineStage(ABC):
    """Passes over rows. Subclasses change what an update sees (`batch`) and what is measured (`measure`)."""

    def __init__(self, config: Config, workers: Workers, tracker: Tracker, plan: Plan, trained: Trained) -> None:
        self.config = config
        self.trained = trained
        self.models = {"model": trained}
        self.guard = NumericsGuard(tracker, stop_after=config.optimizer.stop_after_skipped)
        self._policy = workers.policy
        self.sampling = workers.sampling
        self.experience = Experience(workers.sampling, tracker, RewardScheme.of(plan)) if workers.sampling else None
        self.tracker = tracker
        self.name = config.stage
        self.train = plan.train
        self.held_out = plan.held_out
        self.general_text = plan.general_text
        self.held_out_prompts = plan.held_out_prompts
        self.total_steps = plan.updates
        self.sampler = RowSampler(len(plan.train), seed=config.seed)
        self.watch = Stopwatch(tracker)
        self._rows_left = plan.rows

    def begin(self, step: int) -> None:  # noqa: B027, most stages have nothing to make ready
        """Nothing needs to be ready before the first update."""

    def step(self, step: int) -> dict[str, float]:
        """One optimizer update."""
        rows = self.sampler.next(min(self.config.training.rows_per_update, self._rows_left))
        self._rows_left -= len(rows)
        with self.watch.timed("batch", step):
            batch = self.batch(rows, step)
        with self.watch.timed("update", step):
            metrics = self.guard.update(self.trained, [batch], step)
        return metrics | {
            "rollout/tokens": float(len(batch.tokens)),
            "train/tokens_in_loss": float(batch.loss_mask.sum()),
            "train/epoch": float(self.sampler.epoch),
            **self.watch.lap(),
        }

    def batch(self, rows: Sequence[int], step: int) -> Batch:
        """What an update on these rows sees."""
        return to_batch([self.train[row] for row in rows])

    @abstractmethod
    def measure(self, step: int) -> dict[str, float]:
        """`eval/...` of the held-out rows."""

    def evaluate(self, step: int) -> dict[str, float]:
        """The held-out rows, and where reward functions are given, answers to their prompts."""
        metrics = self.measure(step) if len(self.held_out) else {}
        metrics |= self.general()
        experience = self.experience
        if experience is not None and self.held_out_prompts and experience.scheme.composition.components:
            self.publish(step)
            metrics |= evaluate_answers(self.config, experience, self.held_out_prompts)
        return metrics

    def publish(self, step: int) -> None:
        """Bring the engines to the current weights."""
        assert self.sampling is not None
        self.sampling.rollouts.publish(step)

    def save(self, folder: Path) -> None:
        """Write the model."""
        self.trained.save(folder)

    def state(self) -> dict[str, Any]:
        """Order of rows."""
        return {"sampler": self.sampler.state_dict(), "rows_left": self._rows_left}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.sampler.load_state_dict(state["sampler"])
        self._rows_left = state["rows_left"]

    def general(self) -> dict[str, float]:
        """Perplexity on general text: what it rises by from the first step to the last was forgotten."""
        if self._policy is None or not len(self.general_text):
            return {}
        metrics = evaluate_text(self._policy, self.general_text, prefix="eval/general_")
        return {name: metrics[name] for name in ("eval/general_perplexity", "eval/general_token_accuracy")}
