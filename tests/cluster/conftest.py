"""Batches for the tests with real actors."""

from __future__ import annotations

import numpy as np
import pytest

from engine.data.batch import Batch


def random_batch(samples: int, *, seed: int = 0, vocabulary: int = 300) -> Batch:
    """Samples of 6 to 40 random tokens with random advantages, as if the policy had produced all but the first few."""
    random = np.random.default_rng(seed)
    seq_lens = random.integers(6, 40, samples).astype(np.int32)
    total = int(seq_lens.sum())
    starts = np.cumsum(seq_lens) - seq_lens
    loss_mask = np.ones(total, bool)
    for start, length in zip(starts, seq_lens, strict=True):
        loss_mask[start : start + random.integers(1, length)] = False
    return Batch(
        tokens=random.integers(5, vocabulary, total).astype(np.int32),
        seq_lens=seq_lens,
        loss_mask=loss_mask,
        rollout_logp=np.where(loss_mask, np.float32(-5.7), 0).astype(np.float32),
        version=np.where(loss_mask, 0, -1).astype(np.int32),
        group_ids=np.arange(samples, dtype=np.int64) // 4,
        sample_ids=np.arange(samples, dtype=np.int64),
        totals=np.zeros(samples, np.float32),
        annotations={"advantages": (random.normal(size=total) * loss_mask).astype(np.float32)},
    )


@pytest.fixture
def batch() -> Batch:
    return random_batch(13)
