"""Preference tuning: DPO and its relatives, KTO, ORPO, SimPO.

The reference is the starting model. Its log-probs of all rows are computed once, before the first update, by the very
actors that are trained afterwards (or by the frozen weights below an adapter), and kept in the run's folder: no second
copy of the model is ever loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from engine.algorithms.evaluation import mean_and_standard_error
from engine.config import Config
from engine.data.batch import Batch
from engine.data.examples import Example, TokenSequence, to_batch
from engine.plan import Plan
from engine.roles import Workers
from engine.stages.evaluation import passes
from engine.stages.offline import OfflineStage
from engine.tracking.tracker import Tracker

CACHE = "reference_logprobs.npz"


class PreferenceStage(OfflineStage):
    """Pairs, chosen before rejected; for KTO single answers that are desirable or not."""

    def __init__(self, config: Config, workers: Workers, tracker: Tracker, plan: Plan) -> None:
        assert workers.policy is not None, "the cluster starts what roles_of names"
        super().__init__(config, workers, tracker, plan, workers.policy)
        self.policy = workers.policy
        self.kto = config.preference.loss == "kto"
        self.needs_reference = config.preference.loss not in ("orpo", "simpo")
        self.mismatched = (
            mismatched(plan.train, config.training.rows_per_update, config.training.max_length) if self.kto else []
        )

    def begin(self, step: int) -> None:
        """The reference's log-probs: computed before the first update, read again after a restart."""
        if not self.needs_reference:
            return
        file = self.config.run_dir / CACHE
        if step == 0:
            base = self.policy.base_logprobs if self.config.trains_adapter else self.policy.logprobs
            sets = {"train": self.train, "held_out": self.held_out, "mismatched": self.mismatched}
            with file.with_suffix(".partial").open("wb") as stream:
                arrays: dict[str, Any] = {name: _per_sequence(base, examples) for name, examples in sets.items()}
                np.savez(stream, **arrays)
            file.with_suffix(".partial").rename(file)
        with np.load(file) as cached:
            self.reference = {name: cached[name] for name in cached.files}

    def batch(self, rows: Sequence[int], step: int) -> Batch:
        """The rows with what the loss needs of the reference and of the whole update."""
        batch = to_batch([self.train[row] for row in rows])
        if self.needs_reference:
            width = 1 if self.kto else 2
            positions = [row * width + i for row in rows for i in range(width)]
            batch = batch.label(ref_logp=self.reference["train"][positions].astype(np.float32))
        if self.kto:
            batch = batch.label(kl_baseline=np.full(len(batch), self._kl_baseline(rows), np.float32))
        return batch

    def _kl_baseline(self, rows: Sequence[int]) -> float:
        """KTO's z0 (arXiv:2402.01306): mean log-ratio of answers to other rows' prompts, at least 0."""
        logp_B = _per_sequence(self.policy.logprobs, [self.mismatched[row] for row in rows])
        return max(0.0, float((logp_B - self.reference["mismatched"][list(rows)]).mean()))

    def measure(self, step: int) -> dict[str, float]:
        """How often the chosen answer has the higher implicit reward, by how much, and both answers' log-probs."""
        logp_B = _per_sequence(self.policy.logprobs, self.held_out)
        lens_B = np.array([s.mask.sum() for example in self.held_out for s in example.sequences])
        reward_B = logp_B - self.reference["held_out"] if self.needs_reference else logp_B / lens_B
        if self.config.preference.loss == "ipo":
            reward_B = reward_B / lens_B
        reward_B = self.config.preference.beta * reward_B
        if self.kto:
            good_B = np.array([example.labels["desirable"][0] > 0.5 for example in self.held_out])
            return {
                "eval/reward_desirable": float(reward_B[good_B].mean()) if good_B.any() else 0.0,
                "eval/reward_undesirable": float(reward_B[~good_B].mean()) if (~good_B).any() else 0.0,
            }
        margin_N = reward_B[0::2] - reward_B[1::2]
        # Before the first update the policy is the reference and every margin is 0: half of the ties count.
        accuracy, accuracy_se = mean_and_standard_error(((margin_N > 0) + 0.5 * (margin_N == 0)).tolist())
        margin, margin_se = mean_and_standard_error(margin_N.tolist())
        return {
            "eval/preference_accuracy": accuracy,
            "eval/preference_accuracy_se": accuracy_se,
            "eval/implicit_margin": margin,
            "eval/implicit_margin_se": margin_se,
            "eval/logp_chosen": float(logp_B[0::2].mean()),
            "eval/logp_rejected": float(logp_B[1::2].mean()),
        }


def _per_sequence(logprobs: Callable[[Batch], np.ndarray], examples: Sequence[Example]) -> np.ndarray:
    """Summed log-probs of the trained tokens, sequence after sequence; float64."""
    parts = [batch.sum_per_sample(logprobs(batch)) for batch in passes(examples)]
    return np.concatenate(parts) if parts else np.zeros(0)


def mismatched(examples: Sequence[Example], rows_per_update: int, max_length: int) -> list[Example]:
    """Each prompt with the answer of an earlier row, cyclic within `rows_per_update` neighbours.

    It is the row before, or as many rows back as it takes that fewest prompts, and nearly always none, get an answer
    to themselves: a pair gives two neighbours with one prompt, and the paper's answers are unrelated to their prompts.
    Answers are cut to `max_length` tokens in all.
    """
    result = []
    for start in range(0, len(examples), rows_per_update):
        block = [examples[i] for i in range(start, min(start + rows_per_update, len(examples)))]
        prompts = [_context(example).tobytes() for example in block]
        shift = min(range(1, len(block)), key=partial(_own_answers, prompts), default=0)
        result += [_with_answer_of(example, block[i - shift], max_length) for i, example in enumerate(block)]
    return result


def _own_answers(prompts: Sequence[bytes], shift: int) -> int:
    """How many prompts are also those of the row `shift` rows back."""
    return sum(prompt == prompts[i - shift] for i, prompt in enumerate(prompts))


def _context(example: Example) -> np.ndarray:
    """Token ids before the answer."""
    [sequence] = example.sequences
    return sequence.tokens[: int(sequence.mask.argmax())]


def _with_answer_of(example: Example, other: Example, max_length: int) -> Example:
    context, [foreign] = _context(example), other.sequences
    answer = foreign.tokens[int(foreign.mask.argmax()) :][: max_length - len(context)]
    mask = np.repeat([False, True], [len(context), len(answer)])
    return replace(example, sequences=(TokenSequence(np.concatenate([context, answer]), mask),))
