"""A run bears some incidents for each stretch of steps that it gets further."""

from __future__ import annotations

from engine.schedule.incidents import WINDOW, Incident, IncidentBudget


def died(actor: str = "policy[0]") -> Incident:
    return Incident("actor_died", actor, "replaced", "why")


def test_so_many_are_borne_and_one_more_is_not():
    budget = IncidentBudget(2)
    assert [budget.spend(died()) for _ in range(3)] == [True, True, False]
    assert not IncidentBudget(0).spend(died())


def test_steps_that_are_further_than_any_before_make_room():
    budget = IncidentBudget(1)
    assert budget.spend(died())
    budget.finished(WINDOW - 1)
    assert not budget.spend(died())
    budget.finished(2 * WINDOW)
    assert budget.spend(died())


def test_a_run_that_is_thrown_back_to_the_same_step_makes_no_room():
    budget = IncidentBudget(3)
    budget.finished(500)
    answers = []
    for _ in range(4):
        answers.append(budget.spend(died()))
        for step in range(499, 501):
            budget.finished(step)
    assert answers == [True, True, True, False]


def test_the_summary_counts_by_kind_and_actor():
    budget = IncidentBudget(9)
    for incident in (died("rollout[0]"), died(), died("rollout[0]"), Incident("actor_late", "rewards[0]", "x", "y")):
        budget.spend(incident)
    assert budget.summary() == "actor_died: rollout[0] x 2, policy[0]; actor_late: rewards[0]"
