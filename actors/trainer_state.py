"""What training goes on from, as safetensors: the same files whatever the ZeRO stage, loaded on any number of ranks.

    capture()   a copy in memory: each rank keeps every world_size-th trained tensor whole, with its optimizer's moments
    write()     that copy to disk, or any place that fsspec knows, while the training goes on
    restore()   every rank reads all files and takes what it holds

    trainer.json                     updates so far, the schedule
    rank_00003_00002.safetensors     weight/NAME, exp_avg/NAME, exp_avg_sq/NAME in float32; random/3

Frozen tensors are not written: they are those of the model that the run starts from. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import fsspec
import torch
from fsspec.implementations.local import LocalFileSystem
from safetensors.torch import load, save
from torch import nn

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of each tensor."""
KINDS = ("weight", *MOMENTS)
FILE_BYTES = 2**30
"""A file ends with the tensor that brings it to this size."""
RECORD = "trainer.json"

Captured = tuple[dict[str, Any], dict[str, torch.Tensor]]
"""What `RECORD` says, and a rank's share of the tensors."""


class TrainerState:
    """The trained tensors of one rank's DeepSpeed engine and their AdamW."""

    def __init__(self, engine: Any, *, rank: int, world_size: int) -> None:
        self.engine = engine
        self.rank = rank
        self.world_size = world_size
        self._parameters = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
        self._optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
        self._masters = self._whole_masters()
        self._make_moments()

    def capture(self) -> Captured:
        """A copy of this rank's share, in memory. A collective: run it on all ranks."""
        share = {f"random/{self.rank}": torch.get_rng_state()}
        for index, (name, parameter) in enumerate(self._parameters.items()):
            for kind in KINDS:
                value = self._get(name, parameter, kind)
                if index % self.world_size == self.rank:
                    share[f"{kind}/{name}"] = value.detach().to("cpu", torch.float32, copy=True).contiguous()
        steps = max(int(state["step"]) for state in self._optimizer.state.values())
        return {"optimizer_steps": steps, "schedule": self.engine.lr_scheduler.state_dict()}, share

    def write(self, captured: Captured, folder: str) -> None:
        """Write a captured share, flushed to disk; the record by rank 0. No collective."""
        record, share = captured
        for number, part in enumerate(_parts(share)):
            _write(f"{folder}/rank_{self.rank:05d}_{number:05d}.safetensors", save(part))
        if self.rank == 0:
            _write(f"{folder}/{RECORD}", json.dumps(record).encode())

    def restore(self, folder: str) -> None:
        """Go on from what any number of ranks wrote. A collective: run it on all ranks.

        Raises:
            RuntimeError: there is no such state, or it is that of other tensors.
        """
        files, root = fsspec.core.url_to_fs(folder)
        if not files.exists(f"{root}/{RECORD}"):
            raise RuntimeError(f"{folder}: holds no trainer's state")
        record = json.loads(files.cat_file(f"{root}/{RECORD}"))
        left = {f"{kind}/{name}" for name in self._parameters for kind in KINDS}
        for path in sorted(files.glob(f"{root}/rank_*.safetensors")):
            for key, value in sorted(load(files.cat_file(path)).items()):
                kind, _, name = key.partition("/")
                if kind == "random":
                    if name == str(self.rank):
                        torch.set_rng_state(value)
                    continue
                if key not in left:
                    raise RuntimeError(f"{path}: {key} is not a tensor of this model, or was there before")
                left.remove(key)
                self._set(name, self._parameters[name], kind, value)
        if left:
            raise RuntimeError(f"{folder}: {len(left)} tensors are missing, e.g. {min(left)}")
        for state in self._optimizer.state.values():
            state["step"].fill_(record["optimizer_steps"])
        self.engine.lr_scheduler.load_state_dict(record["schedule"])
        for group, rate in zip(self._optimizer.param_groups, record["schedule"]["_last_lr"], strict=True):
            group["lr"] = rate

    def _whole_masters(self) -> dict[str, torch.Tensor]:
        """With ZeRO stage 0, where each rank has everything: what the optimizer steps, by name."""
        if self.engine.zero_optimization() or hasattr(next(iter(self._parameters.values())), "_hp_mapping"):
            return {}
        ordered = sorted(self._parameters.items(), key=lambda item: item[1].dim() <= 1)  # as make_optimizer groups them
        held = [tensor for group in self._optimizer.param_groups for tensor in group["params"]]
        return {name: tensor for (name, _), tensor in zip(ordered, held, strict=True)}

    def _get(self, name: str, parameter: nn.Parameter, kind: str) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self._masters:
            master = self._masters[name]
            return master if kind == "weight" else self._optimizer.state[master][kind]
        if kind == "weight":
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, kind)

    def _set(self, name: str, parameter: nn.Parameter, kind: str, value: torch.Tensor) -> None:
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        value = value.to(self.engine.device)
        if kind != "weight":
            if self._masters:
                self._optimizer.state[self._masters[name]][kind].copy_(value)
            else:
                safe_set_full_optimizer_state(parameter, value, kind)
            return
        if self._masters:
            self._masters[name].data.copy_(value)
        else:
            safe_set_full_fp32_param(parameter, value)
        with GatheredParameters([parameter], modifier_rank=0, enabled=hasattr(parameter, "ds_id")):
            parameter.data.copy_(value)  # what the forward pass reads, in its own precision

    def _make_moments(self) -> None:
        """What AdamW would make at its first step.

        DeepSpeed links moments to parameters right after the first group's first step, when the others have none yet.
        """
        flat = getattr(self.engine.optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO-3 steps these, one by one
        for tensor in flat or [tensor for group in self._optimizer.param_groups for tensor in group["params"]]:
            moments = {moment: torch.zeros_like(tensor) for moment in MOMENTS}
            self._optimizer.state[tensor] = {"step": torch.tensor(0.0), **moments}
        link = getattr(self.engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:
            link()


def _parts(share: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """The share in pieces of about `FILE_BYTES`."""
    part: dict[str, torch.Tensor] = {}
    for name, tensor in share.items():
        part[name] = tensor
        if _bytes(part.values()) >= FILE_BYTES:
            yield part
            part = {}
    if part:
        yield part


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _write(location: str, content: bytes) -> None:
    files, path = fsspec.core.url_to_fs(location)
    files.makedirs(path.rpartition("/")[0], exist_ok=True)
    with files.open(path, "wb") as file:
        file.write(content)
        if isinstance(files, LocalFileSystem):
            file.flush()
            os.fsync(file.fileno())
