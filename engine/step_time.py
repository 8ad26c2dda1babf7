"""How long the phases of a step are expected to take: a roofline (Williams et al. 2009) for every phase.

    generate    a step of an engine reads all weights and the cache of the running samples, and computes one token each
    score       forward passes, bound by arithmetic
    update      forward and backward passes, or what ZeRO sends meanwhile if that takes longer; then the optimizer
    publish     weights from the trainer through the host's memory into every engine
    turns       where roles take turns on a GPU: what leaves its memory and returns

The rates are those of `engine.hardware` times the efficiencies below, which are what well-tuned programs reach, not
what this one was measured to reach: expect the right order and the right bottleneck, not the second digit.
Legend: T tokens per rank and micro-batch, L tokens of a sample.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from engine.config import Config
from engine.fit import cache_bytes, memories_of
from engine.footprint import GIB, Model, adapter_parameters, answering, number_bytes
from engine.hardware import Accelerator
from engine.layout import layout_of
from engine.schedule.costs import Costs

TRAINING_EFFICIENCY = {"cuda": 0.4, "cpu": 0.8}
"""Of peak arithmetic in training. Llama 3 405B reached 0.38 to 0.43 on H100 (arXiv:2407.21783, table 4); on the CPU a
model of 135 million parameters reached 0.89 of what a large product does (one thread, 512 tokens)."""
FORWARD_EFFICIENCY = {"cuda": 0.5, "cpu": 0.8}
"""Of peak arithmetic in scoring and prefill (assumed; on the CPU 0.95 in the same measurement)."""
FLOAT32_EFFICIENCY = 0.8
"""Of peak arithmetic in the output layer's float32 products (assumed)."""
BANDWIDTH_EFFICIENCY = 0.7
"""Of peak memory bandwidth in decoding and in the optimizer (assumed)."""
LINK_EFFICIENCY = 0.7
"""Of the links between devices and nodes (assumed)."""
ENGINE_STEP_S = 0.003
"""Of an engine's step that no device works in: scheduling, sampling, Python (assumed)."""
HOST_MEMORY_RATE = 10e9
"""Bytes/s of one pass over a host's memory by one process (assumed; measured on the CPU)."""
OPTIMIZER_BYTES = 30
"""Memory traffic of AdamW for each parameter: gradient 4, weights and moments read and written 24, new weight 2."""


@dataclass(frozen=True)
class Workload:
    """What a step is made of. Lengths are means, in tokens."""

    prompt: float
    """Before the trained part of a sample."""
    response: float
    """The trained (or generated) part."""
    samples: int
    """Of one step: responses, or sequences of one update."""
    prompts: int
    """Distinct ones among them."""
    steps: int | None
    """Of the stage; None where the rows are not known."""

    @property
    def sample(self) -> float:
        """L: tokens of a whole sample."""
        return self.prompt + self.response

    @property
    def tokens(self) -> float:
        """Of all samples of a step."""
        return self.samples * self.sample

    @property
    def computed(self) -> float:
        """Tokens of a pass over a step's samples: those of one prompt share it."""
        return self.prompts * self.prompt + self.samples * self.response


@dataclass(frozen=True)
class Phase:
    """A part of a step, or of what happens once before the first."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Hardware:
    """What the ranks run on."""

    trainer: Accelerator
    engine: Accelerator
    per_node: int
    """Devices of one node."""

    def between(self, ranks: int) -> float:
        """Bytes/s of a rank to the others."""
        rate = self.trainer.link if ranks <= self.per_node else self.trainer.network
        return rate * LINK_EFFICIENCY


def costs_of(config: Config, models: Mapping[str, Model], hardware: Hardware, work: Workload) -> Costs:
    """What each part of a step costs."""
    engine, size = hardware.engine, number_bytes(config.dtype)
    shape = answering(config, models).shape
    bandwidth = engine.bandwidth * BANDWIDTH_EFFICIENCY
    arithmetic = engine.flops(config.dtype) * FORWARD_EFFICIENCY[config.device]
    context = max(1, round(work.prompt + work.response / 2))
    met = shape.weights_met(running_samples(config, models, work))
    return Costs(
        decode_step_s=met * size / bandwidth + ENGINE_STEP_S,
        decode_sample_s=(shape.forward_flops(0) + shape.head_flops()) / arithmetic,
        decode_context_s=shape.cache(context) * size / context / bandwidth,
        prefill_token_s=shape.forward_flops(work.prompt / 2) / arithmetic,
        forward_token_s=forward_token_s(config, models["model.path"], hardware, work, ranks=config.policy.ranks),
        train_token_s=train_token_s(config, models["model.path"], hardware, work, ranks=config.policy.ranks),
        update_s=update_s(config, models["model.path"], hardware, ranks=config.policy.ranks),
        publish_s=_publish_s(config, models["model.path"], hardware) if config.generates else 0.0,
        reward_s=_reward_s(config, models, hardware, work),
    )


def running_samples(config: Config, models: Mapping[str, Model], work: Workload) -> int:
    """Samples that one engine decodes at once: its share of the step's, as many as settings and cache allow."""
    share = math.ceil(work.samples / config.rollout.engines)
    longest = cache_bytes(config, models)
    mean = max(1.0, longest * min(1.0, work.sample / config.rollout.max_model_len))
    return max(1, min(share, config.rollout.concurrent_samples, int(config.rollout.kv_cache_gib * GIB / mean)))


def forward_token_s(
    config: Config, model: Model, hardware: Hardware, work: Workload, *, ranks: int, scores: bool = False
) -> float:
    """A pass that keeps nothing: seconds of the whole group for each token; `scores` has no output layer."""
    device = hardware.trainer
    body = model.shape.forward_flops(work.sample / 2) / (device.flops(config.dtype) * FORWARD_EFFICIENCY[config.device])
    return (body + (0.0 if scores else _head_s(model, hardware, work))) / ranks


def train_token_s(
    config: Config, model: Model, hardware: Hardware, work: Workload, *, ranks: int, scores: bool = False
) -> float:
    """Forward and backward: seconds of the whole group for each token.

    Backward costs twice the forward pass, once where the weights are frozen; checkpointing repeats the forward pass.
    The output layer's logits are computed again in the backward pass.
    """
    adapted, repeated = config.trains_adapter, config.model.gradient_checkpointing
    passes = (2 if adapted else 3) + (1 if repeated else 0)
    arithmetic = hardware.trainer.flops(config.dtype) * TRAINING_EFFICIENCY[config.device]
    body = passes * model.shape.forward_flops(work.sample / 2) / arithmetic
    head = 0.0 if scores else _head_s(model, hardware, work) * (3 if adapted else 4)
    sent = _sent_per_microbatch(config, model, ranks, gathers=3 if repeated else 2) / hardware.between(ranks)
    microbatch = min(config.policy.tokens_per_microbatch, max(1.0, work.computed / ranks))
    return max(body + head, sent / microbatch) / ranks


def _head_s(model: Model, hardware: Hardware, work: Workload) -> float:
    """The output layer's float32 product for the trained part of a computed token."""
    trained = work.samples * work.response / work.computed
    return model.shape.head_flops() * trained / (hardware.trainer.float32_flops * FLOAT32_EFFICIENCY)


def _sent_per_microbatch(config: Config, model: Model, ranks: int, *, gathers: int) -> float:
    """Bytes that a rank sends in a micro-batch: ZeRO-3 gathers the weights, 2 and 3 reduce and scatter gradients."""
    stage, size = config.policy.zero_stage, number_bytes(config.dtype)
    share = (ranks - 1) / ranks
    weights = gathers * model.shape.parameters * size if stage == 3 else 0
    return share * (weights + (_trained(config, model) * size if stage >= 2 else 0))


def update_s(config: Config, model: Model, hardware: Hardware, *, ranks: int) -> float:
    """The optimizer on a rank's share, and what the ranks exchange once per update."""
    stage, size, trained = config.policy.zero_stage, number_bytes(config.dtype), _trained(config, model)
    own = trained / ranks if stage >= 1 else trained
    exchanges = {0: 2, 1: 2, 2: 1, 3: 0}[stage]  # all-reduce; reduce and gather; gather; all within the passes
    sent = exchanges * (ranks - 1) / ranks * trained * size
    return own * OPTIMIZER_BYTES / (hardware.trainer.bandwidth * BANDWIDTH_EFFICIENCY) + sent / hardware.between(ranks)


def _trained(config: Config, model: Model) -> int:
    if not config.trains_adapter:
        return model.shape.parameters
    return adapter_parameters(model.shape, config.model.adapter)


def _publish_s(config: Config, model: Model, hardware: Hardware) -> float:
    """Through the host's memory: rank 0 copies, packs, checksums, stores; engines read, checksum and load, all at once.

    From device to device (`Config.weight_route`): at the rate of the device's memory or of what links devices.
    """
    if config.stage != "rl" and not (config.stage == "distill" and config.distill.mode == "on_policy"):
        return 0.0
    numbers = _trained(config, model) if config.model.adapter.shipped_alone else model.shape.parameters
    size = numbers * number_bytes(config.dtype)
    devices = config.policy.ranks + config.rollout.engines
    if config.weight_route == "ipc":  # packed and loaded: read and written twice
        return 4 * size / (hardware.trainer.bandwidth * BANDWIDTH_EFFICIENCY)
    if config.weight_route == "nccl":
        return size / hardware.between(devices)
    memory = hardware.trainer.host if config.device == "cpu" else HOST_MEMORY_RATE
    travel = size / (hardware.trainer.network * LINK_EFFICIENCY) if devices > hardware.per_node else 0.0
    return size / hardware.trainer.host + 3 * size / memory + travel + size / memory + size / hardware.engine.host


def _reward_s(config: Config, models: Mapping[str, Model], hardware: Hardware, work: Workload) -> float:
    """Reward models read a group's samples; functions are taken to cost nothing."""
    tokens = work.samples / work.prompts * work.sample
    scorers = [(models[f"rewards.models.{i}.path"], source.ranks) for i, source in enumerate(config.rewards.models)]
    each = [forward_token_s(config, model, hardware, work, ranks=ranks, scores=True) for model, ranks in scorers]
    return tokens * max(each, default=0.0)


def generate_s(config: Config, models: Mapping[str, Model], costs: Costs, work: Workload) -> float:
    """All samples of a step on all engines: prompts are prefilled once, samples decoded as many at once as run."""
    running = running_samples(config, models, work)
    share = math.ceil(work.samples / config.rollout.engines)
    context = work.prompt + work.response / 2
    step = costs.decode_step_s + running * (costs.decode_sample_s + context * costs.decode_context_s)
    prompts = math.ceil(work.prompts / config.rollout.engines)
    return share / running * work.response * step + prompts * work.prompt * costs.prefill_token_s


def step_phases(
    config: Config, models: Mapping[str, Model], hardware: Hardware, costs: Costs, work: Workload
) -> list[Phase]:
    """The phases of one step, in order, under the names of the run's metrics (`time/…`)."""
    if config.stage == "rl":
        turns = _turns_s(config, models, hardware)
        return _rl_phases(config, models, hardware, costs, work) + ([Phase("turns", turns)] if turns else [])
    model = models["model.path"]
    scores = config.stage == "reward_model"
    token_s = train_token_s(config, model, hardware, work, ranks=config.policy.ranks, scores=scores)
    phases = []
    if config.stage == "distill" and config.distill.mode == "on_policy":
        share = config.distill.on_policy_fraction
        phases.append(Phase("rollout", share * generate_s(config, models, costs, work)))
        teacher = forward_token_s(config, models["distill.teacher"], hardware, work, ranks=config.policy.ranks)
        phases.append(Phase("teacher", work.computed * teacher))
    phases.append(Phase("update", work.computed * token_s + costs.update_s))
    return phases + ([Phase("publish", costs.publish_s)] if costs.publish_s else [])


def _rl_phases(
    config: Config, models: Mapping[str, Model], hardware: Hardware, costs: Costs, work: Workload
) -> list[Phase]:
    algorithm, model, tokens = config.algorithm, models["model.path"], work.computed
    phases = [Phase("rollout", generate_s(config, models, costs, work) + costs.reward_s)]
    if config.compares_with_start:
        ranks = config.policy.ranks if config.trains_adapter else config.reference.ranks
        token_s = forward_token_s(config, model, hardware, work, ranks=ranks)
        phases.append(Phase("reference", tokens * token_s))
    in_reward = algorithm.kl_coef > 0 and algorithm.kl_in == "reward"
    if in_reward or (config.updates_per_step > 1 and not algorithm.trains_pairs) or algorithm.reference == "step":
        phases.append(Phase("old_logp", tokens * costs.forward_token_s))
    trained = tokens * config.rl.epochs_per_step
    if algorithm.needs_critic:
        critic, ranks = models.get("critic.path", model), config.critic.ranks
        value_s = forward_token_s(config, critic, hardware, work, ranks=ranks, scores=True)
        token_s = train_token_s(config, critic, hardware, work, ranks=ranks, scores=True)
        updates = config.updates_per_step * update_s(config, critic, hardware, ranks=ranks)
        phases += [Phase("values", tokens * value_s), Phase("critic_update", trained * token_s + updates)]
    phases.append(Phase("update", trained * costs.train_token_s + config.updates_per_step * costs.update_s))
    return [*phases, Phase("publish", costs.publish_s)]


def _turns_s(config: Config, models: Mapping[str, Model], hardware: Hardware) -> float:
    """Everybody who shares a device leaves its memory and returns once in a step."""
    if config.placement.mode != "turns" or config.device == "cpu":
        return 0.0
    held = {found.role: found.during("always") for found in memories_of(config, models)}
    moved = max((sum(held[role] for role in roles) for roles in layout_of(config).sharing), default=0)
    return 2 * moved / hardware.trainer.host


def first_phases(
    config: Config, models: Mapping[str, Model], hardware: Hardware, costs: Costs, work: Workload
) -> list[Phase]:
    """What happens once, before the first step: a preference loss asks the reference, a teacher answers all rows."""
    rows = (work.steps or 0) * work.computed / max(1.0, config.training.epochs)
    if config.stage == "preference" and config.preference.loss not in ("orpo", "simpo"):
        return [Phase("reference", rows * costs.forward_token_s)]
    if config.stage == "distill" and config.distill.mode == "sequence":
        return [Phase("teacher's answers", (work.steps or 0) * generate_s(config, models, costs, work))]
    return []
