"""What every rank of a torch process group needs before it starts: addresses, environment, backend."""

from __future__ import annotations

import os
import random
import socket
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from engine.config import Config


@dataclass(frozen=True)
class RankInfo:
    """One rank's place in its process group."""

    rank: int
    world_size: int
    master_addr: str
    master_port: int


def backend_for(device: str) -> str:
    """torch.distributed backend of a device."""
    return "nccl" if device == "cuda" else "gloo"


def offloads(config: Config) -> bool:
    """Whether actors that take turns on a device leave its memory while they wait; the CPU has no other to go to."""
    return config.placement.mode == "turns" and config.device == "cuda"


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as s:
        s.bind(("", 0))
        return int(s.getsockname()[1])


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch of this process."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def join_process_group(info: RankInfo, *, device: str, timeout_s: float) -> torch.device:
    """Join the process group and return this rank's device. Collectives give up after `timeout_s` seconds."""
    os.environ.update(
        RANK=str(info.rank),
        WORLD_SIZE=str(info.world_size),
        LOCAL_RANK="0",  # Ray shows each GPU actor its own GPU only
        MASTER_ADDR=info.master_addr,
        MASTER_PORT=str(info.master_port),
    )
    if device == "cuda":
        torch.cuda.set_device(0)
    dist.init_process_group(
        backend_for(device), rank=info.rank, world_size=info.world_size, timeout=timedelta(seconds=timeout_s)
    )
    return torch.device(device)
