"""How much memory each rank of each role takes, item by item, from the configuration and the models' sizes.

    always    weights, gradients, optimizer state, caches: from start to end
    pass      what a forward and backward pass adds    } one after the other, so a rank's peak is
    step      what an optimizer update adds            } always + the larger of the two
    start     held while the role starts, before anything else

What is kept by whom under ZeRO follows Rajbhandari et al. 2020 (arXiv:1910.02054), with DeepSpeed's own buffers and
their default sizes. Pure: numbers in, numbers out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from engine.config import AdapterConfig, Config
from engine.layout import scorer_role, server_role
from engine.model_shape import ModelShape
from engine.schedule.placement import Role

GIB = 2**30
CHUNK_TOKENS = 1024
"""Tokens whose logits exist at once: the default of `engine.algorithms.logprobs.token_logprobs`."""
BUCKET_NUMBERS = 500_000_000
"""DeepSpeed's `reduce_bucket_size`."""
LIVE_NUMBERS = 1_050_000_000
"""Parameters that ZeRO-3 keeps gathered: DeepSpeed's `stage3_max_live_parameters` and `stage3_prefetch_bucket_size`."""
SUB_GROUP_NUMBERS = 1_000_000_000
"""Parameters that ZeRO-3 updates at once: DeepSpeed's `sub_group_size`."""
PROCESS_BYTES = GIB // 2
"""A process before it holds any tensor: on the host Python with torch, transformers and DeepSpeed (430 MiB, measured),
on a GPU the CUDA context and the libraries' handles (assumed)."""
ENGINE_TOKENS = {"cpu": 4096, "cuda": 8192}
"""Tokens that an engine computes in one step at most: `actors.rollout.PREFILL_TOKENS`, vLLM's default."""
WEIGHT_BUCKET_BYTES = 256 * 2**20
"""What weights travel in from device to device: `actors.weights.BUCKET_BYTES`."""
GRAPH_BYTES = GIB
"""CUDA graphs of an engine (assumed)."""
FOUR_BIT_BYTES = (4 + 0.127) / 8
"""Bytes of a number in 4-bit NormalFloat and of its share of the scales (arXiv:2305.14314, section 3)."""

When = Literal["always", "pass", "step", "start"]


@dataclass(frozen=True)
class Item:
    """One use of memory."""

    name: str
    bytes: int
    when: When = "always"


@dataclass(frozen=True)
class Model:
    """A model's sizes, and what its backward pass keeps."""

    shape: ModelShape
    saved_per_token: int
    """Bytes, over all layers, without gradient checkpointing."""


@dataclass(frozen=True)
class RoleMemory:
    """What one rank of a role takes."""

    role: str
    ranks: int
    on_device: bool
    items: tuple[Item, ...]

    def during(self, when: When) -> int:
        """Bytes of the items of one time."""
        return sum(item.bytes for item in self.items if item.when == when)

    @property
    def peak(self) -> int:
        """Most bytes at any time after the start."""
        return self.during("always") + max(self.during("pass"), self.during("step"))

    @property
    def start(self) -> int:
        """Bytes while it starts."""
        return self.during("start")


def memory_of(config: Config, role: Role, models: Mapping[str, Model]) -> RoleMemory:
    """What a rank of a role takes. `models` are those of `config.model_paths`, by key; `model.path` is always there."""
    items = [Item("process", PROCESS_BYTES), *_items(config, role.name, models)]
    return RoleMemory(role.name, role.ranks, role.on_device, tuple(item for item in items if item.bytes > 0))


def _items(config: Config, role: str, models: Mapping[str, Model]) -> list[Item]:
    """By the role's name, as `engine.layout.roles_of` gives it."""
    model = models["model.path"]
    scorers = {scorer_role(s): models[f"rewards.models.{i}.path"] for i, s in enumerate(config.rewards.models)}
    servers = {server_role(s): (s, models[f"rewards.servers.{i}.path"]) for i, s in enumerate(config.rewards.servers)}
    match role:
        case "policy":
            trained = _trained(config, model, config.policy.ranks, scores=False)
            return [*trained, *_teacher(config, models), *_published(config, model), *_in_transit(config, model)]
        case "reward_model":
            return _trained(config, model, config.policy.ranks, scores=True)
        case "critic":
            return _trained(config, models.get("critic.path", model), config.critic.ranks, scores=True)
        case "reference":
            return _frozen(config, model, scores=False)
        case "rollout":
            held = answering(config, models)
            return [*_engine(config, held, config.rollout.kv_cache_gib, config.dtype), *_in_transit(config, held)]
        case _ if role in scorers:
            return _frozen(config, scorers[role], scores=True)
        case _ if role in servers:
            server, judge = servers[role]
            dtype = "float32" if config.device == "cpu" else "bfloat16"
            return _engine(config, judge, server.kv_cache_gib, dtype)
        case _:
            return []


def _published(config: Config, model: Model) -> list[Item]:
    """The buckets of the host's memory that the engines read: counted where the host is the device."""
    if config.device == "cuda" or not config.generates:
        return []
    adapter = config.model.adapter
    numbers = adapter_parameters(model.shape, adapter) if adapter.shipped_alone else model.shape.parameters
    return [Item("weights for the engines", numbers * number_bytes(config.dtype), "always")]


def _in_transit(config: Config, model: Model) -> list[Item]:
    """Buckets on the device of either side, while weights go from device to device.

    A bucket of NCCL's is full once it exceeds its size, and there are two; by IPC there is one, which holds any tensor.
    """
    largest = model.shape.vocabulary * model.shape.hidden * number_bytes(config.dtype)
    match config.weight_route if config.generates else "memory":
        case "nccl":
            return [Item("weights on their way", 2 * (WEIGHT_BUCKET_BYTES + largest), "step")]
        case "ipc":
            return [Item("weights on their way", max(WEIGHT_BUCKET_BYTES, largest), "step")]
        case _:
            return []


def answering(config: Config, models: Mapping[str, Model]) -> Model:
    """The model that the engines hold."""
    teacher = config.stage == "distill" and config.distill.mode == "sequence"
    return models["distill.teacher" if teacher else "model.path"]


def number_bytes(dtype: str) -> int:
    """Bytes of one number."""
    return 2 if dtype == "bfloat16" else 4


def _trained(config: Config, model: Model, ranks: int, *, scores: bool) -> list[Item]:
    """A model under DeepSpeed; `scores` is one with a head for scores in place of the output layer."""
    shape, size = model.shape, number_bytes(config.dtype)
    total = shape.body + shape.hidden if scores else shape.parameters
    adapter = config.model.adapter
    added = adapter_parameters(shape, adapter)
    frozen_bytes = 0
    if config.trains_adapter:
        small = sum(linear.inputs * linear.outputs for linear in shape.linears) if adapter.four_bit else 0
        frozen_bytes = round((total - small) * size + small * FOUR_BIT_BYTES)
    return [
        *zero_items(
            trained=added if config.trains_adapter else total,
            frozen_bytes=frozen_bytes,
            size=size,
            stage=config.policy.zero_stage,
            ranks=ranks,
            gpu=config.device == "cuda",
        ),
        *_activations(config, model),
        *([] if scores else _head(config, shape, grad=not config.trains_adapter)),
    ]


def zero_items(*, trained: int, frozen_bytes: int, size: int, stage: int, ranks: int, gpu: bool) -> list[Item]:
    """What DeepSpeed keeps of a model on one of `ranks` ranks.

    Args:
        trained: parameters that are trained.
        frozen_bytes: of the others.
        size: bytes of a number of weights and gradients: 2 is bfloat16, which has float32 master weights.
        stage: of ZeRO: 1 divides the optimizer's state over the ranks, 2 the gradients too, 3 the weights too.
        ranks: data-parallel ranks.
        gpu: buffers are whole there; on the CPU only what is written to counts, and one is used.
    """
    weights = trained * size + frozen_bytes
    shard = -(-trained // ranks) if stage >= 1 else trained
    master = 4 * shard if size == 2 or stage >= 1 else 0
    at_once = min(shard, SUB_GROUP_NUMBERS) if stage == 3 else shard
    buckets = (2 if stage < 3 else 1) * BUCKET_NUMBERS if gpu else min(trained, BUCKET_NUMBERS)
    return [
        Item("weights", -(-weights // ranks) if stage == 3 else weights),
        Item("gradients", trained * size if stage < 2 else -(-trained // ranks) * size),
        Item("float32 master weights", master),
        Item("optimizer moments", 8 * shard),
        Item("reduction buckets", buckets * size if stage >= 1 and trained and (ranks > 1 or gpu) else 0),
        Item("gathered weights", min(weights, LIVE_NUMBERS * size) if stage == 3 and ranks > 1 else 0, "pass"),
        Item("update in float32", (4 * at_once if master else 0) + (4 * at_once if gpu else 0), "step"),
        Item("whole weights, before they are divided", weights if stage == 3 else 0, "start"),
    ]


def _activations(config: Config, model: Model) -> list[Item]:
    """What the passes of one micro-batch keep for its backward pass."""
    tokens, shape = config.policy.tokens_per_microbatch, model.shape
    kept = model.saved_per_token * tokens
    if not config.model.gradient_checkpointing:
        return [Item("activations", kept, "pass")]
    return [
        Item("inputs of the layers", shape.depth * shape.hidden * number_bytes(config.dtype) * tokens, "pass"),
        Item("activations of one layer", -(-kept // shape.depth), "pass"),
    ]


def _head(config: Config, shape: ModelShape, *, grad: bool) -> list[Item]:
    """The chunked log-probs: a chunk of float32 logits, on a GPU another of what becomes of them, float32 weights, and
    with `grad` their gradient, which is cast to the weights' type at the end."""
    size, tokens = number_bytes(config.dtype), config.policy.tokens_per_microbatch
    chunk = (2 if config.device == "cuda" else 1) * min(CHUNK_TOKENS, tokens) * shape.vocabulary * 4
    weight = shape.head * (0 if size == 4 else 4)
    gradient = shape.head * (4 if size == 4 else 4 + size) if grad else 0
    hidden = tokens * shape.hidden * size
    return [Item("log-probs", chunk + weight + gradient + hidden, "pass")]


def _teacher(config: Config, models: Mapping[str, Model]) -> list[Item]:
    """A teacher sits beside the student on every rank, whole, and its logits beside the student's."""
    if config.stage != "distill" or config.distill.mode != "on_policy":
        return []
    shape = models["distill.teacher"].shape
    logits = _head(config, shape, grad=False)[0]
    weights = shape.parameters * number_bytes(config.dtype)
    return [Item("teacher's weights", weights), Item("teacher's logits", logits.bytes, "pass")]


def _frozen(config: Config, model: Model, *, scores: bool) -> list[Item]:
    """A model that is only asked: its weights whole, and one layer's results at a time."""
    shape, size, tokens = model.shape, number_bytes(config.dtype), config.policy.tokens_per_microbatch
    return [
        Item("weights", (shape.body if scores else shape.parameters) * size),
        Item("results of one layer", -(-model.saved_per_token * tokens // shape.depth), "pass"),
        *([] if scores else _head(config, shape, grad=False)),
    ]


def _engine(config: Config, model: Model, kv_cache_gib: float, dtype: str) -> list[Item]:
    """A vLLM engine: logits of all running samples in float32, the processed ones, and their log-probs."""
    shape = model.shape
    tokens = max(ENGINE_TOKENS[config.device], config.rollout.max_model_len if config.device == "cpu" else 0)
    return [
        Item("weights", shape.parameters * number_bytes(dtype)),
        Item("key-value cache", int(kv_cache_gib * GIB)),
        Item("results of one layer", -(-model.saved_per_token * tokens // shape.depth)),
        Item("logits", 3 * config.rollout.concurrent_samples * shape.vocabulary * 4),
        Item("CUDA graphs", GRAPH_BYTES if config.device == "cuda" else 0),
    ]


def adapter_parameters(shape: ModelShape, adapter: AdapterConfig) -> int:
    """Parameters that an adapter adds, and that alone are trained."""
    linears: Sequence[tuple[int, int]] = [
        (linear.inputs, linear.outputs)
        for linear in shape.linears
        if not adapter.targets or any(f".{linear.name}".endswith(f".{target}") for target in adapter.targets)
    ]
    match adapter.kind:
        case "lora":
            return sum(adapter.rank * (i + o) + (o if adapter.dora else 0) for i, o in linears)
        case "ia3":
            return sum(o for _, o in linears)
        case "bottleneck":
            return shape.depth * (2 * shape.hidden * adapter.rank + adapter.rank + shape.hidden)
        case "prompt":
            return adapter.virtual_tokens * shape.hidden
        case "prefix":
            return adapter.virtual_tokens * shape.cache_per_token
        case _:
            return 0
