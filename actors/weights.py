"""Trainer -> rollout weight transfer: versioned, bucketed, checksummed.

The trainer packs its parameters into a few flat byte buckets in Ray's object store, which the engines of the same host
read without a copy and those of other hosts fetch once per host. A snapshot carries its version and a checksum over
names, shapes, types and bytes; an engine recomputes it over what it received and answers with both (`Ack`). Tied
embeddings travel once, under the input embedding's name.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
import xxhash

BUCKET_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Entry:
    """One tensor inside a bucket."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


@dataclass(frozen=True)
class Bucket:
    """Several tensors as one flat array of bytes."""

    entries: tuple[Entry, ...]
    data: np.ndarray

    def digest(self) -> str:
        """Checksum of names, types, shapes and bytes."""
        hasher = xxhash.xxh3_128()
        hasher.update(repr(self.entries).encode())
        hasher.update(self.data.data)
        return hasher.hexdigest()

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) views of the bytes: read them, never write them."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            flat = torch.from_numpy(self.data)
        for e in self.entries:
            yield e.name, flat[e.start : e.start + e.num_bytes].view(getattr(torch, e.dtype)).view(e.shape)


@dataclass(frozen=True)
class Snapshot:
    """A version of the weights. `buckets` are object references, fetched by whoever loads it."""

    version: int
    checksum: str
    num_bytes: int
    buckets: tuple[Any, ...]
    adapter: dict[str, Any] | None = None
    """What the adapter is, in peft's terms, when the tensors are an adapter's alone."""


@dataclass(frozen=True)
class Ack:
    """What an engine loaded."""

    version: int
    checksum: str


class ChecksumError(RuntimeError):
    """What came is not what was published."""


def combine(digests: Iterable[str]) -> str:
    """One checksum out of the buckets' own, in order."""
    return xxhash.xxh3_128(",".join(digests).encode()).hexdigest()


def pack(weights: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int = BUCKET_BYTES) -> Iterator[Bucket]:
    """Copy tensors, in order, into buckets of at most `bucket_bytes` (one larger tensor has a bucket to itself).

    Each tensor is copied before the next one is asked for, so that ZeRO-3 may release it.
    """
    entries: list[Entry] = []
    buffer, size = np.empty(0, np.uint8), 0
    for name, tensor in weights:
        raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        if size + len(raw) > len(buffer):
            if entries:
                yield Bucket(tuple(entries), buffer[:size])
            entries, buffer, size = [], np.zeros(max(bucket_bytes, len(raw)), np.uint8), 0
        buffer[size : size + len(raw)] = raw
        dtype = str(tensor.dtype).removeprefix("torch.")
        entries.append(Entry(name, dtype, tuple(tensor.shape), size, len(raw)))
        size = min(size + -(-len(raw) // 8) * 8, len(buffer))  # views of any type start at multiples of 8
    if entries:
        yield Bucket(tuple(entries), buffer[:size])


def publish(
    weights: Iterable[tuple[str, torch.Tensor]], version: int, *, adapter: dict[str, Any] | None = None
) -> Snapshot:
    """Put the weights into the object store. They live as long as the snapshot's references and this process."""
    refs, digests, num_bytes = [], [], 0
    for bucket in pack(weights):
        digests.append(bucket.digest())
        num_bytes += bucket.data.nbytes
        refs.append(ray.put(bucket))
    return Snapshot(version, combine(digests), num_bytes, tuple(refs), adapter)


def receive(snapshot: Snapshot, *, timeout_s: float) -> tuple[list[Bucket], Ack]:
    """Fetch a snapshot and checksum what came.

    Raises:
        ChecksumError: the bytes are not those that were published.
    """
    buckets = ray.get(list(snapshot.buckets), timeout=timeout_s)
    checksum = combine(bucket.digest() for bucket in buckets)
    if checksum != snapshot.checksum:
        raise ChecksumError(f"weights version {snapshot.version} has checksum {checksum}, not {snapshot.checksum}")
    return buckets, Ack(snapshot.version, checksum)
