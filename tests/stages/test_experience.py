"""From answers and episodes to a batch: what is trained, where rewards land, and what is dropped for which reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.config import AlgorithmConfig
from engine.data.prompts import Prompt
from engine.rewards.composition import Component, Composition
from engine.rewards.contract import Scores
from engine.roles import Generation, SamplingSettings
from engine.stages.advantage import with_advantages
from engine.stages.experience import Experience, Group, RewardScheme, to_batch
from engine.stages.measures import measures
from tests.stages.doubles import Engines, Rewards, sampling

PROMPT = Prompt((1, 2), "p", {"answer": 4})


def episode(reward: tuple[float, ...] = (0.0, 1.0), **changes: Any) -> Generation:
    """Two turns of the policy (5 6 and 7 8) around a reply of the environment (90 91 92)."""
    fields: dict[str, Any] = {
        "token_ids": (5, 6, 90, 91, 92, 7, 8),
        "logprobs": (-1.0, -2.0, 0.0, 0.0, 0.0, -3.0, -4.0),
        "versions": (3, 3, -1, -1, -1, 3, 3),
        "text": "last",
        "finish_reason": "stop",
        "observed": (False, False, True, True, True, False, False),
        "turn_ends": (1, 6),
        "turn_rewards": reward,
        "messages": (
            {"role": "assistant", "content": "first"},
            {"role": "tool", "content": "result"},
            {"role": "assistant", "content": "last"},
        ),
        "prompt_ids": (1, 2),
    }
    return Generation(**fields | changes)


class Events:
    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def event(self, kind: str, **fields: Any) -> None:
        self.seen.append({"kind": kind, **fields})


class FourTokens:
    """Steps of two tokens each."""

    def ends(self, token_ids: Any) -> list[int]:
        return list(range(1, len(token_ids), 2))

    def texts(self, token_ids: Any, ends: Any) -> tuple[str, ...]:
        return tuple("step" for _ in ends)


def collect(generations: list[Generation], scores: Scores, components: list[Component], cutter: Any = None) -> Any:
    events: Any = Events()
    scheme = RewardScheme(Composition(components), cutter)
    ids, seeds = [list(range(len(generations)))], [tuple(range(len(generations)))]
    engines, rewards = Engines(lambda request, version: generations), Rewards(lambda samples: scores)
    experience = Experience(sampling(engines, rewards), events, scheme)
    groups = experience.collect([PROMPT], ids, seeds, SamplingSettings(1.0, 8))
    assert [request.row for request in engines.requests] == [{"answer": 4}]
    return groups, rewards.samples, events.seen


def test_what_the_environment_says_is_seen_and_never_trained():
    groups, [sample], _ = collect([episode()], Scores.without_opinion(1), [Component("environment")])
    batch = to_batch(groups)
    assert batch.tokens.tolist() == [1, 2, 5, 6, 90, 91, 92, 7, 8]
    assert batch.tokens[batch.loss_mask].tolist() == [5, 6, 7, 8]
    assert batch.rollout_logp[~batch.loss_mask].tolist() == [0] * 5
    assert batch.version.tolist() == [-1, -1, 3, 3, -1, -1, -1, 3, 3]
    assert (sample.completion, sample.num_tokens, len(sample.messages)) == ("last", 4, 3)
    assert sample.step_texts == ("first", "last")


@pytest.mark.parametrize("advantage", ["returns", "gae"])
def test_a_turns_reward_is_earned_at_its_last_token_and_does_not_decay_over_what_was_observed(advantage):
    groups, _, _ = collect([episode((0.5, 2.0))], Scores.without_opinion(1), [Component("environment", 2.0)])
    batch = to_batch(groups)
    assert batch.totals.tolist() == [5.0]
    batch = batch.annotate(values=np.zeros(len(batch.tokens), np.float32))
    algorithm = AlgorithmConfig(advantage=advantage, gamma=0.5)
    advantages = with_advantages(batch, algorithm, kl_coef=0.0, max_new_tokens=8).annotations["advantages"]
    # rewards of the four trained tokens: 0, 1, 0, 4
    assert advantages[batch.loss_mask].tolist() == [0 + 0.5 * (1 + 0.5 * (0 + 0.5 * 4)), 1 + 0.5 * 2, 2, 4]
    assert not advantages[~batch.loss_mask].any()


def test_an_environment_without_an_opinion_drops_the_sample_unless_another_reward_has_one():
    silent = [episode(())]
    groups, _, _ = collect(silent, Scores.without_opinion(1), [Component("environment")])
    assert groups[0].dropped() == {0: "no_reward"}
    scored = Scores({"f": np.array([1], np.float32)}, np.array([np.nan], np.float32))
    groups, _, _ = collect(silent, scored, [Component("environment"), Component("f")])
    assert groups[0].scores.totals.tolist() == [1.0]


def test_an_episode_that_was_broken_off_is_dropped_for_its_reason_and_told():
    broken = episode((), failure=("environment_timeout", "step took longer than 3 s"))
    groups, _, events = collect([episode(), broken], Scores.without_opinion(2), [Component("environment")])
    assert groups[0].dropped() == {1: "environment_timeout"}
    assert [(e["kind"], e["sample_id"], e["message"]) for e in events] == [
        ("environment_timeout", 1, "step took longer than 3 s")
    ]


def answer() -> Generation:
    return Generation((5, 6, 7, 8), (-1.0,) * 4, (0,) * 4, "x", "stop")


def with_steps(*steps: list[float]) -> Scores:
    held = [np.array(values) for values in steps]
    sums = np.array([values.sum() for values in held], np.float32)
    return Scores({"p": sums}, np.full(len(steps), np.nan, np.float32), steps={"p": list(held)})


def test_per_step_values_become_rewards_of_the_tokens_that_end_the_steps():
    groups, _, _ = collect([answer(), answer()], with_steps([1, 2], [0, -1]), [Component("p")], FourTokens())
    batch = to_batch(groups)
    assert batch.annotations["step_ends"].tolist() == [0, 0, 0, 1, 0, 1] * 2
    assert batch.annotations["step_rewards"].tolist() == [0, 0, 0, 1, 0, 2, 0, 0, 0, 0, 0, -1]
    algorithm = AlgorithmConfig(advantage="returns")
    advantages = with_advantages(batch, algorithm, kl_coef=0.0, max_new_tokens=8).annotations["advantages"]
    assert advantages[batch.loss_mask].tolist() == [3, 3, 2, 2, -1, -1, -1, -1]


def test_outcome_and_process_rewards_together_keep_the_sample_s_sum():
    scores = with_steps([1, 2], [0, -1])
    scores.components["o"] = np.array([10, 20], np.float32)
    groups, _, _ = collect([answer(), answer()], scores, [Component("p"), Component("o", 0.5)], FourTokens())
    algorithm = AlgorithmConfig(advantage="returns")
    batch = with_advantages(to_batch(groups), algorithm, kl_coef=0.0, max_new_tokens=8)
    advantages = batch.annotations["advantages"]
    assert batch.totals.tolist() == [8, 9]
    assert advantages[batch.loss_mask].tolist() == [8, 8, 7, 7, 9, 9, 9, 9]


def test_another_number_of_values_than_of_steps_is_an_error_that_drops_the_sample():
    groups, _, events = collect([answer(), answer()], with_steps([1, 2, 3], [0, 1]), [Component("p")], FourTokens())
    assert groups[0].dropped() == {0: "reward_error"}
    assert "returned 3 values for 2 steps" in events[0]["message"]
    assert to_batch(groups).annotations["step_rewards"].tolist() == [0, 0, 0, 0, 0, 1]


def test_without_steps_per_step_values_are_their_sum():
    groups, _, _ = collect([answer()], with_steps([1, 2, 3]), [Component("p")])
    batch = to_batch(groups)
    assert (batch.totals.tolist(), batch.annotations) == ([6.0], {})


def test_the_reward_is_logged_in_its_own_units_whatever_it_is_normalised_by():
    """Normalised in its group every reward has mean 0, which tells nobody whether the policy learns."""
    answers = [Generation((9,), (-1.0,), (0,), "x", "stop") for _ in range(2)]
    scored = Scores({"r": np.array([3, 5], np.float32)}, np.full(2, np.nan, np.float32))
    [composed] = Composition([Component("r", 2.0, normalize="group")]).compose([scored], learn=True)
    metrics = measures([Group(PROMPT, [0, 1], answers, composed, [[], []])])
    assert (metrics["reward/mean"], metrics["reward/std"]) == (8.0, 2.0)
    assert metrics["reward/r/mean"] == 4.0
