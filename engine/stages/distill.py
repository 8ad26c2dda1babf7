"""Distillation from a larger model with the same tokenizer.

    on_policy: prompts --> engines (student) --> answers --> divergence from the teacher, token by token --> update
    sequence:  prompts --> engines (teacher) --> answers, once --> supervised fine-tuning on them

On-policy is GKD (arXiv:2306.13649); the teacher runs inside the policy's actors, so logits never travel.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from engine.config import Config
from engine.data.batch import Batch
from engine.data.examples import Example, TokenSequence, to_batch
from engine.data.prompts import Prompt
from engine.plan import Plan
from engine.roles import Generation, GenerationRequest, SamplingSettings, Workers
from engine.stages.evaluation import EXAMPLES_PER_PASS, SEED_STREAM, evaluate_text
from engine.stages.experience import generate, sample_seeds
from engine.stages.offline import OfflineStage
from engine.tracking.tracker import Tracker

ANSWERS = "teacher_answers.json"


class DistillStage(OfflineStage):
    """Rows are prompts, with a `completion` where updates off the policy are wanted."""

    def __init__(self, config: Config, workers: Workers, tracker: Tracker, plan: Plan) -> None:
        assert workers.policy is not None, "the cluster starts what roles_of names"
        assert workers.sampling is not None
        super().__init__(config, workers, tracker, plan, workers.policy)
        self.policy = workers.policy
        self.rollouts = workers.sampling.rollouts
        self.on_policy = config.distill.mode == "on_policy"
        self.settings = SamplingSettings(
            config.rollout.temperature, config.rollout.max_new_tokens, tuple(config.rollout.stop)
        )

    def begin(self, step: int) -> None:
        """Bring the engines to the student's weights, or let the teacher answer every prompt."""
        if self.on_policy:
            self.rollouts.publish(step)
            return
        file = self.config.run_dir / ANSWERS
        if step == 0:
            train = self._answers([_prompt(example) for example in self.train], 0)
            held_out = self._answers([_prompt(example) for example in self.held_out], SEED_STREAM)
            file.with_suffix(".partial").write_text(json.dumps({"train": train, "held_out": held_out}))
            file.with_suffix(".partial").rename(file)
        answers = json.loads(file.read_text())
        self.train = _answered(self.train, answers["train"])
        self.held_out = _answered(self.held_out, answers["held_out"])

    def step(self, step: int) -> dict[str, float]:
        """One update, and the engines follow it."""
        metrics = super().step(step)
        return metrics | self.rollouts.publish(step) if self.on_policy else metrics

    def batch(self, rows: Sequence[int], step: int) -> Batch:
        """Answers of the student to these rows' prompts, or the rows' own completions."""
        examples = [self.train[row] for row in rows]
        if self.on_policy and self._is_on_policy(step):
            examples = _answered(examples, self._answers([_prompt(example) for example in examples], step))
        return to_batch(examples)

    def _is_on_policy(self, step: int) -> bool:
        share = self.config.distill.on_policy_fraction
        return float(np.random.default_rng([self.config.seed, step]).random()) < share

    def _answers(self, prompts: Sequence[Prompt], stream: int) -> list[list[int]]:
        """Token ids of one answer to each prompt."""
        requests = [
            GenerationRequest(i, prompt.token_ids, sample_seeds(self.config.seed, stream, i, count=1))
            for i, prompt in enumerate(prompts)
        ]
        answers: dict[int, Generation] = {}
        for start in range(0, len(requests), EXAMPLES_PER_PASS):  # each with a deadline of its own
            part = requests[start : start + EXAMPLES_PER_PASS]
            answers |= {key: generations[0] for key, generations in generate(self.rollouts, part, self.settings)}
        return [list(answers[i].token_ids) for i in range(len(prompts))]

    def measure(self, step: int) -> dict[str, float]:
        """Divergence from the teacher on the student's own held-out answers; perplexity of the rows' or teacher's."""
        metrics: dict[str, float] = {}
        if self.on_policy:
            prompts = [_prompt(example) for example in self.held_out]
            batch = to_batch(_answered(self.held_out, self._answers(prompts, SEED_STREAM)))
            divergence_T = self.policy.divergences(batch)
            metrics["eval/divergence"] = float(divergence_T[batch.loss_mask].mean())
        if all(example.sequences for example in self.held_out):
            metrics |= evaluate_text(self.policy, self.held_out, prefix="eval/")
        return metrics


def _prompt(example: Example) -> Prompt:
    assert example.prompt is not None
    return example.prompt


def _answered(examples: Sequence[Example], answers: Sequence[Sequence[int]]) -> list[Example]:
    """The examples with these answers in place of their own."""
    return [
        replace(example, sequences=(_sequence(_prompt(example), answer),))
        for example, answer in zip(examples, answers, strict=True)
    ]


def _sequence(prompt: Prompt, answer: Sequence[int]) -> TokenSequence:
    tokens = np.array([*prompt.token_ids, *answer], np.int32)
    return TokenSequence(tokens, np.repeat([False, True], [len(prompt.token_ids), len(answer)]))
