from __future__ import annotations

import pytest

from engine.schedule.ledger import SampleLedger


def test_every_admitted_sample_is_in_flight_until_it_is_settled():
    ledger = SampleLedger()
    ids = ledger.admit(3) + ledger.admit(2)
    assert ids == [0, 1, 2, 3, 4]
    assert ledger.in_flight == set(ids)
    ledger.train([0, 1])
    ledger.drop([4], "reward_timeout")
    assert (ledger.admitted, ledger.trained, dict(ledger.dropped)) == (5, 2, {"reward_timeout": 1})
    assert ledger.in_flight == {2, 3}
    ledger.check()


@pytest.mark.parametrize("again", [[0], [7], [1, 1]])
def test_a_sample_cannot_be_settled_twice_or_unless_admitted(again):
    ledger = SampleLedger()
    ledger.admit(2)
    ledger.train([0])
    with pytest.raises(AssertionError, match="settled"):
        ledger.drop(again, "no_reward")
    assert ledger.in_flight == {1}
    ledger.check()


def test_a_sample_that_vanishes_is_noticed():
    ledger = SampleLedger()
    ledger.admit(2)
    ledger._in_flight.discard(1)
    with pytest.raises(AssertionError, match="admitted 2"):
        ledger.check()


def test_what_became_of_samples_is_told_once():
    ledger = SampleLedger()
    ids = ledger.admit(9)
    ledger.train(ids[:4])
    ledger.drop([ids[8], ids[6]], "reward_error")
    assert ledger.news() == {"trained": "0-3", "reward_error": "6,8"}
    assert ledger.news() == {}
    ledger.drop(ids[4:6], "reward_error")
    assert ledger.news() == {"reward_error": "4-5"}
