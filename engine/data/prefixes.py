"""What samples of one group begin with in common: computed once, where they are computed together and it pays.

Legend: B samples.
"""

from __future__ import annotations

import numpy as np

from engine.data.batch import Batch

LEAST_SAVED = 300_000
"""Saved tokens times the square of the model's width: below it, the segment of attention that is added costs as much as
the linear layers that are saved (some 0.2 ms of a CPU core for each layer)."""


def shared_prefixes(batch: Batch, hidden_size: int) -> list[int]:
    """[B] how many tokens each sample shares with the others of its run: neighbours of one group.

    It is the same for all of a run, 0 where nothing is gained. Only what comes before the first trained token of each
    counts, since a trained token is its own sample's.
    """
    starts = np.cumsum(batch.seq_lens, dtype=np.int64) - batch.seq_lens
    samples = [batch.tokens[s : s + n] for s, n in zip(starts, batch.seq_lens, strict=True)]
    masks = [batch.loss_mask[s : s + n] for s, n in zip(starts, batch.seq_lens, strict=True)]
    changes = np.flatnonzero(np.diff(batch.group_ids)) + 1
    shared: list[int] = []
    if not len(batch):
        return shared
    for run in np.split(np.arange(len(batch)), changes):
        limit = min(int(masks[i].argmax()) if masks[i].any() else len(masks[i]) for i in run)
        first = samples[run[0]][:limit]
        equal = np.all([samples[i][:limit] == first for i in run], axis=0)
        common = limit if equal.all() else int(equal.argmin())
        pays = common * (len(run) - 1) * hidden_size**2 >= LEAST_SAVED
        shared += [common if pays else 0] * len(run)
    return shared
