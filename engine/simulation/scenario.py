"""What is simulated, and what came out: plain data."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from time import thread_time
from typing import ParamSpec, TypeVar

from engine.config import Config
from engine.simulation.lengths import Lengths

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Workload:
    """What a run does, whatever it runs on."""

    lengths: Lengths
    steps: int
    prompts_per_step: int
    samples_per_prompt: int
    prompt_tokens: int
    """Of each prompt."""
    max_new_tokens: int
    concurrent_samples: int
    """Samples that one engine decodes at once."""
    scoring_passes: int = 0
    """Forward passes over a step's tokens before the update: reference, old log-probs, values."""
    training_passes: int = 1
    """Forward and backward passes over a step's tokens: models times epochs."""
    updates: int = 1
    """Optimizer updates of a step, of all models."""
    checkpoint_every: int = 0
    recompute: bool = True
    """Samples that run while weights arrive are read again under the new ones."""

    @staticmethod
    def of(config: Config, lengths: Lengths, *, prompt_tokens: int, steps: int) -> Workload:
        """That of an `rl` run. All models train and score on the policy's ranks."""
        models = 2 if config.algorithm.needs_critic else 1
        return Workload(
            lengths=lengths,
            steps=steps,
            prompts_per_step=config.rl.prompts_per_step,
            samples_per_prompt=config.rl.samples_per_prompt,
            prompt_tokens=prompt_tokens,
            max_new_tokens=config.rollout.max_new_tokens,
            concurrent_samples=config.rollout.concurrent_samples,
            scoring_passes=len(scoring_passes(config)),
            training_passes=models * config.rl.epochs_per_step,
            updates=models * config.updates_per_step,
            checkpoint_every=config.checkpoint.every,
            recompute=config.rollout.on_new_weights == "recompute",
        )


def computed_tokens(prompt: int, length: int, samples: int) -> int:
    """A sample's tokens in a pass, whose group of so many samples shares the prompt."""
    return length + -(-prompt // samples)


def scoring_passes(config: Config) -> dict[str, int]:
    """The passes of a step that compute log-probs or values, as the metrics call them -> ranks that share each."""
    algorithm = config.algorithm
    in_reward = algorithm.kl_coef > 0 and algorithm.kl_in == "reward"
    later_updates = config.updates_per_step > 1 and not algorithm.trains_pairs
    old_logp = in_reward or later_updates or algorithm.reference == "step"
    own_reference = config.compares_with_start and not config.trains_adapter
    passes = {
        "reference": (config.compares_with_start, config.reference.ranks if own_reference else config.policy.ranks),
        "old_logp": (old_logp, config.policy.ranks),
        "values": (algorithm.needs_critic, config.policy.ranks),
    }
    return {name: ranks for name, (needed, ranks) in passes.items() if needed}


@dataclass(frozen=True)
class Setting:
    """How accelerators are used. Taking turns is synchronous: all generate, then all train."""

    engines: int
    trainers: int
    max_staleness: int = 0
    turns: bool = False
    """Every accelerator holds an engine and a trainer, one of which works at a time."""

    def __post_init__(self) -> None:
        if min(self.engines, self.trainers) < 1:
            raise ValueError("a run needs an engine and a trainer")
        if self.turns and self.max_staleness > 0:
            raise ValueError("engines and trainers that take turns are synchronous: max_staleness must be 0")

    @property
    def accelerators(self) -> int:
        """How many there are in all."""
        return max(self.engines, self.trainers) if self.turns else self.engines + self.trainers

    def __str__(self) -> str:
        return f"{self.engines} in turns" if self.turns else f"{self.engines}+{self.trainers}, k = {self.max_staleness}"


@dataclass(frozen=True)
class Failures:
    """Accelerators fail independently of their age."""

    per_hour: float
    """Of one accelerator."""
    restart_s: float
    """Until what it ran is up again, on it or on another."""
    budget: int
    """Failures within a hundred steps that a run bears (`ray.stop_after_incidents`)."""


class Decisions:
    """Calls of the scheduling classes, and the processor's time in them."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.seconds: dict[str, float] = defaultdict(float)

    def __call__(self, who: str, method: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a method of `who`."""
        start = thread_time()
        result = method(*args, **kwargs)
        self.seconds[who] += thread_time() - start
        self.calls[who] += 1
        return result

    def per_second(self) -> dict[str, float]:
        """Who -> calls per second of its own time."""
        return {who: count / max(self.seconds[who], 1e-9) for who, count in self.calls.items()}


@dataclass(frozen=True)
class Result:
    """What a simulated run did."""

    setting: Setting
    steps: int
    """Trained, each once: what was trained again is in `lost_steps`."""
    seconds: float
    stopped: bool
    """More accelerators failed than the run bears."""
    engines_idle: float
    trainers_idle: float
    """Share of the role's time without work: it waits for the other role, or for its slowest member."""
    staleness: dict[int, float]
    """Age in versions -> share of the trained tokens."""
    trained_tokens: int
    """Of responses."""
    lost_tokens: int
    """Of responses that were generated and thrown away, or whose step was lost."""
    lost_steps: int
    engine_failures: int
    trainer_failures: int
    admitted: int
    trained: int
    dropped: dict[str, int]
    in_flight: int
    """Samples, in the ledger's account."""
    decisions: Decisions = field(compare=False, repr=False)

    @property
    def step_seconds(self) -> float:
        """From one step to the next, the start of the run and what was lost included."""
        return self.seconds / self.steps if self.steps else float("inf")

    @property
    def accelerator_hours(self) -> float:
        """What is paid for."""
        return self.setting.accelerators * self.seconds / 3600
