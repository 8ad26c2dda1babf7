"""Trainer -> rollout weight transfer: versioned, bucketed, checksummed.

    trainer: parameters --one copy--> buckets in shared memory --> engines of the same machine: read in place
                                      `- to the object store ----> engines of other machines, once per machine

Buckets keep their memory from version to version. A snapshot carries its version and a checksum over names, shapes,
types and bytes; an engine recomputes it over what it received and answers with both (`Ack`). Tied embeddings travel
once, under the input embedding's name.
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

from actors.shared_memory import Address, Readings, Segment, UnreachableError

BUCKET_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Entry:
    """One tensor inside a bucket."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """The tensor, as a view of the bucket's bytes [N] uint8."""
        return flat[self.start : self.start + self.num_bytes].view(getattr(torch, self.dtype)).view(self.shape)


@dataclass(frozen=True)
class Bucket:
    """Several tensors as one flat array of bytes."""

    entries: tuple[Entry, ...]
    data: np.ndarray

    def digest(self) -> str:
        """Checksum of names, types, shapes and bytes."""
        hasher = xxhash.xxh3_128()
        hasher.update(repr(self.entries).encode())
        for e in self.entries:  # not what lies between them, which is left from earlier versions
            hasher.update(self.data[e.start : e.start + e.num_bytes].data)
        return hasher.hexdigest()

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) views of the bytes: read them, never write them."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            flat = torch.from_numpy(self.data)
        for entry in self.entries:
            yield entry.name, entry.of(flat)


@dataclass(frozen=True)
class Snapshot:
    """A version of the weights, until the next one is published."""

    version: int
    checksum: str
    num_bytes: int
    layout: tuple[tuple[Entry, ...], ...]
    """What each bucket holds."""
    addresses: tuple[Address, ...]
    """Where the buckets lie in the publisher's memory."""
    copies: tuple[Any, ...] = ()
    """References of the buckets in the object store, if they are there: for engines on other machines."""
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


class Publisher:
    """The buckets of a trainer, filled anew for each version."""

    def __init__(self, bucket_bytes: int = BUCKET_BYTES) -> None:
        self._bucket_bytes = bucket_bytes
        self._segments: list[Segment] = []

    def publish(
        self,
        weights: Iterable[tuple[str, torch.Tensor]],
        version: int,
        *,
        adapter: dict[str, Any] | None = None,
        spread: bool = False,
    ) -> Snapshot:
        """Copy the weights into the buckets; `spread` puts them into the object store too.

        What was published before is gone.
        """
        buckets = list(self.pack(weights))
        return Snapshot(
            version,
            combine(bucket.digest() for bucket in buckets),
            sum(entry.num_bytes for bucket in buckets for entry in bucket.entries),
            tuple(bucket.entries for bucket in buckets),
            tuple(segment.address for segment in self._segments[: len(buckets)]),
            tuple(ray.put(bucket.data) for bucket in buckets) if spread else (),
            adapter,
        )

    def pack(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[Bucket]:
        """Copy tensors, in order, into buckets of at most `bucket_bytes` (one larger tensor has one to itself).

        Each tensor is copied before the next one is asked for, so that ZeRO-3 may release it.
        """
        number, size = -1, 0
        entries: list[Entry] = []
        for name, tensor in weights:
            num_bytes = tensor.numel() * tensor.element_size()
            if number < 0 or size + num_bytes > self._segments[number].address.size:
                if entries:
                    yield Bucket(tuple(entries), self._segments[number].bytes[:size])
                number, size, entries = number + 1, 0, []
                self._make_room(number, num_bytes)
            entry = Entry(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), size, num_bytes)
            entry.of(self._segments[number].tensor).copy_(tensor.detach())
            entries.append(entry)
            size = min(size + -(-num_bytes // 8) * 8, self._segments[number].address.size)  # any type starts at 8 n
        if entries:
            yield Bucket(tuple(entries), self._segments[number].bytes[:size])

    def _make_room(self, number: int, num_bytes: int) -> None:
        """Have a segment of this number that holds at least so many bytes."""
        if number == len(self._segments):
            self._segments.append(Segment(max(self._bucket_bytes, num_bytes)))
        elif self._segments[number].address.size < num_bytes:
            self._segments[number] = Segment(num_bytes)


def receive(snapshot: Snapshot, readings: Readings, *, timeout_s: float) -> tuple[list[Bucket], Ack]:
    """Read a snapshot and checksum what came.

    Raises:
        UnreachableError: it is in the memory of another machine only.
        ChecksumError: the bytes are not those that were published.
    """
    try:
        memory = readings.read(snapshot.addresses)
    except UnreachableError:
        if not snapshot.copies:
            raise
        memory = ray.get(list(snapshot.copies), timeout=timeout_s)
    buckets = [Bucket(entries, data) for entries, data in zip(snapshot.layout, memory, strict=True)]
    checksum = combine(bucket.digest() for bucket in buckets)
    if checksum != snapshot.checksum:
        raise ChecksumError(f"weights version {snapshot.version} has checksum {checksum}, not {snapshot.checksum}")
    return buckets, Ack(snapshot.version, checksum)
