"""The reward contract: what a reward function is given, what it may return, and the settings it may carry.

Two shapes are accepted wherever a reward is named. One sample at a time:

    @reward(weight=1.0, timeout=10)
    def correct(sample: Sample) -> float | None: ...

or the batch contract that TRL made common: named lists in, a list out:

    def format_ok(completions, **columns) -> list[float]: ...

Both may be `async`. A value is a number; None for "no opinion"; a dict of named parts, which are logged as `name/part`
and summed; or a list of per-step values (process reward), whose outcome is their sum, the undiscounted return.
Anything else, NaN included, is an error and never becomes 0.
"""

from __future__ import annotations

import asyncio
import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, Literal, TypeVar, overload

import numpy as np

from engine.config import RewardConfig, RewardsConfig, UserError
from engine.row import Row
from engine.user_code import describe_error, load_object

F = TypeVar("F", bound=Callable[..., Any])

_SETTINGS = "__gnomon_reward__"
NO_REWARD = "no_reward"
FLOAT32_MAX = 3.4028234663852886e38
BUILT_IN = {
    "exact": "engine.rewards.answers:Exact",
    "numeric": "engine.rewards.answers:Numeric",
    "math": "engine.rewards.mathematics:Math",
    "regex": "engine.rewards.answers:Regex",
    "choice": "engine.rewards.answers:Choice",
    "json_schema": "engine.rewards.answers:JsonSchema",
    "xml_format": "engine.rewards.form:XmlFormat",
    "length": "engine.rewards.form:Length",
    "repetition": "engine.rewards.form:Repetition",
    "language": "engine.rewards.language:Language",
    "reasoning_gym": "engine.rewards.procedural:ReasoningGym",
    "instructions": "engine.rewards.instructions:Instructions",
    "code": "engine.rewards.code:Code",
    "remote": "engine.rewards.remote:Remote",
    "judge": "engine.rewards.judge:Judge",
    "generative_verifier": "engine.rewards.judge:GenerativeVerifier",
}
"""Rewards that are named without a module -> the class that is made with the entry's `arguments`."""
_BATCH_PARAMETERS = {"prompts", "completions", "completion_ids"}
_NOT_PASSED = {"prompt", "completion", "completion_ids"}


@dataclass(frozen=True)
class Failure:
    """Why a function gave no reward."""

    message: str
    kind: Literal["reward_error", "reward_timeout", "reward_blocks_loop"] = "reward_error"


Outcome = dict[str, float | tuple[float, ...]] | Failure
"""Components of one sample (NaN: no opinion; a tuple: one value per step), or what went wrong."""


class RewardError(UserError):
    """A reward function failed, and its settings say to stop."""

    incidents: Sequence[dict[str, Any]] = ()
    """The failed calls of the samples that were being scored, as in `Scores.incidents`."""


@dataclass(frozen=True)
class Sample:
    """One response of the policy, as a reward function sees it."""

    id: int
    """Unique in the run."""
    prompt: str | list[dict[str, Any]]
    """As in the data row: text or messages; of a prompt that was cut, the text that is left."""
    completion: str
    """The response, decoded, special tokens left out."""
    row: Row
    """The data row; its columns are attributes."""
    finish_reason: Literal["stop", "length"] = "stop"
    """The response ended by itself, or was cut at the limit."""
    num_tokens: int = 0
    """Tokens of the response."""
    completion_ids: tuple[int, ...] = ()
    """Token ids of the response."""
    prompt_ids: tuple[int, ...] = ()
    """Token ids of the prompt."""
    messages: tuple[dict[str, Any], ...] = ()
    """Everything after the prompt in an episode of several turns; `completion` is the policy's last message."""
    step_texts: tuple[str, ...] = ()
    """The steps of the response (see `rewards.steps`), or its turns."""


@dataclass(frozen=True)
class Scores:
    """Rewards of B samples."""

    components: dict[str, np.ndarray]
    """name or name/part -> [B] float32, unweighted; NaN is "no opinion" or failed."""
    totals: np.ndarray
    """[B] float32: the reward, once it is composed (`Composition`); NaN before, and where dropped."""
    dropped: dict[int, str] = field(default_factory=dict)
    """Position in the batch -> "reward_error", "reward_timeout", "reward_overflow" (the weighted sum is too large for a
    32-bit float), "reward_not_finite" (a reward model gave NaN), or "no_reward" (nobody had an opinion)."""
    incidents: list[dict[str, Any]] = field(default_factory=list)
    """Failed attempts: kind, function, sample_id (None for a call over several samples), attempt (from 1), message."""
    steps: dict[str, list[np.ndarray | None]] = field(default_factory=dict)
    """name -> for each sample [steps] float64, where a component gave one value per step; else None."""
    step_rewards: list[np.ndarray | None] = field(default_factory=list)
    """For each sample [steps] float64: the part of its total that belongs to its steps; None where there is none."""
    raw_totals: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    """[B] float32: the totals without any normalisation, comparable over time; empty before they are composed."""

    @staticmethod
    def without_opinion(count: int) -> Scores:
        """Of samples that nobody has scored yet."""
        return Scores({}, np.full(count, np.nan, np.float32))

    @property
    def size(self) -> int:
        """B."""
        return len(self.totals)

    def drop(self, reasons: Mapping[int, str], incidents: Sequence[dict[str, Any]] = ()) -> Scores:
        """Without the samples at these positions, each for its reason; earlier reasons stay."""
        return replace(self, dropped=dict(reasons) | self.dropped, incidents=[*self.incidents, *incidents])

    def plus(
        self,
        name: str,
        values_B: np.ndarray,
        steps: Sequence[np.ndarray | None],
        sample_ids: Sequence[int],
    ) -> Scores:
        """With another component, [B], and its steps (None where it has none).

        A value that is not finite drops its sample by name.
        """
        broken = [int(position) for position in np.flatnonzero(~np.isfinite(values_B))]
        incidents = [
            {"kind": "reward_not_finite", "function": name, "sample_id": sample_ids[position], "attempt": 1}
            | {"message": f"the reward model gave {values_B[position]}"}
            for position in broken
        ]
        held = np.where(np.isfinite(values_B), values_B, np.nan).astype(np.float32)
        more = replace(
            self,
            components=self.components | {name: held},
            steps=self.steps | {name: list(steps)},
        )
        return more.drop(dict.fromkeys(broken, "reward_not_finite"), incidents)


@dataclass(frozen=True)
class RewardSettings:
    """What `@reward(...)` was given; None defers to the configuration's defaults."""

    name: str | None = None
    weight: float | None = None
    timeout: float | None = None
    on_error: Literal["skip", "fail"] | None = None
    gate: bool = False


@overload
def reward(function: F, /) -> F: ...
@overload
def reward(
    *,
    name: str | None = None,
    weight: float | None = None,
    timeout: float | None = None,
    on_error: Literal["skip", "fail"] | None = None,
    gate: bool = False,
) -> Callable[[F], F]: ...
def reward(function: Any = None, /, **settings: Any) -> Any:
    """Mark a reward function, bare (`@reward`) or with settings; the function itself is returned, unchanged.

    Args:
        name: in the metrics; default: the function's name.
        weight: factor in the summed reward; default 1.
        timeout: seconds one call may take; default `rewards.timeout`.
        on_error: after the retries, "skip" drops the sample with a reason (default), "fail" stops the run.
        gate: where this reward is 0 or less, the sample's other components count 0.

    Raises:
        UserError: a setting has no sensible value.
    """
    chosen = RewardSettings(**settings)
    if chosen.weight is not None and not math.isfinite(chosen.weight):
        raise UserError(f"@reward(weight={chosen.weight}): must be a finite number")
    if chosen.timeout is not None and not 0 < chosen.timeout < math.inf:
        raise UserError(f"@reward(timeout={chosen.timeout}): must be a number of seconds above 0")
    if chosen.on_error not in (None, "skip", "fail"):
        raise UserError(f"@reward(on_error={chosen.on_error!r}): must be 'skip' or 'fail'")

    def mark(marked: Any) -> Any:
        setattr(marked, _SETTINGS, chosen)
        return marked

    return mark if function is None else mark(function)


@dataclass(frozen=True)
class RewardFunction:
    """A reward function with its settings decided."""

    name: str
    """Component name."""
    weight: float
    """Factor in the summed reward."""
    timeout: float
    """Seconds one call may take."""
    on_error: str
    """"skip" or "fail"."""
    batch: bool
    """It takes lists (the batch contract), not one sample."""
    gate: bool
    """Where it is 0 or less, the sample's other components count 0."""
    function: Callable[..., Any]
    """The user's."""

    def __call__(self, samples: Sequence[Sample]) -> list[Outcome]:
        """Evaluate all samples; exceptions of the user's code pass through.

        Returns:
            For each sample its components: `name`, and `name/part` for a dict. NaN is "no opinion". A `Failure` instead
            says why what was returned for that sample is not a reward.

        Raises:
            UserError: a batch function requires a column that the rows lack.
            TypeError, ValueError: a batch function returned no list, or one of the wrong length.
        """
        if not self.batch:
            return [self._components(_finished(self.function(sample))) for sample in samples]
        returned = _finished(self.function(**self._arguments(samples)))
        values = returned.tolist() if getattr(returned, "ndim", None) else returned
        if not isinstance(values, list | tuple):
            raise TypeError(f"returned {_shown(returned)}; a batch function returns a list with one reward per sample")
        if len(values) != len(samples):
            raise ValueError(f"returned {len(values)} rewards for {len(samples)} samples")
        return [self._components(value) for value in values]

    @property
    def is_async(self) -> bool:
        """Whether it is `async` and takes one sample, so that calls for several can be awaited at once."""
        called = self.function if inspect.isroutine(self.function) else type(self.function).__call__
        return not self.batch and inspect.iscoroutinefunction(called)

    async def awaited(self, sample: Sample) -> Outcome:
        """The outcome of a function that `is_async`, within its deadline; exceptions are outcomes too."""
        try:
            async with asyncio.timeout(self.timeout) as limit:
                return self._components(await self.function(sample))
        except Exception as error:
            if isinstance(error, TimeoutError) and limit.expired():
                return Failure(f"took longer than {self.timeout:g} s", "reward_timeout")
            return Failure(describe_error(error))

    def _arguments(self, samples: Sequence[Sample]) -> dict[str, list[Any]]:
        """Columns of the rows and our three lists, cut to what the signature accepts."""
        names = dict.fromkeys(name for s in samples for name in s.row if name not in _NOT_PASSED)
        available: dict[str, list[Any]] = {name: [s.row.get(name) for s in samples] for name in names}
        available["prompts"] = [s.prompt for s in samples]
        available["completions"] = [
            s.completion if isinstance(s.prompt, str) else [{"role": "assistant", "content": s.completion}]
            for s in samples
        ]
        available["completion_ids"] = [list(s.completion_ids) for s in samples]
        parameters = inspect.signature(self.function).parameters.values()
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        for p in named:
            if p.default is p.empty and p.name not in available:
                raise UserError(f"{self.name} requires {p.name!r}; the rows give {', '.join(available)}")
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            return available
        return {p.name: available[p.name] for p in named if p.name in available}

    def _components(self, value: Any) -> Outcome:
        try:
            if not isinstance(value, Mapping):
                return {self.name: _steps(value) or _number(value)}
            if not all(isinstance(key, str) for key in value):
                return Failure(f"returned a dict whose keys are not all names: {_shown(value)}")
            parts = {key: _number(part, f"[{key!r}]") for key, part in value.items()}
        except _RewardValueError as error:
            return Failure(str(error))
        held = [part for part in parts.values() if not math.isnan(part)]
        total = math.fsum(held) if held else math.nan
        if abs(total) > FLOAT32_MAX:
            return Failure(f"returned parts that add up to {total}, too large for a 32-bit float")
        return {self.name: total, **{f"{self.name}/{key}": part for key, part in parts.items()}}


class _RewardValueError(Exception):
    """The message says what was returned instead of a reward."""


def _steps(value: Any) -> tuple[float, ...]:
    """The values of a process reward; none of any other.

    Raises:
        _RewardValueError: one is NaN, infinite, or no number at all, or their sum is too large.
    """
    _number(value)
    listed = value.tolist() if getattr(value, "ndim", 0) == 1 else value
    return tuple(_finite(step, f"[{i}]") for i, step in enumerate(listed)) if isinstance(listed, list | tuple) else ()


def _number(value: Any, where: str = "") -> float:
    """One component as a float; None and an empty list of steps are NaN, "no opinion".

    Raises:
        _RewardValueError: NaN, infinite, or no number at all.
    """
    if value is None:
        return math.nan
    if getattr(value, "ndim", 0) == 1:
        value = value.tolist()
    if isinstance(value, list | tuple):
        return math.fsum(_finite(step, f"{where}[{i}]") for i, step in enumerate(value)) if value else math.nan
    return _finite(value, where)


def _finite(value: Any, where: str) -> float:
    inner = f" at {where}" if where else ""
    if getattr(value, "ndim", None) == 0 and not isinstance(value, Real):
        value = value.item()  # a numpy or torch scalar
    if not isinstance(value, Real):
        raise _RewardValueError(
            f"returned {_shown(value)}{inner}; a reward is a number, None for no opinion, a dict of named numbers or "
            "a list of per-step numbers"
        )
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if math.isnan(number) or math.isinf(number):
        raise _RewardValueError(f"returned {number}{inner}; a reward must be finite (None means no opinion)")
    if abs(number) > FLOAT32_MAX:
        raise _RewardValueError(f"returned {number}{inner}, too large for a 32-bit float")
    return number


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"


def _finished(value: Any) -> Any:
    """The value itself, or what it comes to if it is awaitable."""
    if not inspect.isawaitable(value):
        return value

    async def wait() -> Any:
        return await value

    return asyncio.run(wait())


def _load(config: RewardConfig) -> Callable[..., Any]:
    """The function of an entry; a built-in, or what takes `arguments`, is made with them.

    Raises:
        UserError: it cannot be imported, or does not take these arguments.
    """
    spec = BUILT_IN.get(config.function, config.function)
    if ":" not in spec:
        close = difflib.get_close_matches(spec, BUILT_IN, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(
            f"reward function {spec!r}: {hint}it must be pkg.mod:function, path/file.py:function or a built-in: "
            f"{', '.join(BUILT_IN)}"
        )
    loaded = load_object(spec, what="reward function")
    if spec == config.function and not config.arguments and not inspect.isclass(loaded):
        return loaded
    try:
        inspect.signature(loaded).bind(**config.arguments)
    except TypeError as error:
        raise UserError(f"reward function {config.function!r}: arguments: {error}") from None
    made = loaded(**config.arguments)
    if not callable(made):
        raise UserError(f"reward function {config.function!r}: with its arguments it gives no function, but {made!r}")
    return made


def resolve(config: RewardConfig, defaults: RewardsConfig) -> RewardFunction:
    """Import the function of one entry and decide its settings: the entry, else `@reward`, else the defaults.

    Raises:
        UserError: it cannot be imported, takes neither a sample nor the batch arguments, or has an unusable
            name.
    """
    function = _load(config)
    marked: RewardSettings = getattr(function, _SETTINGS, RewardSettings())
    own = None if config.function in BUILT_IN else getattr(function, "__name__", None)
    name = config.name or marked.name or str(own or config.function.rpartition(":")[2])
    if "/" in name:
        raise UserError(f"reward function {config.function!r}: name {name!r} must not contain '/', which marks parts")
    weights = (config.weight, marked.weight, 1.0)
    timeouts = (config.timeout, marked.timeout, defaults.timeout)
    return RewardFunction(
        name=name,
        weight=next(w for w in weights if w is not None),
        timeout=next(t for t in timeouts if t is not None),
        on_error=config.on_error or marked.on_error or "skip",
        batch=_is_batch(function, config.function),
        gate=marked.gate if config.gate is None else config.gate,
        function=function,
    )


def resolve_all(rewards: RewardsConfig) -> list[RewardFunction]:
    """All functions of the configuration.

    Raises:
        UserError: as `resolve`, or two components have one name.
    """
    functions = [resolve(config, rewards) for config in rewards.functions]
    names = [f.name for f in functions] + [model.name for model in rewards.models]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise UserError(f"rewards: two components are named {twice!r}; give each entry its own name")
    return functions


def _is_batch(function: Callable[..., Any], spec: str) -> bool:
    """Whether it takes the batch arguments; if not, it must take one sample."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        raise UserError(f"reward function {spec!r}: its parameters cannot be inspected; wrap it in a def") from None
    if _BATCH_PARAMETERS & set(signature.parameters):
        return True
    kinds = [p.kind for p in signature.parameters.values()]
    if kinds == [inspect.Parameter.VAR_KEYWORD]:
        return True
    try:
        signature.bind(None)
    except TypeError:
        raise UserError(
            f"reward function {spec!r}: must take one sample, f(sample), or lists, f(completions, **columns); it takes "
            f"{signature}"
        ) from None
    return False
