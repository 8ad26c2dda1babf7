"""Supervised fine-tuning: the mean negative log-likelihood of the assistant's tokens."""

from __future__ import annotations

from engine.config import Config
from engine.plan import Plan
from engine.roles import Workers
from engine.stages.evaluation import evaluate_text
from engine.stages.offline import OfflineStage
from engine.tracking.tracker import Tracker


class SFTStage(OfflineStage):
    """Conversations; which tokens are trained was decided with the rows (engine/data/conversations.py)."""

    def __init__(self, config: Config, workers: Workers, tracker: Tracker, plan: Plan) -> None:
        assert workers.policy is not None, "the cluster starts what roles_of names"
        super().__init__(config, workers, tracker, plan, workers.policy)
        self.policy = workers.policy

    def measure(self, step: int) -> dict[str, float]:
        """Perplexity and accuracy of the trained tokens."""
        return evaluate_text(self.policy, self.held_out, prefix="eval/")
