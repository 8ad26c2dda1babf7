"""The suite: every kind of actor x every phase of a step, and what else can break; each run's account is checked.

make chaos                                       # everything, about two hours on two cores
make chaos ARGS='--times 1 --only kill,stop'     # some of it
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable

from tests.chaos.outages import full_disk, service_down
from tests.chaos.outcome import Outcome, print_table
from tests.chaos.resumption import killed_jobs
from tests.chaos.soak import soak
from tests.chaos.strikes import kills, numbers
from tests.chaos.workshop import Workshop, workshop

ROLES = ("policy", "critic", "reference", "reward_model", "rollout", "rewards")


def main() -> None:
    """Run what is asked for, and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, default=5, help="how often each fault strikes; a job, twice as often")
    parser.add_argument("--only", default="", help="parts: kill, stop, environments, numbers, outages, jobs, soak")
    parser.add_argument("--roles", default=",".join(ROLES), help="whose processes are killed and stopped")
    parser.add_argument("--steps", type=int, default=2000, help="of the soak")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    roles, times, chance = tuple(given.roles.split(",")), given.times, random.Random(given.seed)
    parts: dict[str, Callable[[Workshop], list[Outcome]]] = {
        "kill": lambda shop: kills(shop, times, chance, "kill", (*roles, "controller")),
        "stop": lambda shop: kills(shop, max(1, times // 2), chance, "stop", roles),
        "environments": lambda shop: kills(shop, times, chance, "kill", ("environments",)),
        "numbers": lambda shop: numbers(shop, times, chance),
        "outages": lambda shop: [*full_disk(shop, times), *service_down(shop, times)],
        "jobs": lambda shop: killed_jobs(shop, 2 * times, chance),
        "soak": lambda shop: soak(shop, given.steps, chance),
    }
    outcomes: list[Outcome] = []
    for name in given.only.split(",") if given.only else parts:
        with workshop() as shop:
            outcomes += parts[name](shop)
    print_table(outcomes)


if __name__ == "__main__":
    main()
