"""vLLM's NCCL weight transfer over gloo: the same steps and buckets, between processes without a GPU.

Importing this module makes `gloo` known to vLLM's factories.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from math import prod
from typing import Any, ClassVar, Self

import ray
import torch
import torch.distributed as dist
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo, worker_init_payload
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLTrainerInitInfo,
    NCCLTrainerWeightTransferEngine,
    NCCLWeightTransferEngine,
    NCCLWeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.packed_tensor import pack_tensors, unpack_tensor

TIMEOUT = timedelta(minutes=5)


class GlooGroup:
    """What vLLM uses of its NCCL communicator. The process's own process group is not touched."""

    def __init__(self, address: str, port: int, rank: int, world_size: int) -> None:
        """Waits for all others."""
        store = dist.TCPStore(address, port, world_size, rank == 0, TIMEOUT, wait_for_workers=False)
        self._store: Any = dist.PrefixStore("weights", store)  # the group does not keep it alive
        kind: Any = dist.ProcessGroupGloo
        options = kind._Options()
        options._timeout = TIMEOUT
        options._devices = [kind.create_device(hostname=ray.util.get_node_ip_address())]
        self._group: Any = kind(self._store, rank, world_size, options)

    def broadcast(self, tensor: torch.Tensor) -> None:
        """From rank 0 to all."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        self._group.broadcast([tensor], options).wait()

    def destroy(self) -> None:
        """Leave."""
        self._group = self._store = None


class GlooWeightTransferEngine(NCCLWeightTransferEngine):
    """The receiving side, in an engine's worker. The CPU's weights are loaded in place."""

    def init_transfer_engine(self, init_info: NCCLWeightTransferInitInfo) -> None:
        """Join the group."""
        assert init_info.master_address is not None
        assert init_info.master_port is not None
        self.packed_buffer_size_bytes = init_info.packed_buffer_size_bytes
        rank = init_info.rank_offset + self.parallel_config.rank
        self.model_update_group: Any = GlooGroup(
            init_info.master_address, init_info.master_port, rank, init_info.world_size
        )

    def start_weight_update(self) -> None:
        """Nothing is prepared."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive all buckets and load each."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        """Receive all buckets and load each."""
        for names, shapes, dtypes in _buckets(update_info, self.packed_buffer_size_bytes):
            sizes = [prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]
            bucket = torch.empty(sum(sizes), dtype=torch.uint8)
            self.model_update_group.broadcast(bucket)
            model: Any = self.model
            model.load_weights(unpack_tensor(bucket, names, shapes, dtypes, sizes))

    def finish_weight_update(self) -> None:
        """Nothing is left to do."""


def _buckets(
    info: NCCLWeightTransferUpdateInfo, bucket_bytes: int
) -> Iterator[tuple[list[str], list[list[int]], list[torch.dtype]]]:
    """What each bucket holds, by the rule of `pack_tensors`: one is full once it exceeds its size."""
    names, shapes, dtypes, size = list[str](), list[list[int]](), list[torch.dtype](), 0
    for name, shape, type_name in zip(info.names, info.shapes, info.dtype_names, strict=True):
        dtype: torch.dtype = getattr(torch, type_name)
        names, shapes, dtypes = [*names, name], [*shapes, shape], [*dtypes, dtype]
        size += prod(shape) * dtype.itemsize
        if size > bucket_bytes:
            yield names, shapes, dtypes
            names, shapes, dtypes, size = [], [], [], 0
    if names:
        yield names, shapes, dtypes


@dataclass
class GlooTrainerInitInfo(NCCLTrainerInitInfo):
    """As NCCL's."""

    backend: ClassVar[str] = "gloo"


class GlooTrainerWeightTransferEngine(NCCLTrainerWeightTransferEngine):
    """The sending side, on every rank of the policy."""

    init_info_cls = GlooTrainerInitInfo

    @classmethod
    def trainer_init(cls, init_info: NCCLTrainerInitInfo, *, client: Any, source: Any = None) -> Self:
        """Rank 0 and the engines join one group."""
        sender = cls(
            client=client,
            source=source,
            is_sender=init_info.is_sender,
            packed_buffer_size_bytes=init_info.packed_buffer_size_bytes,
        )
        if sender.is_sender:
            theirs = NCCLWeightTransferInitInfo(
                master_address=init_info.master_address,
                master_port=init_info.master_port,
                rank_offset=1,
                world_size=init_info.world_size,
                packed=True,
                packed_buffer_size_bytes=init_info.packed_buffer_size_bytes,
            )
            with ThreadPoolExecutor(1) as beside:
                joined = beside.submit(client.init_weight_transfer_engine, worker_init_payload(theirs))
                group: Any = GlooGroup(init_info.master_address, init_info.master_port, 0, init_info.world_size)
                sender.model_update_group = group
                joined.result()
        return sender

    def _broadcast(self, source: Any, meta: Any) -> None:
        if not self.is_sender:
            for _ in source:
                pass
            return
        group: Any = self.model_update_group
        pairs = self._checked_iter(source, meta)
        while bucket := pack_tensors(pairs, lambda pair: pair[1], self.packed_buffer_size_bytes):
            group.broadcast(bucket.packed_tensor)


WeightTransferEngineFactory.register_engine("gloo", GlooWeightTransferEngine)
WeightTransferTrainerFactory.register_engine("gloo", GlooTrainerWeightTransferEngine)
