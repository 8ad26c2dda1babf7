"""Experience: prompts go to the engines, finished groups to the reward functions while others are still generated.

    ask(prompts) --> engines --> poll(): responses --> rewards --> poll(): scored groups in `done`

Used by training and by evaluation alike. Nobody waits for a group but who asked for it. What the components come to is
decided by `compose`, over the groups that belong together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from engine.config import UserError
from engine.data.batch import Batch
from engine.data.prompts import Prompt
from engine.data.steps import StepCutter
from engine.plan import Plan
from engine.rewards.composition import ENVIRONMENT, Composition
from engine.rewards.contract import RewardError, Sample, Scores
from engine.roles import Generation, GenerationRequest, Rollouts, Sampling, SamplingSettings
from engine.row import Row
from engine.tracking.tracker import Tracker

WAIT_S = 1.0
"""How long one look at engines and rewards may wait; longer waits are made of these."""
TICK_S = 0.02
"""The same, where both have something under way, which are looked at by turns."""
STEP_FIELDS = ("step_ends", "step_rewards")
"""Annotations of a batch: 1 at the last token of each step, and what was earned there."""


@dataclass(frozen=True)
class Group:
    """The responses to one prompt, scored."""

    prompt: Prompt
    sample_ids: list[int]
    generations: list[Generation]
    scores: Scores
    step_ends: list[list[int]]
    """For each sample, position of the last token of each step of its response; empty where nothing asks for them."""

    def dropped(self) -> dict[int, str]:
        """Position of each sample that cannot be trained on, and why."""
        broken = [i for i, g in enumerate(self.generations) if not np.isfinite(g.logprobs).all()]
        return dict.fromkeys(broken, "logp_not_finite") | self.scores.dropped

    def kept(self) -> list[int]:
        """Positions of the samples that can be trained on."""
        dropped = self.dropped()
        return [i for i in range(len(self.sample_ids)) if i not in dropped]

    def differs(self) -> bool:
        """Whether the samples that can be trained on have different rewards."""
        kept = self.kept()
        return bool(kept) and bool(np.ptp(self.scores.totals[kept]) > 0)


def sample_seeds(*key: int, count: int) -> tuple[int, ...]:
    """`count` seeds that depend on the key alone, so that a sample does not depend on which engine draws it or when."""
    return tuple(int(s) for s in np.random.SeedSequence(key).generate_state(count))


@dataclass(frozen=True)
class RewardScheme:
    """What is made of the components: where steps end, and how the sum is composed."""

    composition: Composition
    cutter: StepCutter | None
    """None where nothing asks for steps but an environment, whose turns they are."""

    @staticmethod
    def of(plan: Plan) -> RewardScheme:
        """As the preflight found it."""
        return RewardScheme(Composition(plan.components), plan.cutter)

    def step_ends(self, generation: Generation) -> list[int]:
        """Positions of the last token of each step."""
        if generation.messages or self.cutter is None:
            return list(generation.turn_ends)
        return self.cutter.ends(generation.token_ids)

    def step_texts(self, generation: Generation, ends: Sequence[int]) -> tuple[str, ...]:
        """The text of each step."""
        if generation.messages or self.cutter is None:
            return tuple(m["content"] for m in generation.messages if m["role"] == "assistant")
        return self.cutter.texts(generation.token_ids, ends)


class Experience:
    """Groups on their way from prompts to scores, each under a number of its own; later ones have higher numbers."""

    def __init__(self, sampling: Sampling, tracker: Tracker, scheme: RewardScheme) -> None:
        self.rollouts, self.rewards = sampling.rollouts, sampling.rewards
        self.tracker = tracker
        self.scheme = scheme
        self.done: dict[int, Group] = {}
        """Groups that are generated and scored; who takes one removes it."""
        self._asked: dict[int, tuple[Prompt, list[int]]] = {}
        self._scoring: dict[int, Group] = {}
        self._next = 0

    @property
    def under_way(self) -> bool:
        """Whether groups are outstanding."""
        return bool(self._asked or self._scoring)

    @property
    def only_scoring(self) -> bool:
        """Whether all that is outstanding is scores."""
        return bool(self._scoring) and not self._asked

    def ask(
        self,
        prompts: Sequence[Prompt],
        sample_ids: Sequence[Sequence[int]],
        seeds: Sequence[tuple[int, ...]],
        settings: SamplingSettings,
    ) -> list[int]:
        """Have one response per sample id generated and scored; returns the groups' numbers."""
        requests = [
            GenerationRequest(self._next + i, prompt.token_ids, group_seeds, prompt.row, tuple(ids))
            for i, (prompt, group_seeds, ids) in enumerate(zip(prompts, seeds, sample_ids, strict=True))
        ]
        self._next += len(requests)
        for request, prompt, ids in zip(requests, prompts, sample_ids, strict=True):
            self._asked[request.key] = (prompt, list(ids))
        self.rollouts.ask(requests, settings)
        return [request.key for request in requests]

    def poll(self, wait_s: float) -> None:
        """Take what the engines and the rewards have finished; waits for the first of it up to `wait_s` seconds.

        Failed reward calls and failed episodes are recorded as events.

        Raises:
            RewardError: a reward failed that must not fail.
        """
        try:
            if self._asked:
                for number, generations in self.rollouts.poll(min(wait_s, TICK_S) if self._scoring else wait_s):
                    self._score(number, generations)
            if self._scoring:
                still = 0.0 if self._asked else wait_s
                for number, scores in self.rewards.poll(still, engines_idle=not self._asked):
                    group = self._scoring.pop(number)
                    scores = _checked(scores, group.generations, group.step_ends, group.sample_ids)
                    _record(self.tracker, scores.incidents)
                    self.done[number] = replace(group, scores=scores)
        except RewardError as error:
            _record(self.tracker, error.incidents)
            raise

    def compose(self, groups: Sequence[Group], *, learn: bool) -> list[Group]:
        """The groups with their totals. Without `learn` as they are compared over time (see `Composition`)."""
        scores = self.scheme.composition.compose([group.scores for group in groups], learn=learn)
        return [replace(group, scores=composed) for group, composed in zip(groups, scores, strict=True)]

    def collect(
        self,
        prompts: Sequence[Prompt],
        sample_ids: Sequence[Sequence[int]],
        seeds: Sequence[tuple[int, ...]],
        settings: SamplingSettings,
    ) -> list[Group]:
        """`ask`, and wait for all of it; the groups, composed without learning, in the order of the prompts."""
        numbers = self.ask(prompts, sample_ids, seeds, settings)
        while not all(number in self.done for number in numbers):
            self.poll(WAIT_S)
        return self.compose([self.done.pop(number) for number in numbers], learn=False)

    def _score(self, number: int, generations: list[Generation]) -> None:
        prompt, ids = self._asked.pop(number)
        ends = [self.scheme.step_ends(generation) for generation in generations]
        texts = [self.scheme.step_texts(g, e) for g, e in zip(generations, ends, strict=True)]
        self._scoring[number] = Group(prompt, ids, generations, Scores.without_opinion(len(ids)), ends)
        self.rewards.submit(number, _samples(prompt, ids, generations, texts))


def generate(
    rollouts: Rollouts, requests: Sequence[GenerationRequest], settings: SamplingSettings
) -> Iterator[tuple[int, list[Generation]]]:
    """Have prompts answered and yield (key, responses) as each is, in any order; nothing else may be under way."""
    rollouts.ask(requests, settings)
    left = {request.key for request in requests}
    while left:
        for key, generations in rollouts.poll(WAIT_S):
            left.remove(key)
            yield key, generations


def _checked(
    scores: Scores, generations: Sequence[Generation], ends: Sequence[Sequence[int]], sample_ids: Sequence[int]
) -> Scores:
    """With what episodes brought, without those that were broken off, and steps only where there is one value each."""
    if any(g.turn_rewards for g in generations):
        sums = np.array([sum(g.turn_rewards) if g.turn_rewards else np.nan for g in generations])
        steps = [np.array(g.turn_rewards) if g.turn_rewards else None for g in generations]
        kept = replace(scores, components=scores.components | {ENVIRONMENT: sums.astype(np.float32)})
        scores = replace(kept, steps=scores.steps | {ENVIRONMENT: steps})
    failures = {i: g.failure for i, g in enumerate(generations) if g.failure is not None}
    incidents = [
        {"kind": kind, "function": ENVIRONMENT, "sample_id": sample_ids[i], "attempt": 1, "message": message}
        for i, (kind, message) in failures.items()
    ]
    scores = scores.drop({i: kind for i, (kind, _) in failures.items()}, incidents)
    if not any(ends):  # nothing says where steps end, so that per-step values are no more than their sum
        return replace(scores, steps={})
    wrong = {
        i: f"returned {len(held)} values for {len(ends[i])} steps (rewards.steps says where steps end)"
        for per_sample in scores.steps.values()
        for i, held in enumerate(per_sample)
        if held is not None and len(held) != len(ends[i])
    }
    incidents = [
        {"kind": "reward_error", "function": "steps", "sample_id": sample_ids[i], "attempt": 1, "message": message}
        for i, message in wrong.items()
    ]
    cleared = {
        name: [None if i in wrong else held for i, held in enumerate(per_sample)]
        for name, per_sample in scores.steps.items()
    }
    return replace(scores, steps=cleared).drop(dict.fromkeys(wrong, "reward_error"), incidents)


def _record(tracker: Tracker, incidents: Sequence[dict[str, Any]]) -> None:
    for incident in incidents:
        fields = dict(incident)
        tracker.event(fields.pop("kind"), **fields)


def _samples(
    prompt: Prompt, ids: Sequence[int], generations: Sequence[Generation], step_texts: Sequence[tuple[str, ...]]
) -> list[Sample]:
    return [
        Sample(
            id=sample_id,
            prompt=prompt.prompt,
            completion=generation.text,
            row=Row(prompt.row),
            finish_reason=generation.finish_reason,
            num_tokens=len(generation.token_ids) - sum(generation.observed),
            completion_ids=generation.token_ids,
            prompt_ids=generation.prompt_ids or prompt.token_ids,
            messages=generation.messages,
            step_texts=texts,
        )
        for sample_id, generation, texts in zip(ids, generations, step_texts, strict=True)
    ]


def no_reward_error(groups: Sequence[Group]) -> UserError:
    """What to say when no sample has a reward."""
    reasons = Counter(reason for group in groups for reason in group.dropped().values())
    messages = [i["message"] for group in groups for i in group.scores.incidents]
    last = f"; the last failure: {messages[-1]}" if messages else ""
    return UserError(
        f"rewards: every sample was dropped ({', '.join(f'{n} x {reason}' for reason, n in reasons.items())}){last}. "
        "Mend the reward function, or return a number for these rows (events.jsonl holds each failure)"
    )


def to_batch(groups: Sequence[Group]) -> Batch:
    """The samples that have a reward, prompt and response tokens as they were, as one ragged batch.

    Raises:
        UserError: no sample has a reward.
    """
    kept = [(number, group, i) for number, group in enumerate(groups) for i in group.kept()]
    if not kept:
        raise no_reward_error(groups)
    parts: dict[str, list] = {name: [] for name in ("tokens", "loss_mask", "rollout_logp", "version", *STEP_FIELDS)}
    for _, group, i in kept:
        response = group.generations[i]
        prompt = response.prompt_ids or group.prompt.token_ids
        parts["tokens"].append(np.array([*prompt, *response.token_ids], np.int32))
        observed = np.array(response.observed or [False] * len(response.token_ids), bool)
        parts["loss_mask"].append(np.concatenate([np.zeros(len(prompt), bool), ~observed]))
        parts["rollout_logp"].append(np.array([*[0.0] * len(prompt), *response.logprobs], np.float32))
        parts["version"].append(np.array([*[-1] * len(prompt), *response.versions], np.int32))
        ends_T, rewards_T = (
            np.zeros(len(parts["tokens"][-1]), np.float32),
            np.zeros(len(parts["tokens"][-1]), np.float32),
        )
        if group.step_ends[i]:
            positions = len(prompt) + np.array(group.step_ends[i])
            steps = group.scores.step_rewards[i]
            ends_T[positions], rewards_T[positions] = 1.0, 0.0 if steps is None else steps
        parts["step_ends"].append(ends_T)
        parts["step_rewards"].append(rewards_T)
    stepwise = {name: np.concatenate(parts.pop(name)) for name in STEP_FIELDS}
    names = sorted({name for group in groups for name in group.scores.components})
    return Batch(
        **{name: np.concatenate(arrays) for name, arrays in parts.items()},
        seq_lens=np.array([len(tokens) for tokens in parts["tokens"]], np.int32),
        group_ids=np.array([number for number, _, _ in kept], np.int64),
        sample_ids=np.array([group.sample_ids[i] for _, group, i in kept], np.int64),
        totals=np.array([group.scores.totals[i] for _, group, i in kept], np.float32),
        rewards={
            name: np.array([_component(group.scores, name, i) for _, group, i in kept], np.float32) for name in names
        },
        annotations=stepwise if stepwise["step_ends"].any() else {},
    )


def _component(scores: Scores, name: str, position: int) -> float:
    values = scores.components.get(name)
    return float("nan") if values is None else float(values[position])
