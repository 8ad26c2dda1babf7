"""LoRA adapters in a running vLLM engine: started with room for one, which each published version replaces in memory.

The frozen weights are never sent. vLLM knows LoRA and rsLoRA; adapters of any other kind are merged by the trainer and
travel as whole weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from engine.config import Config, UserError

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.worker.worker_base import WorkerBase

ENGINE_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes for its largest rank."""

ADAPTER_NAME, ADAPTER_ID = "policy", 1


def engine_lora_arguments(config: Config) -> dict[str, Any]:
    """Engine arguments that make room for the configured LoRA adapter.

    Raises:
        UserError: the rank is larger than vLLM can take.
    """
    rank = config.model.adapter.rank
    if rank > ENGINE_RANKS[-1]:
        raise UserError(f"model.adapter.rank: vLLM takes at most {ENGINE_RANKS[-1]}, not {rank}; lower it")
    return {
        "enable_lora": True,
        "max_lora_rank": next(allowed for allowed in ENGINE_RANKS if allowed >= rank),
        "max_loras": 1,
        "max_cpu_loras": 1,
    }


def load_adapter(
    engine: LLMEngine, tensors: Mapping[str, torch.Tensor], adapter_config: Mapping[str, Any], *, version: int
) -> LoRARequest:
    """Load an adapter, in place of the one before if there is one, and return what requests name it by.

    `tensors` have peft's names and are only read; `adapter_config` is what adapter_config.json holds. Call it between
    two engine steps. Cached keys and values of other versions are not used by later requests; what running requests
    have cached is the caller's to reset.

    Raises:
        ValueError: vLLM cannot run such an adapter. The one before stays.
        RuntimeError: the adapter has a layer that the engine's model has not. The one before stays.
    """
    from vllm.lora.request import LoRARequest

    engine.collective_rpc(partial(_replace_adapter, tensors=dict(tensors), adapter_config=dict(adapter_config)))
    # The path is part of the prefix cache's keys, and is never opened.
    return LoRARequest(ADAPTER_NAME, ADAPTER_ID, lora_path=f"memory:version-{version}")


def _replace_adapter(worker: WorkerBase, tensors: dict[str, torch.Tensor], adapter_config: dict[str, Any]) -> None:
    """In each worker: what vLLM's WorkerLoRAManager does to load from a folder, but from memory."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    runner: Any = worker.model_runner
    loader = runner.lora_manager
    manager = loader._adapter_manager
    described = PEFTHelper.from_dict(adapter_config)
    described.validate_legal(loader.lora_config)
    mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
    lora = LoRAModel.from_lora_tensors(
        lora_model_id=ADAPTER_ID,
        # vLLM multiplies a factor by the scale in place: never the publisher's own.
        tensors={name: tensor.clone() for name, tensor in tensors.items()},
        peft_helper=described,
        device="cpu",
        dtype=loader.lora_config.lora_dtype,
        model_vocab_size=loader.vocab_size,
        weights_mapper=mapper.get_rename_mapper() if mapper is not None else None,
        skip_prefixes=getattr(manager.model, "lora_skip_prefixes", None),
    )
    known = {*manager.modules, *(part for parts in manager.packed_modules.values() for part in parts)}
    unknown = set(lora.loras) - known
    if unknown:
        raise RuntimeError(f"{len(unknown)} layers of the adapter are not in the engine's model, e.g. {min(unknown)}")
    manager.remove_adapter(ADAPTER_ID)
    manager.add_adapter(lora)
    manager.activate_adapter(ADAPTER_ID)
