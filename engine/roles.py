"""What the loop needs of the workers, as Protocols: the stages see these and never an actor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from engine.data.batch import Batch
from engine.rewards.contract import Sample, Scores
from engine.schedule.incidents import Incident

Report = Callable[[Incident], None]
"""Takes an incident down. Raises when there have been too many."""


class Record(Protocol):
    """Takes down what was decided."""

    def __call__(self, kind: str, **fields: Any) -> None:
        """As an event of this kind."""


def unrecorded(kind: str, **fields: Any) -> None:
    """A `Record` that keeps nothing."""


class WorkerLostError(RuntimeError):
    """A worker's process is gone, gives no sign of life, or missed a deadline: what it held is lost."""

    def __init__(
        self, message: str, *, kind: Literal["actor_died", "actor_silent", "actor_late"], group: str, rank: int
    ) -> None:
        super().__init__(message)
        self.kind: Literal["actor_died", "actor_silent", "actor_late"] = kind
        self.group = group
        self.rank = rank

    def incident(self, action: str, sample_ids: Sequence[int] = ()) -> Incident:
        """Its record."""
        return Incident(self.kind, f"{self.group}[{self.rank}]", action, str(self), tuple(sample_ids))


@dataclass(frozen=True)
class SamplingSettings:
    """How responses are drawn."""

    temperature: float
    """0 is greedy."""
    max_new_tokens: int
    """Longest response."""
    stop: tuple[str, ...] = ()
    """Strings that end a response (kept in it)."""


@dataclass(frozen=True)
class Generation:
    """One response, as it was sampled: tokens are never made from the text again."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Of each token under the sampling distribution, temperature included."""
    versions: tuple[int, ...]
    """Weight version that produced each token."""
    text: str
    """Decoded, without special tokens."""
    finish_reason: Literal["stop", "length"]
    """`length`: cut at max_new_tokens, or at a budget of the episode."""
    observed: tuple[bool, ...] = ()
    """In an episode: True on tokens that the environment brought; empty where the policy made them all."""
    turn_ends: tuple[int, ...] = ()
    """In an episode: position of the last token of each of the policy's turns."""
    turn_rewards: tuple[float, ...] = ()
    """In an episode: the environment's reward for each turn; empty where it has no opinion."""
    messages: tuple[dict[str, Any], ...] = ()
    """In an episode: everything after the prompt. `text` is the policy's last message."""
    prompt_ids: tuple[int, ...] = ()
    """In an episode: what it began with, the environment's opening included."""
    failure: tuple[str, str] | None = None
    """In an episode that the environment broke off: kind and message."""


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt to answer once per seed. `key` comes back with the responses."""

    key: int
    prompt: tuple[int, ...]
    seeds: tuple[int, ...]
    row: dict[str, Any] = field(default_factory=dict)
    """The data row, for an environment."""
    sample_ids: tuple[int, ...] = ()
    """Of its responses, for the record."""


class Rollouts(Protocol):
    """The engines."""

    def ask(self, requests: Sequence[GenerationRequest], settings: SamplingSettings) -> None:
        """Have prompts answered, each under a key that no other one under way has; `poll` gives the responses."""

    def poll(self, wait_s: float) -> list[tuple[int, list[Generation]]]:
        """(key, responses) of prompts that are answered in full; waits for the first up to `wait_s` seconds."""

    def publish(self, version: int) -> dict[str, float]:
        """Bring every engine to the policy's current weights under this version; returns timings and sizes.

        What is being generated goes on. Engines that hold this version already are left as they are.
        """

    def reset(self) -> None:
        """Forget what is under way and which weights were published."""


class Trained(Protocol):
    """What every trained model does."""

    changes: int
    """How often its weights were set to change."""

    def update(self, minibatches: Sequence[Batch]) -> dict[str, float]:
        """One optimizer update per minibatch; returns metrics, `.../skipped_updates` (not finite) among them."""

    def save(self, folder: Path, record: dict[str, Any] | None = None) -> None:
        """Write the model in Hugging Face format, whole or not at all; a reward model's `record` beside it."""

    def capture_state(self) -> None:
        """Keep a copy of what training goes on from, in memory."""

    def write_state(self, folder: str) -> None:
        """Write the copy into a folder or URL; may be called from another thread while the training goes on."""

    def load_state(self, folder: str) -> None:
        """Go on from what `write_state` wrote, on any number of ranks."""


class Policy(Trained, Protocol):
    """The trained language model."""

    def logprobs(self, batch: Batch) -> np.ndarray:
        """[T] float32: log-probs of the trained tokens, 0 elsewhere."""

    def base_logprobs(self, batch: Batch) -> np.ndarray:
        """[T] float32: the same under the frozen weights below the adapter."""

    def predictions(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Of the trained tokens: log-probs, and 1 where the token is the likeliest; both [T] float32, 0 elsewhere."""

    def divergences(self, batch: Batch) -> np.ndarray:
        """[T] float32: divergence of the trained tokens' distributions from the teacher's, 0 elsewhere."""


class RewardModel(Trained, Protocol):
    """The trained reward model."""

    def scores(self, batch: Batch) -> np.ndarray:
        """[T] float32: scores at the scored tokens, 0 elsewhere."""


class Critic(Trained, Protocol):
    """The value model."""

    def values(self, batch: Batch) -> np.ndarray:
        """[T] float32: values of the states before each trained token, 0 elsewhere."""


class Reference(Protocol):
    """The frozen starting policy."""

    def logprobs(self, batch: Batch) -> np.ndarray:
        """[T] float32: log-probs of the trained tokens, 0 elsewhere."""


class Rewards(Protocol):
    """Reward functions and reward models."""

    def submit(self, key: int, samples: Sequence[Sample]) -> None:
        """Start scoring; `poll` gives the result."""

    def poll(self, wait_s: float, *, engines_idle: bool) -> list[tuple[int, Scores]]:
        """(key, scores) of groups that are scored; waits for the first up to `wait_s` seconds.

        `engines_idle` says that models which share something with the engines may work now.
        """

    def reset(self) -> None:
        """Forget what was submitted."""


@dataclass(frozen=True)
class Sampling:
    """What answers prompts and scores the answers."""

    rollouts: Rollouts
    rewards: Rewards


@dataclass(frozen=True)
class Workers:
    """Everything that a stage drives. What it does not need is None."""

    policy: Policy | None = None
    """The language model in training."""
    critic: Critic | None = None
    """The value model, where advantages come from one."""
    reward_model: RewardModel | None = None
    """The reward model in training, in a stage of that kind."""
    reference: Reference | None = None
    """The starting policy, where the loss needs it and the policy has no frozen weights of its own."""
    sampling: Sampling | None = None
    """Engines and reward functions."""
    rebuild: Callable[[str, bool], None] = lambda group, all_trained: None
    """Start this group of workers anew (and all that train), from the models that the run started from, and forget what
    was under way."""
