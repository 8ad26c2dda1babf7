"""The whole configuration of a run: one YAML file, `a.b=c` overrides, frozen models, every cross-check.

Imports neither torch nor Ray, so that a mistake is told in under a second, before anything starts.
Sizes are named for what they count: `prompts_per_step`, `samples_per_prompt`, `tokens_per_microbatch`.
"""

from __future__ import annotations

import difflib
import os
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator


class UserError(ValueError):
    """Something the user can mend. The message says what is wrong, where, and how to mend it."""


class ConfigError(UserError):
    """The configuration cannot be run as it is written."""


class Section(BaseModel):
    """A part of the configuration: immutable, and closed to keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Location = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path, or something else that never starts with ~; a leading ~ is the home folder."""
Folder = Annotated[Path, AfterValidator(lambda folder: Path(os.path.expanduser(folder)))]
"""The same, for what is always a path."""


class ModelConfig(Section):
    """The language model that the run starts from."""

    path: Location
    """Folder in Hugging Face format, or a Hub name."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Weights and activations; auto is float32 on the CPU and bfloat16 on a GPU."""
    trust_remote_code: bool = False
    """Run Python code that the model's folder brings along."""
    gradient_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass: less memory, about a third more time."""


class SourceConfig(Section):
    """Where rows come from. A bare string in the YAML is the `path`."""

    path: Location
    """A jsonl/json/parquet/csv file or glob, `pkg.mod:fn` or `file.py:fn`, or a Hugging Face dataset name."""
    subset: str | None = None
    """Configuration name of a Hugging Face dataset."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    arguments: dict[str, Any] = {}
    """Keyword arguments of a callable source."""


def _from_path(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


Source = Annotated[SourceConfig, BeforeValidator(_from_path)]


class DataConfig(Section):
    """Prompts for training and for evaluation."""

    train: Source
    """Rows to train on."""
    evaluation: Source | None = None
    """Held-out rows; needed when `evaluation.every` is set."""
    columns: dict[str, str] = {}
    """Renames: our name -> the name in the rows, e.g. `{prompt: question}`."""
    system_prompt: str | None = None
    """System message put before prompts that bring none; None leaves the chat template's own default."""
    chat_template: Literal["auto", "always", "never"] = "auto"
    """Wrap plain-text prompts as a user message: auto does so when the tokenizer has a chat template."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    """A malformed row stops the run before it starts, or is skipped and counted."""
    on_long_prompt: Literal["fail", "skip", "truncate"] = "fail"
    """A prompt over the token limit: an error, a skipped row, or cut at its start (without a chat template only)."""
    max_prompt_tokens: Count | None = None
    """Longest prompt, in tokens; None is `rollout.max_model_len - rollout.max_new_tokens`."""


class RewardConfig(Section):
    """One reward function. A bare string in the YAML is the `function`; None defers to its `@reward`."""

    function: Location
    """`pkg.mod:fn` or `file.py:fn`."""
    name: str | None = None
    """Name in the metrics; default: the function's own."""
    weight: float | None = Field(default=None, allow_inf_nan=False)
    """Factor in the summed reward; default: that of `@reward`, else 1."""
    timeout: Positive | None = None
    """Seconds one call may take; default: that of `@reward`, else `rewards.timeout`."""
    on_error: Literal["skip", "fail"] | None = None
    """After the retries: drop the sample with a reason, or stop the run; default: that of `@reward`, else skip."""


def _from_function(value: Any) -> Any:
    return {"function": value} if isinstance(value, str) else value


class RewardsConfig(Section):
    """Reward functions and the processes that run them."""

    functions: list[Annotated[RewardConfig, BeforeValidator(_from_function)]] = Field(min_length=1)
    """The components; the reward of a sample is their weighted sum."""
    workers: Count = 1
    """Processes that run user functions."""
    timeout: Positive = 30.0
    """Seconds one call may take, where neither the function nor its entry says otherwise."""
    retries: Annotated[int, Field(ge=0)] = 1
    """Times a failed call is repeated before `on_error` applies."""
    stop_after_failures: Count = 8
    """Stop the run when a function has failed this many samples without one success."""


class CorrectionConfig(Section):
    """Importance weights between the trainer's and the rollout's log-probabilities of the same tokens."""

    mode: Literal["none", "truncate", "mask"] = "truncate"
    """none; clamp into [floor, cap] (TIS); or zero outside it (IcePop / MIS)."""
    level: Literal["token", "sequence", "geometric"] = "token"
    """Ratio per token, product over the sample, or its per-token geometric mean."""
    cap: Positive = 2.0
    """Upper bound."""
    floor: NonNegative = 0.0
    """Lower bound."""


class AlgorithmConfig(Section):
    """The policy-gradient objective. The defaults are GRPO (arXiv:2402.03300) without a KL term."""

    name: Literal["grpo"] = "grpo"
    """Family of the advantage estimator and the loss."""
    advantage_scale: Literal["std", "none", "batch"] = "std"
    """Divide group-centred rewards by the group's standard deviation, by nothing, or by the batch's."""
    clip_low: NonNegative = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: NonNegative = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Bound on the loss of negative advantages (arXiv:1912.09729)."""
    loss_aggregation: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"] = (
        "seq-mean-token-mean"
    )
    """How per-token losses become one number; denominators are global."""
    kl_coef: NonNegative = 0.0
    """Weight of the KL to the starting policy in the loss; 0 starts no reference model."""
    kl_estimator: Literal["k2", "k3"] = "k3"
    """Per-token estimator of that KL in the loss (k1 would have no gradient in expectation)."""
    correction: CorrectionConfig = CorrectionConfig()
    """Trainer-rollout mismatch correction."""


class RLConfig(Section):
    """Sizes of the reinforcement-learning loop."""

    steps: Count
    """Rounds of generate, score, update, publish."""
    prompts_per_step: Count
    """Distinct prompts (groups) in one step."""
    samples_per_prompt: Count
    """Responses generated for each prompt (the group size)."""
    minibatches_per_step: Count = 1
    """Optimizer updates per epoch over a step's samples."""
    epochs_per_step: Count = 1
    """Passes over a step's samples."""


class OptimizerConfig(Section):
    """AdamW and its schedule."""

    learning_rate: Positive = 1e-6
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after the warm-up."""
    warmup_updates: Annotated[int, Field(ge=0)] = 0
    """Optimizer updates of linear warm-up; the first one already takes a part of the learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's moment decays."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""
    max_grad_norm: Positive = 1.0
    """Global gradient norm is clipped to this."""


class PolicyConfig(Section):
    """The trained model's actors."""

    ranks: Count = 1
    """Data-parallel processes."""
    threads: Count = 1
    """CPU threads of each process."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage."""
    tokens_per_microbatch: Count = 4096
    """Token budget of one packed forward and backward pass."""


class ReferenceConfig(Section):
    """The frozen starting policy's actors; started only when `algorithm.kl_coef` is not 0."""

    ranks: Count = 1
    """Data-parallel processes."""
    threads: Count = 1
    """CPU threads of each process."""


class RolloutConfig(Section):
    """The vLLM engines and how they sample."""

    engines: Count = 1
    """Engines, each with a whole copy of the policy's weights."""
    threads: Count = 1
    """CPU threads of each engine."""
    max_new_tokens: Count = 256
    """Longest response, in tokens."""
    max_model_len: Count = 2048
    """Longest prompt and response together, in tokens."""
    temperature: NonNegative = 1.0
    """Sampling temperature; log-probabilities are taken at it."""
    stop: list[str] = []
    """Strings that end a response (kept in it)."""
    concurrent_samples: Count = 64
    """Samples that one engine decodes at once."""
    kv_cache_gib: Positive = 0.5
    """Memory of one engine's key-value cache, in GiB."""


class EvaluationConfig(Section):
    """Measurement on held-out rows, before the first step, every `every` steps and after the last."""

    every: Annotated[int, Field(ge=0)] = 0
    """Steps between evaluations; 0 evaluates at both ends only."""
    prompts: Count | None = None
    """Use the first so many held-out rows; None uses all."""
    samples_per_prompt: Count = 1
    """Responses per held-out prompt: pass@k is estimated for k = 1 and this number."""
    temperature: NonNegative = 1.0
    """Sampling temperature; 0 is greedy."""
    pass_threshold: float = Field(default=1.0, allow_inf_nan=False)
    """A sample passes when its reward is at least this."""


class TrackingConfig(Section):
    """What is recorded, beside metrics.jsonl and events.jsonl, which always are."""

    wandb: Literal["online", "offline", "disabled"] = "disabled"
    """Mode of Weights & Biases."""
    project: str = "gnomon"
    """wandb project."""
    entity: str | None = None
    """wandb entity."""
    tags: list[str] = []
    """wandb tags."""
    samples_per_step: Annotated[int, Field(ge=0)] = 4
    """Samples of each step written to samples/."""


class RayConfig(Section):
    """The cluster."""

    address: str | None = None
    """Address of a running cluster; None is RAY_ADDRESS if set, else a cluster of this run's own."""
    cpus_per_rank: Positive = 1.0
    """CPUs that Ray reserves for each actor process; fractions share a core."""
    object_store_gib: Annotated[float, Field(ge=0.1, allow_inf_nan=False)] | None = None
    """Object store of a cluster of our own; None leaves it to Ray."""


class TimeoutsConfig(Section):
    """Deadlines in seconds. No wait is without one; the error names who is late and what it was doing."""

    place: Positive = 60.0
    """Until the cluster has reserved the actors' resources."""
    start: Positive = 600.0
    """Until every actor has loaded its model."""
    generate: Positive = 1800.0
    """Until all samples of a step are generated."""
    reward: Positive = 1800.0
    """Until all samples of a step are scored."""
    forward: Positive = 1800.0
    """Until log-probabilities of a step are computed."""
    update: Positive = 3600.0
    """Until a step's optimizer updates are done."""
    publish: Positive = 300.0
    """Until new weights are acknowledged by every engine."""
    save: Positive = 600.0
    """Until the final model is written."""


class Config(Section):
    """A run."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the folder `output_dir/name` and the wandb run."""
    output_dir: Folder = Path("runs")
    """Where run folders are made."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Drives prompt order, sampling and initialisation."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Process-group backend and dtype follow from it; the code path does not."""
    model: ModelConfig
    """The starting model."""
    data: DataConfig
    """Rows."""
    rewards: RewardsConfig
    """Rewards."""
    rl: RLConfig
    """Sizes of the loop."""
    algorithm: AlgorithmConfig = AlgorithmConfig()
    """Objective."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer."""
    policy: PolicyConfig = PolicyConfig()
    """Trained actors."""
    reference: ReferenceConfig = ReferenceConfig()
    """Frozen actors."""
    rollout: RolloutConfig = RolloutConfig()
    """Generating actors."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Held-out measurement."""
    tracking: TrackingConfig = TrackingConfig()
    """Records."""
    ray: RayConfig = RayConfig()
    """Cluster."""
    timeouts: TimeoutsConfig = TimeoutsConfig()
    """Deadlines."""

    @model_validator(mode="after")
    def _cross_checks(self) -> Config:
        problems = [message for wrong, message in self._checks() if wrong]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _checks(self) -> list[tuple[bool, str]]:
        """Every rule that concerns more than one field, or one whose remedy needs words: (broken, message)."""
        rollout, rl, policy, data = self.rollout, self.rl, self.policy, self.data
        prompt_limit = data.max_prompt_tokens or 1
        names = [f.name or f.function for f in self.rewards.functions]
        return [
            (
                rl.samples_per_prompt < 2,
                "rl.samples_per_prompt: GRPO compares the samples of one prompt, and one alone has advantage 0; "
                "set it to 2 or more (4 to 16 are usual)",
            ),
            (
                rollout.temperature == 0,
                "rollout.temperature: 0 is greedy, so all samples of a group are equal and nothing is learned; "
                "use 1.0 for training (evaluation.temperature may be 0)",
            ),
            (
                rollout.max_new_tokens >= rollout.max_model_len,
                f"rollout.max_new_tokens: {rollout.max_new_tokens} leaves no room for a prompt in "
                f"rollout.max_model_len {rollout.max_model_len}; lower it or raise max_model_len",
            ),
            (
                rollout.max_new_tokens < rollout.max_model_len < prompt_limit + rollout.max_new_tokens,
                f"data.max_prompt_tokens: {prompt_limit} + rollout.max_new_tokens {rollout.max_new_tokens} is over "
                f"rollout.max_model_len {rollout.max_model_len}; lower one of the first two or raise the last",
            ),
            (
                policy.tokens_per_microbatch < rollout.max_model_len,
                f"policy.tokens_per_microbatch: {policy.tokens_per_microbatch} cannot hold one sample of "
                f"rollout.max_model_len {rollout.max_model_len} tokens; raise it or lower max_model_len",
            ),
            (
                rl.minibatches_per_step > rl.prompts_per_step,
                f"rl.minibatches_per_step: {rl.minibatches_per_step} minibatches of {rl.prompts_per_step} prompts; "
                "use at most one minibatch per prompt (rl.prompts_per_step)",
            ),
            (
                self.evaluation.every > 0 and data.evaluation is None,
                "evaluation.every: there are no rows to evaluate on; set data.evaluation or evaluation.every=0",
            ),
            (
                self.algorithm.correction.floor >= self.algorithm.correction.cap,
                "algorithm.correction.floor: must be below algorithm.correction.cap",
            ),
            (
                len(set(names)) < len(names),
                "rewards.functions: two components have the same name; give each its own `name`",
            ),
            (
                any(not 0 <= b < 1 for b in self.optimizer.betas),
                "optimizer.betas: both must be in [0, 1), for instance [0.9, 0.95]",
            ),
        ]

    @property
    def run_dir(self) -> Path:
        """Folder of this run."""
        return self.output_dir / self.name

    @property
    def max_prompt_tokens(self) -> int:
        """Longest prompt in tokens, whether given or derived."""
        return self.data.max_prompt_tokens or self.rollout.max_model_len - self.rollout.max_new_tokens

    @property
    def dtype(self) -> str:
        """`float32` or `bfloat16`, with auto decided by the device."""
        if self.model.dtype != "auto":
            return self.model.dtype
        return "float32" if self.device == "cpu" else "bfloat16"

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates in one step of the loop; 1 is strictly on-policy."""
        return self.rl.minibatches_per_step * self.rl.epochs_per_step


class _Loader(yaml.SafeLoader):
    """Plain YAML, in which a key that is given twice is an error (PyYAML silently takes the last)."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        """A mapping's node, once its keys are known to differ."""
        node: Any = super().compose_mapping_node(anchor)
        seen = set()
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            if key.value in seen:
                raise yaml.MarkedYAMLError(None, None, f"key {key.value!r} is given twice; keep one", key.start_mark)
            seen.add(key.value)
        return node


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `a.b=c` overrides (values are YAML), check everything.

    Raises:
        ConfigError: with one line per mistake: where, what, how to mend it.
    """
    path = Path(path)
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give the path of a YAML configuration") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; give the path of a YAML file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not text; give the path of a YAML file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; give the path of a YAML file") from None
    except yaml.MarkedYAMLError as error:
        place = f"{path}:{error.problem_mark.line + 1}" if error.problem_mark else f"{path}"
        raise ConfigError(f"{place}: is not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: must be a mapping of sections (model:, data:, rewards:, rl: ...)")
    for override in overrides:
        _apply_override(raw, override)
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        lines = [line for e in error.errors() for line in _explain(e)]
        raise ConfigError("\n".join(f"{path}: {line}" for line in lines)) from None


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"override {override!r}: must look like section.key=value, for instance rl.steps=10")
    *sections, last = key.split(".")
    node = raw
    for section in sections:
        child = node.setdefault(section, {})
        if child is None:
            child = node[section] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {section!r} is a value, not a section")
        node = child
    try:
        node[last] = yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not valid YAML; quote it") from None


def _explain(error: Any) -> list[str]:
    """One line per mistake from one pydantic error: `where: what; how to mend it`."""
    loc = [str(part) for part in error["loc"] if not str(part).startswith("function-")]
    where, kind = ".".join(loc), error["type"]
    if kind == "extra_forbidden":
        section = _section_at(loc[:-1])
        known = list(section.model_fields) if section else []
        close = difflib.get_close_matches(loc[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys here: {', '.join(known)}"
        return [f"{where}: unknown key; {hint}"]
    if kind == "missing":
        section = _section_at(loc[:-1])
        field = section.model_fields.get(loc[-1]) if section else None
        return [f"{where}: is required: {field.description if field else ''}".rstrip(": ")]
    if kind == "value_error":
        return [f"{where}: {line}" if where else line for line in str(error["ctx"]["error"]).splitlines()]
    return [f"{where}: {error['msg'][0].lower()}{error['msg'][1:]}, but got {error['input']!r}"]


def _section_at(loc: list[str]) -> type[BaseModel] | None:
    """The section class at a path of keys, through lists, unions and annotations."""
    current: Any = Config
    for part in loc:
        if part.isdigit():
            continue
        if not (isinstance(current, type) and issubclass(current, BaseModel)) or part not in current.model_fields:
            return None
        current = _section_in(current.model_fields[part].annotation)
    return current


def _section_in(annotation: Any) -> Any:
    """The section class inside `X`, `X | None`, `list[X]`, `Annotated[X, ...]`."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation
    return next((s for a in typing.get_args(annotation) if isinstance(s := _section_in(a), type)), None)
