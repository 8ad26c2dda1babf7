"""Episodes of several turns, played inside a rollout engine's process, each on a thread of its own.

    prompt --> engine: a turn --> environment: a reply --> ids after the turn's own --> engine: the next turn ...

Tokens in, tokens out: what the policy sampled is never tokenised again; a reply adds the ids that the chat template
puts after it (engine/data/turns.py), which are observed, not trained on. Environments live in processes of their own; a
call that fails or is late ends the episode, which begins anew as often as `environment.retries` says and is dropped
then.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayActorError

from engine.config import Config
from engine.data.prompts import RowError, as_messages
from engine.data.turns import TurnTokens
from engine.environments.contract import Turn
from engine.roles import Generation, GenerationRequest, SamplingSettings

GRACE_S = 10.0
"""The environment's process keeps the deadlines; one that says nothing for so long after is taken to be stuck."""

Answer = Callable[[Sequence[int], SamplingSettings, int], Generation]
"""(context, settings, seed) -> what the engine says."""


class EpisodeFailedError(Exception):
    """The environment broke an episode off."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass
class _Episode:
    """What was said so far, after the prompt."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    observed: list[bool] = field(default_factory=list)
    turn_ends: list[int] = field(default_factory=list)
    rewards: list[float | None] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)

    def say(self, turn: Generation, message: dict[str, Any], reward: float | None) -> None:
        """The policy's turn, and what the environment gave for it."""
        self.token_ids += turn.token_ids
        self.logprobs += turn.logprobs
        self.versions += turn.versions
        self.observed += [False] * len(turn.token_ids)
        self.turn_ends.append(len(self.token_ids) - 1)
        self.messages.append(message)
        self.rewards.append(reward)

    def observe(self, ids: Sequence[int], messages: Sequence[dict[str, Any]]) -> None:
        """The environment's reply, as the policy reads it."""
        self.token_ids += ids
        self.logprobs += [0.0] * len(ids)
        self.versions += [-1] * len(ids)
        self.observed += [True] * len(ids)
        self.messages += messages

    def generation(self, prompt_ids: tuple[int, ...], finish_reason: Literal["stop", "length"]) -> Generation:
        """The whole episode as one response. Turns without a reward count 0 beside turns that have one."""
        silent = all(reward is None for reward in self.rewards)
        said = [message["content"] for message in self.messages if message["role"] == "assistant"]
        return Generation(
            token_ids=tuple(self.token_ids),
            logprobs=tuple(self.logprobs),
            versions=tuple(self.versions),
            text=said[-1] if said else "",
            finish_reason=finish_reason,
            observed=tuple(self.observed),
            turn_ends=tuple(self.turn_ends),
            turn_rewards=() if silent else tuple(reward or 0.0 for reward in self.rewards),
            messages=tuple(self.messages),
            prompt_ids=prompt_ids,
        )


class EpisodePlayer:
    """Plays episodes with one engine and the environments' processes."""

    def __init__(self, config: Config, tokenizer: Any, environments: Sequence[Any], answer: Answer) -> None:
        """`environments` are handles of `EnvironmentActor`s; `answer` may be called from several threads."""
        assert config.environment is not None
        self.config = config
        self.limits = config.environment
        self.environments = environments
        self.answer = answer
        tools = self._ask(environments[0], "tools", timeout_s=config.timeouts.start)
        self.tokens = TurnTokens(tokenizer, config.data, tools)

    def play(self, request: GenerationRequest, settings: SamplingSettings, seed: int) -> Generation:
        """One episode, or what it failed of when it was begun `environment.retries` times anew."""
        failure = ("environment_error", "")
        for _ in range(1 + self.limits.retries):
            name = uuid.uuid4().hex
            environment = self.environments[seed % len(self.environments)]
            try:
                return self._episode(environment, name, request, settings, seed)
            except EpisodeFailedError as error:
                failure = (error.kind, str(error))
            finally:
                environment.close.remote(name)
        return replace(_Episode().generation(request.prompt, "stop"), failure=failure)

    def _episode(
        self, environment: Any, name: str, request: GenerationRequest, settings: SamplingSettings, seed: int
    ) -> Generation:
        opening = self._ask(environment, "reset", name, request.row)
        said = [*as_messages(request.row["prompt"]), *opening]
        start = tuple(self.tokens.start(said)) if opening else request.prompt
        if len(start) >= self.config.rollout.max_model_len:
            raise EpisodeFailedError("environment_error", f"{len(start)} tokens of prompt and opening leave no room")
        episode = _Episode()
        for number in range(self.limits.max_turns):
            longest = min(self._room(start, episode), settings.max_new_tokens)
            turn_seed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
            limited = replace(settings, max_new_tokens=longest)
            turn = self.answer([*start, *episode.token_ids], limited, turn_seed)
            message = {"role": "assistant", "content": turn.text}
            reply: Turn = self._ask(environment, "step", name, message)
            episode.say(turn, message, reply.reward)
            if reply.done or not reply.messages:
                return episode.generation(start, turn.finish_reason)
            ids = self._reply_ids(reply.messages, turn.token_ids)
            if number + 1 == self.limits.max_turns or len(ids) >= self._room(start, episode):
                break
            episode.observe(ids, reply.messages)
        return episode.generation(start, "length")

    def _reply_ids(self, messages: list[dict[str, Any]], said: Sequence[int]) -> list[int]:
        try:
            return self.tokens.reply(messages, said)
        except RowError as error:
            raise EpisodeFailedError("environment_error", str(error)) from None

    def _room(self, start: Sequence[int], episode: _Episode) -> int:
        """Tokens that the episode may still have."""
        longest = self.config.rollout.max_model_len - len(start)
        return min(longest, self.limits.max_tokens or longest) - len(episode.token_ids)

    def _ask(self, environment: Any, method: str, *arguments: Any, timeout_s: float | None = None) -> Any:
        """One call of an environment's process.

        Raises:
            EpisodeFailedError: it failed, is late, or its process died.
        """
        deadline = (timeout_s or self.limits.timeout) + GRACE_S
        try:
            answer = ray.get(getattr(environment, method).remote(*arguments), timeout=deadline)
        except GetTimeoutError:
            ray.kill(environment, no_restart=False)  # not even its own deadline was kept: Ray starts it anew
            message = f"no answer from {method}() within {deadline:.0f} s"
            raise EpisodeFailedError("environment_timeout", message) from None
        except RayActorError as error:
            message = f"the environments' process died in {method}(): {' '.join(str(error).split())[:200]}"
            raise EpisodeFailedError("environment_error", message) from None
        if isinstance(answer, tuple):
            raise EpisodeFailedError(*answer)
        return answer
