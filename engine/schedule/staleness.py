"""How many versions old each token is when it is trained, and that none is older than allowed."""

from __future__ import annotations

import numpy as np


class Staleness:
    """The versions that engines were given of late."""

    def __init__(self, max_staleness: int) -> None:
        self.max_staleness = max_staleness
        self._versions: list[int] = []

    def published(self, version: int) -> None:
        """Engines have these weights from now on."""
        if version not in self._versions:
            self._versions = sorted([*self._versions, version])[-(self.max_staleness + 1) :]

    def of(self, version_T: np.ndarray) -> np.ndarray:
        """[T] int: how many versions came after the one that made each token. A step without an update makes none.

        Raises:
            AssertionError: a token is older than `max_staleness` versions.
        """
        ages_T = len(self._versions) - np.searchsorted(self._versions, version_T, side="right")
        known = np.isin(version_T, self._versions)
        assert known.all(), (
            f"tokens of version {int(version_T[~known].min())} are to be trained, more than {self.max_staleness} "
            f"versions behind {self._versions[-1]}"
        )
        return ages_T

    def shares(self, version_T: np.ndarray) -> dict[str, float]:
        """`rollout/staleness/<n>`: the share of the tokens that are n versions old; and their mean. Raises as `of`."""
        ages_T = self.of(version_T)
        counts = np.bincount(ages_T, minlength=self.max_staleness + 1)
        shares = {f"rollout/staleness/{age}": count / len(ages_T) for age, count in enumerate(counts.tolist())}
        return shares | {"rollout/staleness": float(ages_T.mean())}
