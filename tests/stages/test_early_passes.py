"""Passes over groups as they finish."""

import numpy as np

from engine.data.batch import Batch
from engine.stages.early_passes import EarlyPasses


def group(*sample_ids: int) -> Batch:
    lens = np.array([1 + i % 3 for i in sample_ids], np.int32)
    tokens = np.concatenate([np.full(n, i) for n, i in zip(lens, sample_ids, strict=True)]).astype(np.int32)
    batch = Batch.offline(tokens, lens, np.ones(len(tokens), bool), np.zeros(len(lens), np.int64))
    return Batch(**{**vars(batch), "sample_ids": np.array(sample_ids, np.int64)})


def test_values_come_back_in_the_order_of_the_batch_that_asks():
    passes = EarlyPasses({"values": lambda batch: batch.tokens * 10.0})
    for held in (group(5, 2), group(7, 1, 4)):
        passes.start(held)
    passes.start(group(9))
    for batch in (group(9), group(1, 5, 4, 2)):
        values = passes.take("values", batch)
        assert values is not None
        assert values.tolist() == (batch.tokens * 10.0).tolist()


def test_a_sample_whose_pass_was_not_begun_leaves_all_of_it_to_be_asked():
    passes = EarlyPasses({"values": lambda batch: batch.tokens * 10.0})
    passes.start(group(1))
    assert passes.take("values", group(1, 2)) is None
    assert passes.take("other", group(1)) is None
