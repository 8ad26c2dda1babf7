"""What every trained model shares: a DeepSpeed engine stepped over ragged, token-budgeted micro-batches.

A loss is divided by *global* counts (all micro-batches, all ranks), so the result depends on neither split. DeepSpeed
averages gradients over ranks; the factor `world_size` on each loss undoes that.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from actors.process import RankInfo, join_process_group, seed_everything
from engine.config import Config, OptimizerConfig


def deepspeed_config(config: Config) -> dict[str, Any]:
    """DeepSpeed's own configuration. Micro-batches are ours: one `step` call is one optimizer update."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimizer.max_grad_norm,
        "bf16": {"enabled": config.dtype == "bfloat16"},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": config.policy.zero_stage, "overlap_comm": config.device == "cuda"},
        "steps_per_print": 2**31,
    }


def make_optimizer(parameters: Sequence[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW; matrices decay, vectors (norms, biases) do not."""
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate, betas=config.betas)


def learning_rate_factor(update: int, *, config: OptimizerConfig, updates: int) -> float:
    """Share of the peak learning rate for an update, counted from 0; none is 0, so no update is spent on nothing."""
    warmup = config.warmup_updates
    if update < warmup:
        return (update + 1) / (warmup + 1)
    if config.schedule == "constant":
        return 1.0
    left = max(0.0, 1 - (update - warmup) / max(1, updates - warmup))
    return left if config.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left))


class NonFiniteError(RuntimeError):
    """A loss or a gradient is NaN or infinite. The update was not published and nothing was saved."""


class Trainer:
    """One rank of a DeepSpeed engine around a module whose parameters are those of `model`."""

    def __init__(
        self, config: Config, info: RankInfo, make_module: Callable[[], tuple[PreTrainedModel, nn.Module]], updates: int
    ) -> None:
        """`make_module` returns the Hugging Face model and the module around it; `updates` is the run's total."""
        self.config = config
        self.info = info
        self.device = join_process_group(info, device=config.device, timeout_s=config.timeouts.update)
        import deepspeed  # after the process group, whose environment it reads

        if config.device == "cpu":
            # Its shared-memory collectives are compiled at first use, for a minute and a half; gloo needs no compiler.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._gather = deepspeed.zero.GatheredParameters if config.policy.zero_stage == 3 else None
        seed_everything(config.seed)
        self.model, module = make_module()
        if config.model.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = make_optimizer(list(module.parameters()), config.optimizer)
        scheduler = LambdaLR(optimizer, partial(learning_rate_factor, config=config.optimizer, updates=updates))
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            lr_scheduler=scheduler,
            config=deepspeed_config(config),
            dist_init_required=False,
        )

    def update(self, losses: Sequence[Callable[[], torch.Tensor]]) -> dict[str, float]:
        """One optimizer update. Each element runs one micro-batch's forward pass and returns its share of the loss.

        Returns the global `loss` and `grad_norm` and the `learning_rate` used.

        Raises:
            NonFiniteError: the loss or the gradient norm is not finite.
        """
        self.engine.train()
        total = torch.zeros((), dtype=torch.float64)
        for index, micro_loss in enumerate(losses):
            self.engine.set_gradient_accumulation_boundary(index == len(losses) - 1)
            loss = micro_loss()
            total += loss.detach().double().cpu()
            self.engine.backward(loss * self.info.world_size)
        total = self.all_reduce(total)
        if not math.isfinite(total):
            raise NonFiniteError(f"the loss is {float(total)}; lower optimizer.learning_rate or inspect the rewards")
        learning_rate = self.engine.get_lr()[0]
        grad_norm = self._step()
        return {"loss": float(total), "grad_norm": grad_norm, "learning_rate": learning_rate}

    def _step(self) -> float:
        if self.config.policy.zero_stage == 0 and not self.engine.bfloat16_enabled():
            # Stage 0 in float32 clips inside the engine without telling the norm.
            gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            self.engine.step()
        else:
            self.engine.step()
            norm = self.engine.get_global_grad_norm()
        if not math.isfinite(norm):
            raise NonFiniteError(f"the gradient norm is {float(norm)}; lower optimizer.learning_rate")
        return float(norm)

    def all_reduce(self, values: torch.Tensor, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
        """The same reduction on every rank, on the host."""
        reduced = values.to(self.device)
        dist.all_reduce(reduced, op=op)
        return reduced.cpu()

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter once, whole, under its Hugging Face name. With ZeRO-3 a collective: run it on all ranks."""
        for name, parameter in self.model.named_parameters():
            with self._gather([parameter]) if self._gather else nullcontext():
                yield name, parameter.detach()

    def save(self, folder: Path) -> None:
        """Write model and tokenizer in Hugging Face format; rank 0 writes, whole or not at all. Run it on all ranks."""
        if self.info.rank == 0:
            weights = {name: tensor.cpu().clone() for name, tensor in self.named_weights()}
            unfinished = folder.with_name(folder.name + ".partial")
            shutil.rmtree(unfinished, ignore_errors=True)
            self.model.generation_config = _valid_generation_config(self.model)
            self.model.save_pretrained(unfinished, state_dict=weights)
            AutoTokenizer.from_pretrained(
                self.config.model.path, trust_remote_code=self.config.model.trust_remote_code
            ).save_pretrained(unfinished)
            shutil.rmtree(folder, ignore_errors=True)
            unfinished.rename(folder)
        elif self._gather:
            for _ in self.named_weights():
                pass


def _valid_generation_config(model: PreTrainedModel) -> GenerationConfig:
    """The model's own, unless it contradicts itself, which transformers loads without a word and refuses to save."""
    try:
        model.generation_config.validate(strict=True)
        return model.generation_config
    except ValueError:
        return GenerationConfig.from_model_config(model.config)
