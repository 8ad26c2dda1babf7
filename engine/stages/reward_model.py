"""Reward models: from comparisons (Bradley-Terry), rankings (Plackett-Luce) or labelled reasoning steps.

The final model's folder also holds `reward_model.json`: the kind, the annotators behind each head, and the mean and
standard deviation of the rewards on held-out rows (training rows where there are none), for normalising them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from engine.algorithms.evaluation import calibration_error, mean_and_standard_error
from engine.config import Config
from engine.data.examples import Example
from engine.plan import Plan
from engine.roles import Workers
from engine.stages.evaluation import passes
from engine.stages.offline import OfflineStage
from engine.tracking.tracker import Tracker

ROWS_FOR_STATISTICS = 512
HISTOGRAM_BINS = 20


class RewardModelStage(OfflineStage):
    """Rows scored at their last token (process: at each step's last token)."""

    def __init__(self, config: Config, workers: Workers, tracker: Tracker, plan: Plan) -> None:
        assert workers.reward_model is not None, "the cluster starts what roles_of names"
        super().__init__(config, workers, tracker, plan, workers.reward_model)
        self.reward_model = workers.reward_model
        self.annotators = plan.annotators

    def measure(self, step: int) -> dict[str, float]:
        """Accuracy with its standard error, calibration, and the distribution of margins."""
        kind = self.config.reward_model.kind
        if kind == "process":
            return self._measure_steps()
        scores = self._scores(self.held_out)
        margins = [_margins(example, values, kind) for example, values in zip(self.held_out, scores, strict=True)]
        accuracy, error = mean_and_standard_error([float(_wins(m).mean()) for m in margins])
        flat = np.concatenate(margins)
        counts, edges = np.histogram(flat, bins=HISTOGRAM_BINS)
        self.tracker.event("margin_histogram", step=step, counts=counts, edges=edges)
        # Confidence in the likelier side, against how often that side is the right one.
        confidence = 1 / (1 + np.exp(-np.abs(flat)))
        metrics = {
            "eval/accuracy": accuracy,
            "eval/accuracy_se": error,
            "eval/calibration_error": calibration_error(confidence, flat > 0),
            "eval/margin": float(flat.mean()),
            "eval/margin_std": float(flat.std()),
            "eval/reward_std": float(np.concatenate(scores).std()),
        }
        return metrics | self._per_annotator(margins)

    def _measure_steps(self) -> dict[str, float]:
        scores = np.concatenate(self._scores(self.held_out))
        labels = np.concatenate(
            [
                values[sequence.mask]
                for example in self.held_out
                for sequence, values in zip(example.sequences, example.token_labels or (), strict=True)
            ]
        )
        probability = 1 / (1 + np.exp(-scores))
        right = (probability > 0.5) == (labels > 0.5)
        accuracy, error = mean_and_standard_error(right.astype(float).tolist())
        return {
            "eval/accuracy": accuracy,
            "eval/accuracy_se": error,
            "eval/calibration_error": calibration_error(probability, labels > 0.5),
            "eval/share_of_right_steps": float((labels > 0.5).mean()),
        }

    def _per_annotator(self, margins: Sequence[np.ndarray]) -> dict[str, float]:
        """Accuracy of each annotator's own comparisons, and the worst of them."""
        if not self.annotators:
            return {}
        who = np.array([int(example.labels["annotator"][0]) for example in self.held_out])
        wins = np.array([_wins(m).mean() for m in margins])
        by_name = {name: wins[who == a] for a, name in enumerate(self.annotators) if (who == a).any()}
        metrics = {f"eval/accuracy/{name}": float(values.mean()) for name, values in by_name.items()}
        return metrics | {"eval/accuracy_worst_annotator": min(metrics.values())}

    def save(self, folder: Path) -> None:
        """Write the model and how its rewards are distributed."""
        source = self.held_out if len(self.held_out) else self.train
        examples = [source[i] for i in range(min(len(source), ROWS_FOR_STATISTICS))]
        rewards = np.concatenate(self._scores(examples))
        config = self.config.reward_model
        record = {
            "kind": config.kind,
            "annotators": list(self.annotators),
            "mean": float(rewards.mean()),
            "std": float(rewards.std()),
            "step_separator": config.step_separator,
        }
        self.reward_model.save(folder, record)

    def _scores(self, examples: Sequence[Example]) -> list[np.ndarray]:
        """Of each example: the scores of its scored tokens, in order."""
        results: list[np.ndarray] = []
        for batch in passes(examples):
            values = self.reward_model.scores(batch)[batch.loss_mask]
            counts = [int(batch.response_lens[group].sum()) for group in batch.groups()]
            results += np.split(values.astype(np.float64), np.cumsum(counts)[:-1])
        return results


def _margins(example: Example, scores: np.ndarray, kind: str) -> np.ndarray:
    """Of every strictly ordered pair: the better response's score minus the other's."""
    if kind == "pairwise":
        return scores[:1] - scores[1:]
    ranks = np.array(example.labels["rank"])
    better, worse = np.nonzero(ranks[:, None] < ranks[None])
    return scores[better] - scores[worse]


def _wins(margins: np.ndarray) -> np.ndarray:
    """1 where the better response scores higher, half for a tie."""
    return (margins > 0) + 0.5 * (margins == 0)
