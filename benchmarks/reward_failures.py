"""A reward function that often fails, against the same one that never does: nothing is lost, and little is waited for.

    python benchmarks/reward_failures.py            # 10,000 calls each, about 2 minutes on two cores

Of the failing run 2 % of the samples raise, 1 % hang, 0.5 % give NaN and 0.5 % a text. Each call takes `--cost` seconds
in which the process sleeps, as one does that waits for a service; a hanging one is ended after `--timeout` seconds, and
every failed call is repeated `--retries` times.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil

from actors.reward_pool import RewardPool
from engine.config import RewardsConfig
from engine.rewards.composition import Component, Composition
from engine.rewards.contract import Row, Sample, Scores
from engine.schedule.ledger import SampleLedger

SHARES = {"raise": 0.02, "hang": 0.01, "nan": 0.005, "text": 0.005}
GROUP = 8
CONCURRENT_GROUPS = 64


def fragile(sample: Sample) -> float:
    """1, after a while, or the failure that the row names."""
    time.sleep(sample.row.cost)
    match sample.row.failure:
        case "raise":
            raise ValueError("as planned")
        case "hang":
            time.sleep(3600)
        case "nan":
            return math.nan
        case "text":
            return "1.0"  # type: ignore[return-value]
    return 1.0


@dataclass(frozen=True)
class Outcome:
    """What became of a run's samples."""

    seconds: float
    trained: int
    dropped: dict[str, int]
    incidents: dict[str, int]
    wrong: int
    """Samples that should have a reward and have none, or the reverse, or another reward than theirs."""
    processes_left: int


def planned(calls: int, shares: dict[str, float]) -> list[str]:
    """The failure of each sample, "" for none, in a random order."""
    failures = [name for name, share in shares.items() for _ in range(round(calls * share))]
    failures += [""] * (calls - len(failures))
    random.Random(0).shuffle(failures)
    return failures


def run(failures: list[str], *, workers: int, cost: float, timeout: float, retries: int) -> Outcome:
    """Score groups of samples, many groups at a time, as a run does, and account for every sample."""
    entry = {"function": f"{Path(__file__).resolve()}:fragile", "timeout": timeout}
    rewards = {"functions": [entry], "workers": workers, "retries": retries}
    before = descendants()
    pool = RewardPool(RewardsConfig.model_validate(rewards))
    pool.start()
    ledger = SampleLedger()
    groups = [failures[i : i + GROUP] for i in range(0, len(failures), GROUP)]
    ids = [ledger.admit(len(group)) for group in groups]
    samples = [
        [Sample(i, "", "", Row({"failure": f, "cost": cost})) for i, f in zip(chunk, group, strict=True)]
        for chunk, group in zip(ids, groups, strict=True)
    ]
    began = time.monotonic()
    with ThreadPoolExecutor(CONCURRENT_GROUPS) as threads:
        scores: list[Scores] = list(threads.map(pool.score, samples))
    seconds = time.monotonic() - began
    pool.close()
    composed = Composition([Component("fragile")]).compose(scores, learn=True)
    wrong = 0
    for group, chunk, score in zip(groups, ids, composed, strict=True):
        ledger.train([chunk[i] for i in range(len(chunk)) if i not in score.dropped])
        for position, reason in score.dropped.items():
            ledger.drop([chunk[position]], reason)
        wrong += sum(
            (score.totals[i] != 1.0) if not failure else i not in score.dropped for i, failure in enumerate(group)
        )
    ledger.check()
    assert not ledger.in_flight
    kinds = Counter(incident["kind"] for score in scores for incident in score.incidents)
    left = len(descendants() - before)
    return Outcome(seconds, ledger.trained, dict(ledger.dropped), dict(kinds), wrong, left)


def descendants() -> set[int]:
    """What the fork server has started: it is a child of this process, workers are its children."""
    servers = [child for child in psutil.Process().children() if "reward_workers" in " ".join(child.cmdline())]
    return {process.pid for server in servers for process in server.children(recursive=True)}


def main() -> None:
    """Run both and print what they came to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--cost", type=float, default=0.05)
    parser.add_argument("--timeout", type=float, default=0.4)
    parser.add_argument("--retries", type=int, default=1)
    given = parser.parse_args()
    settings = {name: getattr(given, name) for name in ("workers", "cost", "timeout", "retries")}
    clean = run(planned(given.calls, {}), **settings)
    faulty = run(planned(given.calls, SHARES), **settings)
    for name, outcome in (("clean", clean), ("failing", faulty)):
        rate = outcome.trained / outcome.seconds
        print(f"{name:8} {outcome.seconds:6.1f} s  {rate:6.1f} rewards/s  trained {outcome.trained}  {outcome.dropped}")
        print(f"{'':8} incidents {outcome.incidents}  wrong {outcome.wrong}  processes left {outcome.processes_left}")
    ratio = (clean.trained / clean.seconds) / (faulty.trained / faulty.seconds)
    print(f"the good ones take {ratio:.2f} times as long as in the clean run")


if __name__ == "__main__":
    main()
