"""A reward model in training: a language model's body with a linear head, on comparisons, rankings or labelled steps.

Saved in the format of AutoModelForSequenceClassification (process reward models: AutoModelForTokenClassification).
Head 0 is shared; with annotator heads, column 1 + a is what annotator a adds to it.
Legend: R scored tokens of a micro-batch; a comparison's or ranking's samples have one each, its last.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import AutoTokenizer

from actors.adapters import add_adapter
from actors.packed_model import PackedModel, PackedScores, load_scoring_model
from actors.process import RankInfo
from actors.trained import Minibatch, Stats, TrainedActor, TrainedGroup
from actors.trainer import Trainable
from engine.algorithms.reward_model import bradley_terry, plackett_luce, process_bce
from engine.config import Config
from engine.data.batch import Batch

MEANS = {
    "pairwise": ("train/accuracy", "train/margin", "train/reward"),
    "ranking": ("train/reward",),
    "process": ("train/accuracy",),
}


class RewardModelActor(TrainedActor):
    """One rank of a reward model."""

    def __init__(self, config: Config, info: RankInfo, updates: int, annotators: int) -> None:
        """`annotators` is the number of heads beside the shared one."""
        super().__init__(config, info, updates)
        self.annotators = annotators

    def make(self) -> Trainable:
        """The body of the starting model with a new head."""
        config, process = self.config, self.config.reward_model.kind == "process"
        model = load_scoring_model(config, config.model.path, per_token=process, heads=1 + self.annotators)
        model.config.pad_token_id = _pad_token_id(config)
        adapter = None
        if config.trains_adapter:
            adapter = add_adapter(model, config.model.adapter, task="TOKEN_CLS" if process else "SEQ_CLS")
        return Trainable(model, adapter, PackedScores(PackedModel(model, adapter.hidden_states if adapter else None)))

    def new_stats(self) -> Stats:
        """Names of the kind's metrics."""
        return Stats(MEANS[self.config.reward_model.kind])

    def loss(self, batch: Batch, minibatch: Minibatch, stats: Stats) -> torch.Tensor:
        """This micro-batch's share: per pair, per list or per step, divided by those of the whole update."""
        row = self.row(batch)
        heads_RH = self.trainer.engine(row)
        if len(batch) == 0:
            return heads_RH.sum()
        config = self.config.reward_model
        score_R = self._scores(heads_RH, batch)
        if config.kind == "process":
            labels_R = torch.from_numpy(batch.annotations["labels"][batch.loss_mask]).to(score_R)
            stats.add({"train/accuracy": ((score_R > 0) == (labels_R > 0.5)).double()})
            return process_bce(score_R, labels_R).sum() / minibatch.total_tokens
        stats.add({"train/reward": score_R})
        if config.kind == "ranking":
            ranks_R = torch.from_numpy(batch.labels["rank"]).to(score_R)
            lens = torch.tensor([len(group) for group in batch.groups()])
            loss = plackett_luce(score_R, ranks_R, lens).sum()
        else:
            loss = self._pairwise(score_R, batch, stats)
        return loss / minibatch.total_groups + self._decay(heads_RH, batch, minibatch)

    def _scores(self, heads_RH: torch.Tensor, batch: Batch) -> torch.Tensor:
        """[R] the shared head, plus each sample's annotator's own."""
        if self.annotators == 0:
            return heads_RH[:, 0]
        column_R = torch.from_numpy(batch.labels["annotator"]).to(heads_RH.device).long() + 1
        return heads_RH[:, 0] + heads_RH.gather(1, column_R[:, None])[:, 0]

    def _pairwise(self, score_R: torch.Tensor, batch: Batch, stats: Stats) -> torch.Tensor:
        config = self.config.reward_model
        chosen_N, rejected_N = score_R[0::2], score_R[1::2]
        margin = batch.labels.get("margin")
        margin_N = None if margin is None else torch.from_numpy(margin[0::2]).to(score_R)
        stats.add({"train/accuracy": (chosen_N > rejected_N).double(), "train/margin": chosen_N - rejected_N})
        loss_N = bradley_terry(chosen_N, rejected_N, margin=margin_N)
        if config.center_coef > 0:
            loss_N = loss_N + config.center_coef * (chosen_N + rejected_N) ** 2
        return loss_N.sum()

    def _decay(self, heads_RH: torch.Tensor, batch: Batch, minibatch: Minibatch) -> torch.Tensor | float:
        """Squared annotator parts of the scores: a ridge on what annotators add (zero without annotator heads)."""
        decay = self.config.reward_model.head_decay
        if self.annotators == 0 or decay == 0:
            return 0.0
        return decay * (heads_RH[:, 1:] ** 2).sum() / self.annotators / minibatch.total_sequences

    @torch.inference_mode()
    def scores(self, microbatches: Sequence[Batch]) -> list[np.ndarray]:
        """[R] float32 scores of each micro-batch's scored tokens, by the heads of their annotators."""
        self.trainer.engine.eval()
        results = []
        for batch in microbatches:
            heads_RH = self.trainer.engine(self.row(batch))
            score_R = self._scores(heads_RH, batch) if len(batch) else heads_RH[:, 0]
            results.append(score_R.float().cpu().numpy())
        return results


def _pad_token_id(config: Config) -> int:
    """A token that ends no response: transformers takes the last other token of a row as the one to score."""
    tokenizer = AutoTokenizer.from_pretrained(config.model.path, trust_remote_code=config.model.trust_remote_code)
    candidates = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, 0, 1]
    return next(token for token in candidates if token is not None and token != tokenizer.eos_token_id)


class RewardModelGroup(TrainedGroup):
    """The controller's side of the reward model."""

    def scores(self, batch: Batch) -> np.ndarray:
        """[T] float32: scores at the scored tokens, 0 elsewhere."""
        split = self._split(batch)
        return split.merge(self.workers.scatter("scores", split.shares(), timeout_s=self.config.timeouts.update))
