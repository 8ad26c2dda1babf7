"""Memory that one process writes and others of its machine read without a copy.

A segment is an anonymous file in memory; others open it through /proc while its owner lives, so it needs no name, no
place on a disk, and nothing is left when its owner is killed.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


class UnreachableError(RuntimeError):
    """The segment is another machine's, or its owner is gone."""


@dataclass(frozen=True)
class Address:
    """Where a segment can be opened."""

    path: str
    inode: int
    """Tells whether what is at the path is still this segment."""
    size: int


class Segment:
    """Memory of this process for others to read."""

    def __init__(self, size: int) -> None:
        self._file = os.memfd_create("gnomon-weights")
        os.ftruncate(self._file, size)
        self._memory = mmap.mmap(self._file, size)
        self.bytes = np.frombuffer(self._memory, np.uint8)
        """[size] uint8, to be written."""
        self.tensor = torch.from_numpy(self.bytes)
        """The same memory."""
        self.address = Address(f"/proc/{os.getpid()}/fd/{self._file}", os.fstat(self._file).st_ino, size)

    def __del__(self) -> None:
        os.close(self._file)  # readers keep what they have mapped


class Readings:
    """Segments of others, mapped once and kept while they are asked for."""

    def __init__(self) -> None:
        self._mapped: dict[Address, np.ndarray] = {}

    def read(self, addresses: Sequence[Address]) -> list[np.ndarray]:
        """[size] uint8 of each, read-only; all others are given up.

        Raises:
            UnreachableError: one cannot be opened.
        """
        self._mapped = {a: _mapped(a) if (held := self._mapped.get(a)) is None else held for a in addresses}
        return list(self._mapped.values())


def _mapped(address: Address) -> np.ndarray:
    try:
        file = os.open(address.path, os.O_RDONLY)
    except OSError as error:
        raise UnreachableError(f"{address.path} cannot be opened: {error.strerror}") from None
    try:
        if os.fstat(file).st_ino != address.inode:
            raise UnreachableError(f"{address.path} is something else")
        return np.frombuffer(mmap.mmap(file, address.size, prot=mmap.PROT_READ), np.uint8)
    finally:
        os.close(file)
