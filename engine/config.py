"""The whole configuration of a run: frozen sections, one docstring line per field, every cross-check.

Imports neither torch nor Ray, so that a mistake is told in under a second, before anything starts.
Sizes are named for what they count: `prompts_per_step`, `samples_per_prompt`, `tokens_per_microbatch`.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from engine.presets import PRESETS


class UserError(ValueError):
    """Something the user can mend. The message says what is wrong, where, and how to mend it."""


class ConfigError(UserError):
    """The configuration cannot be run as it is written."""


class Section(BaseModel):
    """A part of the configuration: immutable, and closed to keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)


NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""What a run or a stage may be called: it names a folder."""
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Location = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path, or something else that never starts with ~; a leading ~ is the home folder."""
Folder = Annotated[Path, AfterValidator(lambda folder: Path(os.path.expanduser(folder)))]
"""The same, for what is always a path."""


class NewModelConfig(Section):
    """A model with random weights and a tokenizer of its own; for `stage: pretrain`."""

    architecture: dict[str, Any]
    """Fields of a transformers configuration, `model_type` (llama, qwen3, gpt_neox ...) among them."""
    vocabulary_size: Annotated[int, Field(ge=264)] = 4096
    """Most tokens of the byte-level BPE tokenizer that is trained on the corpus; 261 are the bytes and the special
    ones."""
    tokenizer: Location | None = None
    """Folder or Hub name of a tokenizer to take instead of training one."""


class AdapterConfig(Section):
    """Parameter-efficient fine-tuning: the base weights stay frozen, bit for bit. Saved in peft's format."""

    kind: Literal["none", "lora", "ia3", "bottleneck", "prompt", "prefix"] = "none"
    """none trains all weights; LoRA (arXiv:2106.09685), IA3 (2205.05638), bottleneck layers (1902.00751), prompt
    (2104.08691) or prefix tuning (2101.00190)."""
    rank: Count = 16
    """Rank of LoRA; width of a bottleneck."""
    alpha: Positive = 32.0
    """LoRA's scale: alpha / rank, or alpha / sqrt(rank) with `rslora`."""
    targets: list[str] = []
    """Names of the layers that LoRA and IA3 change; empty is every linear layer but the output (LoRA), peft's own
    choice (IA3)."""
    dora: bool = False
    """Weight-decomposed LoRA (arXiv:2402.09353)."""
    rslora: bool = False
    """Rank-stabilised LoRA (arXiv:2312.03732)."""
    virtual_tokens: Count = 16
    """Length of a trained prompt or prefix."""
    four_bit: bool = False
    """Keep the frozen weights in 4 bits (QLoRA, arXiv:2305.14314); needs a GPU and bitsandbytes."""

    @property
    def virtual(self) -> bool:
        """Whether each sample begins with trained tokens of its own, so that samples can share nothing."""
        return self.kind in ("prompt", "prefix")

    @property
    def shipped_alone(self) -> bool:
        """Whether engines get the adapter without the weights below it; DoRA and IA3, which they do not know, are
        merged."""
        return self.kind == "lora" and not self.dora


class ModelConfig(Section):
    """The language model that the run starts from."""

    path: Location = ""
    """Folder in Hugging Face format, a Hub name, or `stage:NAME`, the model that an earlier stage ended with."""
    new: NewModelConfig | None = None
    """Start from random weights instead of a `path`."""
    adapter: AdapterConfig = AdapterConfig()
    """Train a small adapter instead of all weights."""
    export: Literal["merged", "adapter"] = "merged"
    """What the final model folder holds of an adapter: a whole model where its kind can be merged, or the adapter
    alone."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Weights and activations; auto is float32 on the CPU and bfloat16 on a GPU."""
    trust_remote_code: bool = False
    """Run Python code that the model's folder brings along."""
    gradient_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass: less memory, about a third more time."""


class SourceConfig(Section):
    """Where rows come from. A bare string in the YAML is the `path`."""

    path: Location
    """A jsonl/json/parquet/csv/txt file or glob, `pkg.mod:fn` or `file.py:fn`, or a Hugging Face dataset name."""
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
    """Rows for training and for evaluation."""

    train: Source
    """Rows to train on."""
    evaluation: Source | None = None
    """Held-out rows; needed when `evaluation.every` is set."""
    general_text: Source | None = None
    """Text (column `text`) whose perplexity before and after shows what was forgotten."""
    columns: dict[str, str] = {}
    """Renames: our name -> the name in the rows, e.g. `{prompt: question}`."""
    system_prompt: str | None = None
    """System message put before prompts that bring none; None leaves the chat template's own default."""
    chat_template: Literal["auto", "always", "never"] = "auto"
    """Wrap plain-text prompts as a user message: auto does so when the tokenizer has a chat template."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    """A malformed row stops the run before it starts, or is skipped and counted."""
    on_long_row: Literal["fail", "skip", "truncate"] = "fail"
    """A row over the token limit: an error, skipped, or cut (a prompt without a chat template at its start, an answer
    at its end)."""
    max_prompt_tokens: Count | None = None
    """Longest prompt for generation, in tokens; None is `rollout.max_model_len - rollout.max_new_tokens`."""


Normalization = Literal["none", "running", "group"]


class RewardConfig(Section):
    """One reward function. A bare string in the YAML is the `function`; None defers to its `@reward`."""

    function: Location
    """`pkg.mod:fn` or `file.py:fn`, or a built-in: exact, numeric, math, regex, choice, json_schema, xml_format,
    length, repetition, language, instructions, reasoning_gym, code, remote, judge, generative_verifier."""
    arguments: dict[str, Any] = {}
    """What a built-in is told; where it is given for a function of your own, that is called with it and returns the
    reward function."""
    name: str | None = None
    """Name in the metrics; default: the function's own."""
    weight: float | None = Field(default=None, allow_inf_nan=False)
    """Factor in the summed reward; default: that of `@reward`, else 1."""
    timeout: Positive | None = None
    """Seconds one call may take; default: that of `@reward`, else `rewards.timeout`."""
    on_error: Literal["skip", "fail"] | None = None
    """After the retries: drop the sample with a reason, or stop the run; default: that of `@reward`, else skip."""
    gate: bool | None = None
    """Where this component is 0 or less, all others of the sample count 0; default: that of `@reward`, else false."""
    clip: tuple[float, float] | None = None
    """Bounds of the values, `[low, high]`."""
    normalize: Normalization | None = None
    """As `rewards.normalize`, for this component."""


ASKING = ("judge", "generative_verifier")
"""Built-in rewards that ask a language model."""


def _from_function(value: Any) -> Any:
    return {"function": value} if isinstance(value, str) else value


class ModelRewardConfig(Section):
    """A reward model as a component of the reward. A bare string in the YAML is the `path`."""

    path: Location
    """Folder that a stage of the kind `reward_model` has made, or `stage:NAME`; its tokenizer is the policy's."""
    name: str = Field(default="reward_model", pattern=NAME_PATTERN)
    """Name in the metrics."""
    weight: float = Field(default=1.0, allow_inf_nan=False)
    """Factor in the summed reward; 0 measures only."""
    normalize: bool = True
    """Subtract the mean and divide by the standard deviation that its folder records."""
    clip: tuple[float, float] | None = None
    """Bounds of the values, `[low, high]`."""
    steps: Literal["min", "mean", "last", "product", "each"] = "min"
    """How a process reward model's chances of the steps become one number; each rewards every step where it ends."""
    ranks: Count = 1
    """Data-parallel processes."""


class ServerConfig(Section):
    """A frozen language model that judges and verifiers ask; a vLLM server, started and ended with the run."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    """What the entry's `arguments: {server: NAME}` says."""
    path: Location
    """Folder or Hub name, or `stage:NAME`; with a chat template."""
    max_model_len: Count = 4096
    """Most tokens of a question and its answer together."""
    kv_cache_gib: Positive = 1.0
    """Memory for keys and values."""
    threads: Count = 1
    """CPU threads."""


class RewardsConfig(Section):
    """Reward functions and the processes that run them; reward models."""

    functions: list[Annotated[RewardConfig, BeforeValidator(_from_function)]] = []
    """The components; the reward of a sample is the weighted sum of these and of `models`. One of the two is needed
    for `rl`; elsewhere they score held-out answers."""
    models: list[Annotated[ModelRewardConfig, BeforeValidator(_from_path)]] = []
    """Frozen reward models."""
    servers: list[ServerConfig] = []
    """Language models for `judge` and `generative_verifier`."""
    normalize: Normalization = "none"
    """Before the weights: each component by its running mean and deviation, or by those of its group (GDPO,
    arXiv:2601.05242), or not at all."""
    steps: str | None = None
    """What ends a step of a response, for functions that return one value per step: a text, or `file.py:fn`, which cuts
    a response into a list of texts. In an environment the turns are the steps."""
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


Advantage = Literal["gae", "returns", "group_relative", "step_relative", "leave_one_out", "best_of_n", "best_vs_worst"]
PolicyLoss = Literal["ppo_clip", "gspo", "cispo", "reinforce", "preference"]


class AlgorithmConfig(Section):
    """The objective of reinforcement learning. A bare string in the YAML is the `name`."""

    name: str = "grpo"
    """Preset that says what the keys below are where they are not given: ppo, grpo, dr_grpo, rloo, reinforce_pp,
    reinforce_pp_baseline, dapo, gspo, cispo, online_dpo, iterative_dpo, rejection_sampling."""
    advantage: str = "group_relative"
    """gae (with a critic), returns (reward-to-go), group_relative, step_relative (each step's reward among those of the
    group's steps, arXiv:2402.03300), leave_one_out, best_of_n (1 for a group's best; the
    others are not trained), best_vs_worst (pairs for a preference loss), or your own: `pkg.mod:fn`, `file.py:fn`."""
    advantage_scale: Literal["std", "none", "batch"] = "std"
    """group_relative: divide by the group's standard deviation, by nothing, or by the batch's."""
    whiten_advantages: bool = False
    """Variance 1 over all trained tokens of a step; mean 0 too, where advantages are not centred in groups already."""
    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Discount per token (gae, returns)."""
    lam: Annotated[float, Field(ge=0, le=1)] = 1.0
    """GAE's lambda: 1 trusts the rewards alone, 0 the critic."""
    reward_clip: Positive | None = None
    """Rewards are clipped into [-reward_clip, reward_clip] before anything is made of them."""
    whiten_rewards: bool = False
    """Mean 0 and variance 1 over a step's rewards, after the clipping."""
    overlong_penalty: NonNegative = 0.0
    """Taken off the reward of a response that is cut at the limit, in part as it comes near (arXiv:2503.14476)."""
    overlong_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Last part of `rollout.max_new_tokens` over which that penalty grows from 0."""
    dynamic_sampling_rounds: Annotated[int, Field(ge=0)] = 0
    """Rounds in which groups without differences are replaced by those of other prompts (arXiv:2503.14476)."""
    loss: str = "ppo_clip"
    """ppo_clip, gspo, cispo, reinforce, preference (on pairs; see the section `preference`), or your own: `pkg.mod:fn`,
    `file.py:fn`."""
    clip_low: NonNegative = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: NonNegative = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """ppo_clip: bound on the loss of negative advantages (arXiv:1912.09729)."""
    loss_aggregation: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"] = (
        "seq-mean-token-mean"
    )
    """How per-token losses become one number; denominators are global."""
    entropy_coef: NonNegative = 0.0
    """Weight of the entropy, per token, that is added to the objective."""
    target_kl: Positive | None = None
    """A step's further updates are left out once KL(policy that sampled || policy now), per token, is above this."""
    reference: Literal["start", "step"] = "start"
    """The policy that a KL term or a preference loss compares with: the starting one, or the one that sampled."""
    kl_coef: NonNegative = 0.0
    """Weight of the KL to the reference; 0 starts no reference model for it."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where the KL is counted: with a gradient of its own, or taken off each token's reward."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Per-token estimator of that KL (k1 has no gradient in expectation, so not in the loss)."""
    kl_target: Positive | None = None
    """Steer `kl_coef` so that the KL of a whole sample, in nats, is about this (arXiv:1909.08593)."""
    kl_horizon: Positive = 10_000.0
    """Samples in which a steered `kl_coef` changes by 20 % at most."""
    correction: CorrectionConfig = CorrectionConfig()
    """Trainer-rollout mismatch correction."""

    @property
    def needs_critic(self) -> bool:
        """Whether advantages come from a value model."""
        return self.advantage == "gae"

    @property
    def only_advantages(self) -> bool:
        """Whether a sample without an advantage has no part in the loss."""
        kl_in_loss = self.kl_coef > 0 and self.kl_in == "loss"
        return self.loss in ("ppo_clip", "gspo", "cispo", "reinforce") and not kl_in_loss and self.entropy_coef == 0

    @property
    def trains_pairs(self) -> bool:
        """Whether updates are made of pairs, a better and a worse answer to one prompt."""
        return self.advantage == "best_vs_worst"

    @property
    def compares_samples(self) -> bool:
        """Whether one sample of a prompt alone teaches nothing."""
        return self.advantage in ("group_relative", "step_relative", "leave_one_out", "best_of_n", "best_vs_worst")


def _from_preset(value: Any) -> Any:
    """The preset's values under those that are given."""
    given = {"name": value} if isinstance(value, str) else value
    if not isinstance(given, Mapping):
        return value
    name = given.get("name", "grpo")
    if name not in PRESETS:
        close = difflib.get_close_matches(str(name), PRESETS, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(PRESETS)}"
        raise ValueError(f"no algorithm is called {name!r}; {hint}")
    return {**PRESETS[name], **given}


class CriticConfig(Section):
    """The value model and its actors; started only for `algorithm.advantage: gae`."""

    path: Location = ""
    """A reward model's folder (pairwise or ranking), or `stage:NAME`; empty is the policy's starting model with a value
    head of zeros."""
    learning_rate: Positive = 1e-5
    """Peak learning rate; everything else of the optimizer is as for the policy."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """First steps in which only the critic is trained."""
    value_clip: Positive | None = 0.2
    """A value may move this far from that at the step's start, in units of the return; null does not bound it."""
    ranks: Count = 1
    """Data-parallel processes."""


class RLConfig(Section):
    """Sizes of the reinforcement-learning loop."""

    steps: Count = 100
    """Rounds of generate, score, update, publish."""
    prompts_per_step: Count = 16
    """Distinct prompts (groups) in one step."""
    samples_per_prompt: Count = 8
    """Responses generated for each prompt (the group size)."""
    minibatches_per_step: Count = 1
    """Optimizer updates per epoch over a step's samples."""
    epochs_per_step: Count = 1
    """Passes over a step's samples."""
    max_staleness: Annotated[int, Field(ge=0)] = 0
    """Versions of the weights that a token may be behind when it is trained. 0 is strictly on-policy: generation waits
    for each update; with more it runs ahead beside the training (arXiv:2505.24298)."""


class TrainingConfig(Section):
    """Sizes of the other stages' loop: passes over rows."""

    epochs: Positive = 1.0
    """Passes over the rows, a part of one too."""
    updates: Count | None = None
    """Optimizer updates; None follows from `epochs`."""
    rows_per_update: Count = 32
    """Rows (conversations, pairs, rankings, prompts, pieces of text) in one optimizer update."""
    max_length: Count = 1024
    """Longest sample, in tokens; text for `pretrain` is cut into pieces of this length, documents never share one."""


class SFTConfig(Section):
    """Supervised fine-tuning on `messages`, or `prompt` and `completion`."""

    loss_on: Literal["assistant", "answer", "all"] = "assistant"
    """The assistant's tokens (with the reasoning, if there is a column for it), those of the answer alone, or every
    token."""
    reasoning_format: str = "<think>\n{reasoning}\n</think>\n\n{completion}"
    """How a column `reasoning` and the answer become one completion."""


class RewardModelConfig(Section):
    """Reward models from preferences (`prompt`, `chosen`, `rejected`), rankings (`prompt`, `responses`, `ranks`) or
    steps."""

    kind: Literal["pairwise", "ranking", "process"] = "pairwise"
    """Bradley-Terry (column `margin` is used where there is one), Plackett-Luce with ties, or one label per reasoning
    step."""
    center_coef: NonNegative = 0.0
    """Weight of (chosen + rejected)^2, which keeps rewards around 0; 0.01 is usual (pairwise)."""
    annotator_heads: bool = False
    """A shared head plus one for each value of the column `annotator` (pairwise, ranking)."""
    head_decay: NonNegative = 0.0
    """Weight of the mean square of what annotator heads add: pulls annotators towards the shared head."""
    step_separator: str = "\n"
    """Text put after each step of a process row; the step is scored at its last token."""


class PreferenceConfig(Section):
    """Preference tuning on `prompt`, `chosen`, `rejected` (KTO also: `prompt`, `completion`, `label`)."""

    loss: Literal["sigmoid", "hinge", "robust", "ipo", "kto", "orpo", "simpo"] = "sigmoid"
    """DPO (arXiv:2305.18290) with a sigmoid, hinge or robust loss; IPO (2310.12036), KTO (2402.01306), ORPO
    (2403.07691), SimPO (2405.14734)."""
    beta: Positive = 0.1
    """Strength of the pull to the reference (SimPO: scale of the reward, 2 is usual; ORPO: weight of the odds
    ratio)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of labels taken to be wrong (sigmoid: cDPO; robust)."""
    simpo_gamma: NonNegative = 0.5
    """SimPO's target margin, in units of its reward."""
    desirable_weight: NonNegative = 1.0
    """KTO's weight of desirable rows."""
    undesirable_weight: NonNegative = 1.0
    """KTO's weight of undesirable rows."""
    nll_coef: NonNegative | None = None
    """Weight of the chosen answer's mean negative log-likelihood (arXiv:2404.19733); None is 1 for ORPO, else 0."""


class DistillConfig(Section):
    """Distillation from a teacher with the same tokenizer."""

    teacher: Location = ""
    """Folder, Hub name or `stage:NAME` of the teacher."""
    mode: Literal["on_policy", "sequence"] = "on_policy"
    """The student answers and the teacher scores each token (GKD, arXiv:2306.13649), or the student learns the
    teacher's answers."""
    on_policy_fraction: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of updates on the student's own answers; the others take the rows' `completion`."""
    beta: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Generalized Jensen-Shannon divergence: 0 is KL(teacher || student), 1 is KL(student || teacher)."""


class CheckpointConfig(Section):
    """Whole states from which a killed run goes on, bit for bit."""

    every: Annotated[int, Field(ge=0)] = 0
    """Steps (optimizer updates, in the offline stages) between checkpoints; 0 writes none."""
    folder: Location = ""
    """Where they are written: a folder on storage that all machines see, or a URL of a kind that fsspec knows
    (`s3://...`, with the package for it installed); the run's name is added. Empty is `checkpoints/` in the run's
    folder."""
    best: str = ""
    """Metric of the held-out rows, as in `eval/reward`, whose best model is kept in `best/`; with `-` in front less is
    better. Empty keeps the last model only."""
    keep: Count = 2
    """Newest checkpoints that are kept."""


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
    stop_after_skipped: Count = 3
    """Stop the run when so many updates in a row were skipped because the loss or the gradient was not finite."""


class PolicyConfig(Section):
    """The trained model's actors, whichever stage trains it."""

    ranks: Count = 1
    """Data-parallel processes."""
    threads: Count = 1
    """CPU threads of each process that trains a model or scores with one: critic, reference and reward models too."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage, the critic's too."""
    tokens_per_microbatch: Count = 4096
    """Token budget of one packed forward and backward pass."""


class ReferenceConfig(Section):
    """The frozen starting policy's actors; started only where `algorithm` compares with it and all weights are
    trained."""

    measure: bool = False
    """Measure the KL to the starting policy even where nothing depends on it."""
    ranks: Count = 1
    """Data-parallel processes."""


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
    on_new_weights: Literal["keep", "recompute"] = "keep"
    """Responses under way when new weights arrive (`rl.max_staleness` above 0) keep their cached keys and values
    (arXiv:2509.19128), or have them computed anew."""


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
    stop_after_incidents: Annotated[int, Field(ge=0)] = 16
    """Actors that a run loses and replaces (or corrupted weights, failed checkpoints) within 100 steps; one more ends
    it."""


class EnvironmentConfig(Section):
    """Episodes of several turns: the policy answers, the environment replies. A bare string in the YAML is the path."""

    path: Location
    """`pkg.mod:Class` or `file.py:Class` of an environment, or `tools`."""
    arguments: dict[str, Any] = {}
    """What the class is made with; of `tools`: `tools: [file.py:function, ...]`."""
    weight: float = Field(default=1.0, allow_inf_nan=False)
    """Factor of the environment's own rewards (component `environment`)."""
    max_turns: Count = 8
    """Answers of the policy in one episode."""
    max_tokens: Count | None = None
    """Tokens of an episode after its prompt, the environment's too; None is what `rollout.max_model_len` leaves. One
    answer has `rollout.max_new_tokens` at most."""
    timeout: Positive = 30.0
    """Seconds that one call of the environment may take."""
    retries: Annotated[int, Field(ge=0)] = 1
    """Times an episode is begun anew after a failed call, before its sample is dropped."""
    workers: Count = 1
    """Processes that run environments."""


DeviceRole = Literal["policy", "critic", "reference", "reward_model", "rollout"]


class PlacementConfig(Section):
    """Which roles share devices. Checked against the cluster before anything starts."""

    mode: Literal["separate", "packed", "turns"] = "separate"
    """separate: a device for each rank of each role; packed: rank i of all roles of a group on one device, all in its
    memory; turns: the same, but who does not work leaves the device's memory (vLLM sleeps, models are offloaded)."""
    groups: list[list[DeviceRole]] = []
    """Roles that share (packed, turns), e.g. `[[policy, critic], [rollout, reward_model]]`; empty is all of them in one
    group, and roles in no group have devices of their own."""
    device: str | None = None
    """Ray's name of the resource that is one device; None is GPU on cuda, and CPUs alone on the cpu."""


class TimeoutsConfig(Section):
    """Deadlines in seconds. No wait is without one; the error names who is late and what it was doing."""

    start: Positive = 600.0
    """Until the cluster has reserved the actors' resources, and until every actor has loaded its model."""
    generate: Positive = 1800.0
    """Until a prompt that an engine was given is answered in full, and until a group is scored."""
    update: Positive = 3600.0
    """Until a step's log-probabilities are computed, and until its optimizer updates are done."""
    publish: Positive = 600.0
    """Until new weights are acknowledged by every engine, and until a model or a checkpoint is written."""
    silence: Positive = 120.0
    """An actor that is waited for and gives no sign of life for so long is taken for dead."""


Stage = Literal["pretrain", "sft", "reward_model", "preference", "distill", "rl"]


class Config(Section):
    """A run of one stage."""

    name: str = Field(default="run", pattern=NAME_PATTERN)
    """Names the folder `output_dir/name` and the wandb run."""
    output_dir: Folder = Path("runs")
    """Where run folders are made."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Drives prompt order, sampling and initialisation."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Process-group backend and dtype follow from it; the code path does not."""
    stage: Stage = "rl"
    """What is trained, and how."""
    resume: Literal["auto", "never"] = "auto"
    """auto goes on from the newest whole checkpoint in the run's folder, and leaves a finished run as it is; never
    demands a new folder."""
    model: ModelConfig
    """The starting model."""
    data: DataConfig
    """Rows."""
    rewards: RewardsConfig = RewardsConfig()
    """Rewards."""
    environment: Annotated[EnvironmentConfig | None, BeforeValidator(_from_path)] = None
    """Episodes of several turns; None is one answer to each prompt."""
    rl: RLConfig = RLConfig()
    """Sizes of the reinforcement-learning loop."""
    algorithm: Annotated[AlgorithmConfig, BeforeValidator(_from_preset)] = AlgorithmConfig()
    """Objective of reinforcement learning: the name of a preset, or a section."""
    training: TrainingConfig = TrainingConfig()
    """Sizes of the other stages' loop."""
    sft: SFTConfig = SFTConfig()
    """Supervised fine-tuning."""
    reward_model: RewardModelConfig = RewardModelConfig()
    """Reward models."""
    preference: PreferenceConfig = PreferenceConfig()
    """Preference tuning."""
    distill: DistillConfig = DistillConfig()
    """Distillation."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer."""
    policy: PolicyConfig = PolicyConfig()
    """Trained actors."""
    critic: CriticConfig = CriticConfig()
    """Value model."""
    reference: ReferenceConfig = ReferenceConfig()
    """Frozen actors."""
    rollout: RolloutConfig = RolloutConfig()
    """Generating actors."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Held-out measurement."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    tracking: TrackingConfig = TrackingConfig()
    """Records."""
    ray: RayConfig = RayConfig()
    """Cluster."""
    placement: PlacementConfig = PlacementConfig()
    """Devices."""
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
        checks = [*self._model_checks(), *self._loop_checks(), *self._placement_checks()]
        if self.generates:
            checks += self._generation_checks()
        if self.stage == "rl":
            checks += [*self._rl_checks(), *self._algorithm_checks()]
        return checks

    def _placement_checks(self) -> list[tuple[bool, str]]:
        mode, roles = self.placement.mode, [role for group in self.placement.groups for role in group]
        return [
            (
                mode == "separate" and bool(roles),
                "placement.groups: roles share nothing with mode: separate; use packed or turns, or leave groups out",
            ),
            (
                len(set(roles)) < len(roles),
                "placement.groups: a role is named twice; keep it in one group",
            ),
            (
                mode == "turns" and self.device == "cuda" and self.policy.zero_stage == 0,
                "placement.mode: turns on a GPU offloads the trained models through DeepSpeed, which needs ZeRO; set "
                "policy.zero_stage to 1, 2 or 3",
            ),
        ]

    def _model_checks(self) -> list[tuple[bool, str]]:
        model, adapter = self.model, self.model.adapter
        kind = adapter.kind
        mergeable = kind in ("none", "lora", "ia3")
        return [
            (
                not model.path and not model.new,
                "model.path: is required: a folder in Hugging Face format or a Hub name",
            ),
            (
                bool(model.path) and model.new is not None,
                "model.new: there is a model.path already; keep one of the two",
            ),
            (
                model.new is not None and self.stage != "pretrain",
                f"model.new: random weights are for stage: pretrain, not {self.stage}; give a model.path",
            ),
            (
                self.environment is not None and self.stage != "rl",
                f"environment: episodes are for stage: rl, not {self.stage}; leave it out",
            ),
            (
                model.new is not None and kind != "none",
                "model.adapter.kind: an adapter on random weights learns nothing; use none",
            ),
            (
                self.generates and not mergeable,
                f"model.adapter.kind: the engines cannot run {kind}; use lora or ia3, or leave rewards.functions out "
                "of an offline stage",
            ),
            (
                model.export == "merged" and not mergeable,
                f"model.export: {kind} cannot be merged into the weights; use adapter",
            ),
            (
                adapter.four_bit and (self.device == "cpu" or kind != "lora" or self.stage == "reward_model"),
                "model.adapter.four_bit: needs device: cuda and kind: lora, and is not for reward models",
            ),
            (
                kind == "prefix" and model.gradient_checkpointing,
                "model.gradient_checkpointing: drops the keys and values of a trained prefix; set it to false",
            ),
            (
                self.stage == "distill" and not self.distill.teacher,
                "distill.teacher: is required: the folder or Hub name of the teacher",
            ),
        ]

    def _loop_checks(self) -> list[tuple[bool, str]]:
        budget, longest = self.policy.tokens_per_microbatch, self.training.max_length
        return [
            (
                self.stage != "rl" and budget < longest,
                f"policy.tokens_per_microbatch: {budget} cannot hold one sample of training.max_length {longest} "
                "tokens; raise it or lower max_length",
            ),
            (
                self.evaluation.every > 0 and self.data.evaluation is None,
                "evaluation.every: there are no rows to evaluate on; set data.evaluation or evaluation.every=0",
            ),
            (
                any(not 0 <= b < 1 for b in self.optimizer.betas),
                "optimizer.betas: both must be in [0, 1), for instance [0.9, 0.95]",
            ),
            (
                self.stage == "preference" and self.preference.loss == "kto" and self.training.rows_per_update < 2,
                "training.rows_per_update: KTO compares answers with those of other rows; set it to 2 or more",
            ),
            (
                self.preference.label_smoothing > 0 and self.preference.loss not in ("sigmoid", "robust"),
                f"preference.label_smoothing: has no meaning for {self.preference.loss}; set it to 0",
            ),
            (
                self.sft.reasoning_format.count("{completion}") != 1
                or self.sft.reasoning_format.count("{reasoning}") != 1,
                "sft.reasoning_format: must hold {reasoning} and {completion} once each",
            ),
        ]

    def _generation_checks(self) -> list[tuple[bool, str]]:
        rollout = self.rollout
        prompt_limit = self.data.max_prompt_tokens or 1
        names = [f.name or f.function for f in self.rewards.functions] + [m.name for m in self.rewards.models]
        servers = [server.name for server in self.rewards.servers]
        asked = [f.arguments.get("server") for f in self.rewards.functions if f.function in ASKING]
        unknown = [name for name in asked if name is not None and name not in servers]
        return [
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
                self.stage in ("rl", "distill") and self.policy.tokens_per_microbatch < rollout.max_model_len,
                f"policy.tokens_per_microbatch: {self.policy.tokens_per_microbatch} cannot hold one sample of "
                f"rollout.max_model_len {rollout.max_model_len} tokens; raise it or lower max_model_len",
            ),
            (
                self.stage in ("rl", "distill") and rollout.temperature == 0,
                "rollout.temperature: 0 is greedy, so all samples of a group are equal and nothing is learned; "
                "use 1.0 for training (evaluation.temperature may be 0)",
            ),
            (
                len(set(names)) < len(names),
                "rewards: two components have the same name; give each its own `name`",
            ),
            (
                len(set(servers)) < len(servers),
                "rewards.servers: two have the same name; give each its own `name`",
            ),
            (
                bool(unknown),
                f"rewards.functions: server {', '.join(map(repr, unknown))} is none of rewards.servers "
                f"({', '.join(servers) or 'empty'})",
            ),
        ]

    def _rl_checks(self) -> list[tuple[bool, str]]:
        rl = self.rl
        own = [component.normalize for component in self.rewards.functions if component.normalize is not None]
        return [
            (
                "group" in [self.rewards.normalize, *own] and rl.samples_per_prompt < 2,
                "rewards.normalize: group compares the samples of one prompt; set rl.samples_per_prompt to 2 or more",
            ),
            (
                any(m.steps == "each" for m in self.rewards.models) and not self.rewards.steps,
                "rewards.models: steps: each needs rewards.steps, the text that ends a step (the step_separator that "
                "the model was trained with)",
            ),
            (
                not self.rewards.functions and not self.rewards.models and self.environment is None,
                "rewards.functions: is required: the reward functions, at least one; or rewards.models",
            ),
            (
                self.algorithm.compares_samples and rl.samples_per_prompt < 2,
                f"rl.samples_per_prompt: {self.algorithm.name} compares the samples of one prompt, and one alone "
                "teaches nothing; set it to 2 or more (4 to 16 are usual)",
            ),
            (
                rl.max_staleness > 0 and self.placement.mode == "turns",
                "rl.max_staleness: engines that run ahead work at the same time as the trained models; use "
                "placement.mode separate or packed, or set it to 0",
            ),
            (
                rl.minibatches_per_step > rl.prompts_per_step,
                f"rl.minibatches_per_step: {rl.minibatches_per_step} minibatches of {rl.prompts_per_step} prompts; "
                "use at most one minibatch per prompt (rl.prompts_per_step)",
            ),
            (
                self.algorithm.correction.floor >= self.algorithm.correction.cap,
                "algorithm.correction.floor: must be below algorithm.correction.cap",
            ),
        ]

    def _algorithm_checks(self) -> list[tuple[bool, str]]:
        algorithm = self.algorithm
        own = ":" in algorithm.advantage
        samples = self.rl.prompts_per_step * self.rl.samples_per_prompt
        pairs = algorithm.loss == "preference"
        return [
            (
                not own and algorithm.advantage not in get_args(Advantage),
                f"algorithm.advantage: {algorithm.advantage!r} is none of {', '.join(get_args(Advantage))}, and no "
                "pkg.mod:fn or file.py:fn",
            ),
            (
                ":" not in algorithm.loss and algorithm.loss not in get_args(PolicyLoss),
                f"algorithm.loss: {algorithm.loss!r} is none of {', '.join(get_args(PolicyLoss))}, and no pkg.mod:fn "
                "or file.py:fn",
            ),
            (
                pairs != algorithm.trains_pairs,
                "algorithm.loss: preference and algorithm.advantage: best_vs_worst go together; use both or neither",
            ),
            (
                pairs and self.preference.loss == "kto",
                "preference.loss: pairs of rollouts are not trained with kto; use sigmoid, ipo, hinge, robust, orpo or "
                "simpo",
            ),
            (
                pairs and (algorithm.kl_coef > 0 or algorithm.entropy_coef > 0),
                "algorithm.kl_coef, algorithm.entropy_coef: a preference loss has no such term; set both to 0 "
                "(preference.beta is the pull to the reference)",
            ),
            (
                algorithm.kl_coef > 0 and algorithm.kl_in == "loss" and algorithm.kl_estimator == "k1",
                "algorithm.kl_estimator: k1 in the loss has no gradient in expectation; use k2 or k3, or kl_in: reward",
            ),
            (
                algorithm.kl_target is not None and algorithm.kl_coef == 0,
                "algorithm.kl_target: there is no KL term to steer; set algorithm.kl_coef above 0, where it starts",
            ),
            (
                algorithm.kl_target is not None and algorithm.kl_horizon <= 0.2 * samples,
                f"algorithm.kl_horizon: must be over a fifth of the {samples} samples of a step",
            ),
            (
                algorithm.overlong_penalty > 0 and self.environment is not None,
                "algorithm.overlong_penalty: is for single answers; in an environment set it to 0 and let the "
                "environment's own reward say what a long episode costs",
            ),
            (
                algorithm.target_kl is not None and pairs,
                "algorithm.target_kl: a preference loss has no ratio to the policy that sampled; leave it out",
            ),
            (
                algorithm.reference == "step"
                and algorithm.kl_coef > 0
                and (self.updates_per_step == 1 or algorithm.kl_in == "reward" or algorithm.kl_target is not None),
                "algorithm.reference: the KL to the policy that sampled is 0 until a step's second update, so it can "
                "neither be in the reward nor be steered; use start, or kl_in: loss and more rl.minibatches_per_step",
            ),
            (
                self.critic.warmup_steps > 0 and not algorithm.needs_critic,
                "critic.warmup_steps: this algorithm has no critic; set it to 0",
            ),
            (
                algorithm.needs_critic and self.critic.warmup_steps >= self.rl.steps,
                "critic.warmup_steps: leaves no step of rl.steps in which the policy is trained; lower it",
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
    def generates(self) -> bool:
        """Whether engines run: to learn from their samples, or to score answers to held-out prompts."""
        if self.stage == "reward_model":
            return False
        scored = bool(self.rewards.functions or self.rewards.models)
        scores_answers = scored and self.data.evaluation is not None
        return self.stage in ("rl", "distill") or (self.stage != "pretrain" and scores_answers)

    @property
    def model_paths(self) -> dict[str, str]:
        """Every model that the stage reads: key -> folder, Hub name or `stage:NAME`; empty ones left out."""
        paths = {"model.path": self.model.path}
        if self.stage == "distill":
            paths["distill.teacher"] = self.distill.teacher
        if self.stage == "rl" and self.algorithm.needs_critic:
            paths["critic.path"] = self.critic.path
        paths |= {f"rewards.models.{i}.path": source.path for i, source in enumerate(self.rewards.models)}
        paths |= {f"rewards.servers.{i}.path": server.path for i, server in enumerate(self.rewards.servers)}
        return {key: path for key, path in paths.items() if path}

    def with_model_paths(self, change: Callable[[str], str]) -> Config:
        """The same with every model's path, whichever stage reads it, changed so."""
        models = [source.model_copy(update={"path": change(source.path)}) for source in self.rewards.models]
        servers = [server.model_copy(update={"path": change(server.path)}) for server in self.rewards.servers]
        return self.model_copy(
            update={
                "model": self.model.model_copy(update={"path": change(self.model.path)}),
                "distill": self.distill.model_copy(update={"teacher": change(self.distill.teacher)}),
                "critic": self.critic.model_copy(update={"path": change(self.critic.path)}),
                "rewards": self.rewards.model_copy(update={"models": models, "servers": servers}),
            }
        )

    @property
    def trains_adapter(self) -> bool:
        """Whether the model's own weights stay frozen."""
        return self.model.adapter.kind != "none"

    @property
    def compares_with_start(self) -> bool:
        """Whether log-probs under the starting policy are needed in the reinforcement-learning loop."""
        algorithm = self.algorithm
        pairs = algorithm.loss == "preference" and self.preference.loss not in ("orpo", "simpo")
        return self.reference.measure or (algorithm.reference == "start" and (algorithm.kl_coef > 0 or pairs))

    @property
    def roles_overlap(self) -> bool:
        """Whether frozen models work beside the engines: not where they take turns, nor on a laptop's few cores."""
        own_devices = self.device == "cuda" or self.placement.device is not None
        return self.placement.mode != "turns" and (own_devices or self.rl.max_staleness > 0)

    @property
    def weight_route(self) -> Literal["memory", "ipc", "nccl"]:
        """How new weights reach the engines: from device to device, unless the host's memory is as near.

        By CUDA IPC where each engine shares the device of a rank of the policy (packed), by NCCL between devices.
        Through the host's memory go the CPU's weights, adapters, which are small, those for more engines than ranks on
        the same devices, and those of roles that take turns, which may not be on their device when the other is.
        """
        mode, groups = self.placement.mode, self.placement.groups
        if self.device == "cpu" or self.model.adapter.shipped_alone or mode == "turns":
            return "memory"
        if mode == "separate" or (groups and not any({"policy", "rollout"} <= set(group) for group in groups)):
            return "nccl"
        return "ipc" if self.rollout.engines <= self.policy.ranks else "memory"

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates in one step of the loop; 1 is strictly on-policy."""
        return self.rl.minibatches_per_step * self.rl.epochs_per_step
