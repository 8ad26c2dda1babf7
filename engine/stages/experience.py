"""Experience: prompts go to the engines, finished groups go to the reward functions while others are still generated.

Used by training and by evaluation alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.config import UserError
from engine.data.batch import Batch
from engine.data.prompts import Prompt
from engine.rewards.contract import RewardError, Row, Sample, Scores
from engine.roles import Generation, GenerationRequest, Sampling, SamplingSettings
from engine.tracking.tracker import Tracker


@dataclass(frozen=True)
class Group:
    """The responses to one prompt, scored."""

    prompt: Prompt
    sample_ids: list[int]
    generations: list[Generation]
    scores: Scores

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


def collect_groups(
    sampling: Sampling,
    tracker: Tracker,
    prompts: Sequence[Prompt],
    sample_ids: Sequence[Sequence[int]],
    seeds: Sequence[tuple[int, ...]],
    settings: SamplingSettings,
) -> list[Group]:
    """Generate and score one response per sample id; groups come back in the order of the prompts.

    Failed reward calls are recorded as events.
    """
    requests = [
        GenerationRequest(key, prompt.token_ids, group_seeds)
        for key, (prompt, group_seeds) in enumerate(zip(prompts, seeds, strict=True))
    ]
    generations: dict[int, list[Generation]] = {}
    scores: dict[int, Scores] = {}
    try:
        for key, generated in sampling.rollouts.generate(requests, settings):
            generations[key] = generated
            sampling.rewards.submit(key, _samples(prompts[key], sample_ids[key], generated))
        for key, scored in sampling.rewards.collect():
            scores[key] = scored
            _record(tracker, scored.incidents)
    except RewardError as error:
        _record(tracker, error.incidents)
        raise
    return [
        Group(prompt, list(ids), generations[key], scores[key])
        for key, (prompt, ids) in enumerate(zip(prompts, sample_ids, strict=True))
    ]


def _record(tracker: Tracker, incidents: Sequence[dict[str, Any]]) -> None:
    for incident in incidents:
        fields = dict(incident)
        tracker.event(fields.pop("kind"), **fields)


def _samples(prompt: Prompt, ids: Sequence[int], generations: Sequence[Generation]) -> list[Sample]:
    return [
        Sample(
            id=sample_id,
            prompt=prompt.prompt,
            completion=generation.text,
            row=Row(prompt.row),
            finish_reason=generation.finish_reason,
            num_tokens=len(generation.token_ids),
            completion_ids=generation.token_ids,
            prompt_ids=prompt.token_ids,
        )
        for sample_id, generation in zip(ids, generations, strict=True)
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
    parts: dict[str, list] = {name: [] for name in ("tokens", "loss_mask", "rollout_logp", "version")}
    for _, group, i in kept:
        prompt, response = group.prompt.token_ids, group.generations[i]
        parts["tokens"].append(np.array([*prompt, *response.token_ids], np.int32))
        parts["loss_mask"].append(np.repeat([False, True], [len(prompt), len(response.token_ids)]))
        parts["rollout_logp"].append(np.array([*[0.0] * len(prompt), *response.logprobs], np.float32))
        parts["version"].append(np.array([*[-1] * len(prompt), *response.versions], np.int32))
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
    )


def _component(scores: Scores, name: str, position: int) -> float:
    values = scores.components.get(name)
    return float("nan") if values is None else float(values[position])
