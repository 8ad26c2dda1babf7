"""How old tokens are when they are trained."""

import numpy as np
import pytest

from engine.schedule.staleness import Staleness


def test_age_is_counted_in_versions_that_were_published() -> None:
    staleness = Staleness(2)
    for version in (0, 1, 4):  # steps 2 and 3 made no update
        staleness.published(version)
    assert staleness.of(np.array([4, 1, 0])).tolist() == [0, 1, 2]
    assert staleness.shares(np.array([4, 4, 1, 0])) == {
        "rollout/staleness/0": 0.5,
        "rollout/staleness/1": 0.25,
        "rollout/staleness/2": 0.25,
        "rollout/staleness": 0.75,
    }


def test_a_token_that_is_too_old_is_an_error() -> None:
    staleness = Staleness(1)
    for version in (0, 1, 2):
        staleness.published(version)
    with pytest.raises(AssertionError, match="version 0 are to be trained, more than 1 versions behind 2"):
        staleness.of(np.array([2, 0]))


def test_publishing_a_version_again_changes_nothing() -> None:
    staleness = Staleness(1)
    for version in (0, 1, 1):
        staleness.published(version)
    assert staleness.of(np.array([0])).tolist() == [1]
