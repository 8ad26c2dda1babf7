"""What every trained model shares: a DeepSpeed engine stepped over ragged, token-budgeted micro-batches.

A loss is divided by *global* counts (all micro-batches, all ranks), so the result depends on neither split. DeepSpeed
averages gradients over ranks; the factor `world_size` on each loss undoes that.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from actors.adapters import AdaptedModel
from actors.process import RankInfo, join_process_group, offloads, seed_everything
from actors.trainer_state import TrainerState
from engine.config import Config, OptimizerConfig


def deepspeed_config(config: Config) -> dict[str, Any]:
    """DeepSpeed's own configuration. Micro-batches are ours: one `step` call is one optimizer update."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0 if clips_itself(config) else config.optimizer.max_grad_norm,
        "bf16": {"enabled": config.dtype == "bfloat16", "check_grad_overflow": True},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": config.policy.zero_stage, "overlap_comm": config.device == "cuda"},
        "steps_per_print": 2**31,
    }


def clips_itself(config: Config) -> bool:
    """Whether the trainer clips: at stage 0 in float32 DeepSpeed would neither tell the norm nor look at it."""
    return config.policy.zero_stage == 0 and config.dtype == "float32"


def make_optimizer(parameters: Sequence[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW in one pass over memory; matrices decay, vectors (norms, biases) do not.

    Their order is that of `TrainerState`.
    """
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    held = [group for group in groups if group["params"]]
    return torch.optim.AdamW(held, lr=config.learning_rate, betas=config.betas, fused=True)


def learning_rate_factor(update: int, *, config: OptimizerConfig, updates: int) -> float:
    """Share of the peak learning rate for an update, counted from 0; none is 0, so no update is spent on nothing."""
    warmup = config.warmup_updates
    if update < warmup:
        return (update + 1) / (warmup + 1)
    if config.schedule == "constant":
        return 1.0
    left = max(0.0, 1 - (update - warmup) / max(1, updates - warmup))
    return left if config.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left))


@dataclass(frozen=True)
class Trainable:
    """What a trainer trains."""

    model: PreTrainedModel
    """The Hugging Face model."""
    adapter: AdaptedModel | None
    """Its adapter, if only that is trained."""
    module: nn.Module
    """What the engine runs: a module around the model, without parameters of its own."""


class Trainer:
    """One rank of a DeepSpeed engine around a `Trainable`."""

    def __init__(self, config: Config, info: RankInfo, make: Callable[[], Trainable], updates: int) -> None:
        """`make` is called once everything is seeded; `updates` is the run's total."""
        self.config = config
        self.info = info
        self.device = join_process_group(info, device=config.device, timeout_s=config.timeouts.update)
        import deepspeed  # after the process group, whose environment it reads

        if config.device == "cpu":
            # Its shared-memory collectives are compiled at first use, for a minute and a half; gloo needs no compiler.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._gather = deepspeed.zero.GatheredParameters if config.policy.zero_stage == 3 else None
        seed_everything(config.seed)
        trainable = make()
        self.model, self.adapter = trainable.model, trainable.adapter
        if config.model.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self._trained = [parameter for parameter in trainable.module.parameters() if parameter.requires_grad]
        optimizer = make_optimizer(self._trained, config.optimizer)
        scheduler = LambdaLR(optimizer, partial(learning_rate_factor, config=config.optimizer, updates=updates))
        self.engine, *_ = deepspeed.initialize(
            model=trainable.module,
            optimizer=optimizer,
            lr_scheduler=scheduler,
            config=deepspeed_config(config),
            dist_init_required=False,
        )
        if info.world_size == 1 and config.policy.zero_stage == 0:
            self.engine.enable_backward_allreduce = False  # which would copy all gradients twice
        self.state = TrainerState(self.engine, rank=info.rank, world_size=info.world_size)

    def update(self, losses: Sequence[Callable[[], torch.Tensor]]) -> dict[str, float] | None:
        """One optimizer update. Each element runs one micro-batch's forward pass and returns its share of the loss.

        Returns the global `loss` and `grad_norm` and the `learning_rate` used; None, on all ranks, when the loss or the
        gradient was not finite: weights, optimizer and schedule are then as they were.
        """
        self.engine.train()
        total = torch.zeros((), dtype=torch.float64)
        for index, micro_loss in enumerate(losses):
            self.engine.set_gradient_accumulation_boundary(index == len(losses) - 1)
            loss = micro_loss()
            total += loss.detach().double().cpu()
            # A loss that is not finite may yet have finite gradients: NaN goes to all of them, so that none is used.
            self.engine.backward(loss * (self.info.world_size if torch.isfinite(loss) else math.nan))
        total = self.all_reduce(total)
        learning_rate = self.engine.get_lr()[0]
        grad_norm = self._step()
        if not math.isfinite(grad_norm):
            return None
        return {"loss": float(total), "grad_norm": grad_norm, "learning_rate": learning_rate}

    def _step(self) -> float:
        """Step unless the norm of the gradient is not finite; returns it."""
        if not clips_itself(self.config):
            self.engine.step()  # skips the step by itself, and says so with an infinite norm
            return float(self.engine.get_global_grad_norm())
        gradients = []
        for parameter in self._trained:  # what had no part in the loss is decayed all the same, as on several ranks
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        norm = nn.utils.get_total_norm(gradients)
        if math.isfinite(norm):
            nn.utils.clip_grads_with_norm_(self._trained, self.config.optimizer.max_grad_norm, norm)
            self.engine.step()
        else:
            self.engine.zero_grad()
        return float(norm)

    def sleep(self) -> None:
        """Leave the device's memory to others until `wake`."""
        if offloads(self.config):
            self.engine.offload_states()

    def wake(self) -> None:
        """Return to the device."""
        if offloads(self.config):
            self.engine.reload_states()

    def all_reduce(self, values: torch.Tensor, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
        """The same reduction on every rank, on the host."""
        reduced = values.to(self.device)
        dist.all_reduce(reduced, op=op)
        return reduced.cpu()

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter once, whole, under its Hugging Face name, an adapter merged in.

        With ZeRO-3 a collective: run it on all ranks.
        """
        if self.adapter is not None:
            with self.gathered(list(self.model.parameters())):
                yield from self.adapter.merged_weights()
            return
        for name, parameter in self.model.named_parameters():
            with self.gathered([parameter]):
                yield name, parameter.detach()

    def adapter_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The adapter's tensors under peft's names. With ZeRO-3 a collective: run it on all ranks."""
        assert self.adapter is not None
        with self.gathered(self._trained):
            yield from self.adapter.adapter_weights()

    def gathered(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
        """A block in which these parameters are whole. With ZeRO-3 a collective: run it on all ranks."""
        return self._gather(parameters) if self._gather else nullcontext()

    def save(self, folder: Path, record: dict[str, Any] | None = None) -> None:
        """Write model and tokenizer in Hugging Face format; rank 0 writes, whole or not at all. Run it on all ranks.

        With `model.export: adapter` the folder holds the adapter alone, in peft's format. A `record` becomes
        `reward_model.json` beside the weights.
        """
        alone = self.adapter is not None and self.config.model.export == "adapter"
        weights = {name: tensor.cpu().clone() for name, tensor in ([] if alone else self.named_weights())}
        with self.gathered(list(self.model.parameters()) if alone else []):
            if self.info.rank == 0:
                self._write(folder, weights, record)
        dist.barrier()

    def _write(self, folder: Path, weights: dict[str, torch.Tensor], record: dict[str, Any] | None) -> None:
        unfinished = folder.with_name(folder.name + ".partial")
        shutil.rmtree(unfinished, ignore_errors=True)
        if weights:
            if self.model.can_generate():
                self.model.generation_config = _valid_generation_config(self.model)
            if hasattr(self.model.config, "quantization_config"):  # merged weights are not quantised any more
                del self.model.config.quantization_config
            self.model.save_pretrained(unfinished, state_dict=weights)
        else:
            assert self.adapter is not None
            self.adapter.save_adapter(unfinished)
        source = self.config.model
        tokenizer = AutoTokenizer.from_pretrained(source.path, trust_remote_code=source.trust_remote_code)
        if record is not None:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(self.model.config.pad_token_id)
        tokenizer.save_pretrained(unfinished)
        if record is not None:
            (unfinished / "reward_model.json").write_text(json.dumps(record, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)


def _valid_generation_config(model: PreTrainedModel) -> GenerationConfig:
    """The model's own, unless it contradicts itself, which transformers loads without a word and refuses to save."""
    try:
        model.generation_config.validate(strict=True)
        return model.generation_config
    except ValueError:
        return GenerationConfig.from_model_config(model.config)
