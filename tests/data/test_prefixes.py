"""What samples of a group begin with in common."""

import numpy as np

from engine.data.batch import Batch
from engine.data.prefixes import shared_prefixes

WIDE = 4096


def batch_of(*samples: tuple[int, list[int], list[int]]) -> Batch:
    """Samples of (group, prompt, response)."""
    return Batch.offline(
        tokens=np.array([t for _, prompt, response in samples for t in [*prompt, *response]], np.int32),
        seq_lens=np.array([len(prompt) + len(response) for _, prompt, response in samples], np.int32),
        loss_mask=np.concatenate([np.repeat([False, True], [len(p), len(r)]) for _, p, r in samples]),
        group_ids=np.array([group for group, _, _ in samples], np.int64),
    )


def test_neighbours_of_a_group_share_their_prompt():
    batch = batch_of((1, [5, 6, 7], [8, 9]), (1, [5, 6, 7], [8]), (2, [5, 6, 7], [8]))
    assert shared_prefixes(batch, WIDE) == [3, 3, 0], "not what they both said, nor what another group shares"


def test_prompts_that_part_share_what_comes_before():
    assert shared_prefixes(batch_of((1, [5, 6, 7], [8]), (1, [5, 6, 9, 9], [8])), WIDE) == [2, 2]
    assert shared_prefixes(batch_of((1, [5, 6], [8]), (1, [9, 6], [8])), WIDE) == [0, 0]


def test_samples_of_a_group_that_are_apart_share_nothing():
    assert shared_prefixes(batch_of((1, [5, 6], [8]), (2, [5, 6], [8]), (1, [5, 6], [8])), WIDE) == [0, 0, 0]


def test_a_sample_without_a_trained_token_may_be_shared_whole():
    assert shared_prefixes(batch_of((1, [5, 6], []), (1, [5, 6], [8])), WIDE) == [2, 2]


def test_a_narrow_model_saves_nothing_by_it():
    batch = batch_of((1, [5] * 40, [8]), (1, [5] * 40, [8, 9]))
    assert shared_prefixes(batch, 576) == [40, 40]
    assert shared_prefixes(batch, 64) == [0, 0]
