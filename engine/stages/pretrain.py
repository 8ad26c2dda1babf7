"""Pretraining: the next token of plain text, from random weights or going on from a model.

Measured against what needs no network at all: the perplexity of a unigram and of an interpolated bigram model of the
training tokens, on the same held-out tokens.
"""

from __future__ import annotations

from engine.config import Config
from engine.plan import Plan
from engine.roles import Workers
from engine.stages.evaluation import evaluate_text
from engine.stages.offline import OfflineStage
from engine.tracking.tracker import Tracker


class PretrainStage(OfflineStage):
    """Pieces of documents; every token but a piece's first is trained."""

    def __init__(self, config: Config, workers: Workers, tracker: Tracker, plan: Plan) -> None:
        assert workers.policy is not None, "the cluster starts what roles_of names"
        super().__init__(config, workers, tracker, plan, workers.policy)
        self.policy = workers.policy
        self.baselines = plan.baselines

    def measure(self, step: int) -> dict[str, float]:
        """Perplexity and token accuracy, beside the baselines."""
        return evaluate_text(self.policy, self.held_out, prefix="eval/") | self.baselines
