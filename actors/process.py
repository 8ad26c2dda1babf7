"""What every rank of a torch process group needs before it starts: addresses, environment, backend."""

from __future__ import annotations

import os
import random
import socket
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from engine.config import Config

_DRAWN_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")


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
    """A free TCP port that the kernel gives to nobody: it must stay free until rank 0 listens, seconds later.

    From 20,000, above the ports of Ray's workers, and outside of the range from which connections and `bind(0)` draw.
    """
    low, high = (int(bound) for bound in _DRAWN_PORTS.read_text().split()) if _DRAWN_PORTS.exists() else (32768, 60999)
    ports = [port for port in range(20_000, 65_536) if not low <= port <= high] or range(20_000, 65_536)
    for port in random.SystemRandom().sample(ports, min(100, len(ports))):
        with socket.socket() as s, suppress(OSError):
            s.bind(("", port))
            return port
    raise RuntimeError(f"none of 100 TCP ports outside of {low}-{high} is free for a process group")


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
