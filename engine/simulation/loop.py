"""A run, simulated: the real scheduling classes under a clock that jumps from event to event.

    Admission.room --> groups --> the least busy of Fleet.serving --> finished, scored --> Admission.finish
    Admission.ready --> take --> plan_microbatches: the slowest rank's time --> publish, engines pause --> trained

The trainers wait for the groups of a step and for the engines' new weights, the engines for room; who waits is woken by
the event that ends it. An engine that is lost gives its groups to the others, with the same lengths; a trainer that is
lost takes the run back to its newest checkpoint and everything under way with it.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, heapreplace
from typing import Any

import numpy as np

from engine.schedule.admission import Admission
from engine.schedule.balancing import plan_microbatches
from engine.schedule.costs import Costs
from engine.schedule.fleet import Fleet
from engine.schedule.incidents import Incident, IncidentBudget
from engine.schedule.ledger import SampleLedger
from engine.schedule.staleness import Staleness
from engine.simulation.engines import Engine
from engine.simulation.scenario import Decisions, Failures, Result, Setting, Workload, computed_tokens


@dataclass
class _Group:
    """A prompt's samples under way."""

    sample_ids: list[int]
    lengths: list[int]
    left: int
    tokens: Counter[int] = field(default_factory=Counter)
    """Version -> tokens, of the samples that are whole."""


@dataclass(frozen=True)
class _Update:
    """A step that is being trained."""

    groups: tuple[int, ...]
    start: float
    seconds: float
    busy_s: float
    """Summed over the ranks."""


def simulate(
    workload: Workload, setting: Setting, costs: Costs, *, failures: Failures | None = None, seed: int = 0
) -> Result:
    """Run to the last step; the same arguments give the same result."""
    return _Run(workload, setting, costs, failures, seed).run()


class _Run:
    """The state of one simulated run."""

    def __init__(
        self, workload: Workload, setting: Setting, costs: Costs, failures: Failures | None, seed: int
    ) -> None:
        self.workload, self.setting, self.costs, self.failures = workload, setting, costs, failures
        lengths_seed, failures_seed = np.random.SeedSequence(seed).spawn(2)
        groups, samples = workload.steps * workload.prompts_per_step, workload.samples_per_prompt
        drawn = workload.lengths.draw(np.random.default_rng(lengths_seed), groups * samples)
        self.lengths = np.clip(drawn, 1, workload.max_new_tokens).astype(np.int64).reshape(groups, samples)
        self.random = np.random.default_rng(failures_seed)

        self.decide = Decisions()
        self.fleet = Fleet(setting.engines)
        self.ledger = SampleLedger()
        self.budget = IncidentBudget(failures.budget if failures else 0)
        self.engines = [Engine(costs, workload.concurrent_samples) for _ in range(setting.engines)]

        self.now = 0.0
        self.stopped = False
        self.events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.number = itertools.count()
        self.changes = [0] * setting.engines
        """Of what each engine runs: a finish that was foreseen before the last one is void."""
        self.lives = [0] * setting.engines
        """How often each engine was lost."""
        self.attempt = 0
        """How often the run went back; events of an earlier attempt are void."""

        self.trainer_s = self.trainer_down_s = self.engine_down_s = self.publishing_s = 0.0
        self.ages: Counter[int] = Counter()
        self.tokens_of_steps: list[int] = []
        """Response tokens of each step, up to the last that counts."""
        self.lost_tokens = self.lost_steps = 0
        self.losses: Counter[str] = Counter()
        self._start_from(0)

    def run(self) -> Result:
        """Handle events until the last step's weights are out, or more has failed than a run bears."""
        for engine in self.fleet.starting():
            self.fleet.started(engine)
        self._publish()
        self._await_failure()
        while self.admission.version < self.workload.steps and not self.stopped:
            self.now, _, action, arguments = heappop(self.events)
            action(*arguments)
        return self._result()

    def _start_from(self, version: int) -> None:
        """Nothing is under way."""
        workload, staleness = self.workload, self.setting.max_staleness
        self.admission = Admission(workload.prompts_per_step, staleness, workload.steps)
        self.admission.resume(version)
        self.staleness = Staleness(staleness)
        self.groups: dict[int, _Group] = {}
        self.waiting: list[int] = []
        """Groups that no engine has yet."""
        self.held: list[set[int]] = [set() for _ in self.engines]
        """Unfinished groups of each engine."""
        self.next_group = version * workload.prompts_per_step
        self.update: _Update | None = None

    def _at(self, time: float, action: Callable[..., None], *arguments: Any) -> None:
        heappush(self.events, (time, next(self.number), action, arguments))

    # Engines

    def _admit(self) -> None:
        """As many groups start as there is room for."""
        for _ in range(self.decide("Admission", self.admission.room)):
            ids = self.decide("SampleLedger", self.ledger.admit, self.workload.samples_per_prompt)
            self.decide("Admission", self.admission.start, self.next_group)
            self.groups[self.next_group] = _Group(ids, self.lengths[self.next_group].tolist(), len(ids))
            self.waiting.append(self.next_group)
            self.next_group += 1
        self._dispatch()

    def _dispatch(self) -> None:
        """Give waiting groups whole to the engines that serve, each to the least busy."""
        serving = self.decide("Fleet", self.fleet.serving) if self.waiting else []
        if not serving:
            return
        loads = [(len(self.held[engine]), engine) for engine in serving]
        heapify(loads)
        given = set()
        for number in self.waiting:
            load, engine = loads[0]
            heapreplace(loads, (load + 1, engine))
            self.held[engine].add(number)
            given.add(engine)
            lengths = self.groups[number].lengths
            self.engines[engine].give(self.now, number, self.workload.prompt_tokens, lengths)
        self.waiting = []
        for engine in sorted(given):
            self._await_finish(engine)

    def _await_finish(self, engine: int) -> None:
        self.changes[engine] += 1
        time = self.engines[engine].next_finish()
        if time < math.inf:
            self._at(time, self._samples_finish, engine, self.changes[engine])

    def _samples_finish(self, engine: int, change: int) -> None:
        if change != self.changes[engine]:
            return
        for number, start, end in self.engines[engine].finish():
            group = self.groups[number]
            for version, tokens in self.engines[engine].versions(start, end):
                group.tokens[version] += tokens
            group.left -= 1
            if group.left == 0:
                self.held[engine].discard(number)
                self._at(self.now + self.costs.reward_s, self._scored, number, self.attempt)
        self._await_finish(engine)

    def _scored(self, number: int, attempt: int) -> None:
        if attempt == self.attempt:
            self.decide("Admission", self.admission.finish, number)
            self._train()

    # Trainers

    def _train(self) -> None:
        """Take a step's groups, if they are there and the trainers are free."""
        if self.update is not None or not self.decide("Admission", self.admission.ready):
            return
        numbers = self.decide("Admission", self.admission.take)
        self._count_ages(numbers)
        workload, costs, ranks = self.workload, self.costs, self.setting.trainers
        prompt, samples = workload.prompt_tokens, workload.samples_per_prompt
        lens = [computed_tokens(prompt, n, samples) for number in numbers for n in self.groups[number].lengths]
        plan = self.decide("plan_microbatches", plan_microbatches, lens, ranks=ranks, token_budget=sum(lens))
        tokens = [sum(lens[i] for micro in share for i in micro) for share in plan]
        per_token = workload.scoring_passes * costs.forward_token_s + workload.training_passes * costs.train_token_s
        fixed = workload.updates * costs.update_s
        seconds, busy_s = fixed + max(tokens) * per_token, ranks * fixed + sum(tokens) * per_token
        self.update = _Update(tuple(numbers), self.now, seconds, busy_s)
        self._at(self.now + seconds, self._updated, self.attempt)

    def _count_ages(self, numbers: Sequence[int]) -> None:
        """How old the tokens are that a step takes; the class that asserts the bound is asked once per version."""
        tokens: Counter[int] = Counter()
        for number in numbers:
            tokens.update(self.groups[number].tokens)
        versions = sorted(tokens)
        ages = self.decide("Staleness", self.staleness.of, np.array(versions))
        for version, age in zip(versions, ages.tolist(), strict=True):
            self.ages[age] += tokens[version]

    def _updated(self, attempt: int) -> None:
        """The optimizer is done: account for the samples, and publish."""
        if attempt != self.attempt:
            return
        assert self.update is not None
        trained = [self.groups.pop(number) for number in self.update.groups]
        self.decide("SampleLedger", self.ledger.train, [i for group in trained for i in group.sample_ids])
        self.decide("SampleLedger", self.ledger.news)
        self.decide("SampleLedger", self.ledger.check)
        self.tokens_of_steps.append(sum(sum(group.lengths) for group in trained))
        self._publish()

    def _publish(self) -> None:
        """Every engine that is up pauses for the weights."""
        version = self.admission.version + (self.update is not None)
        self.decide("Fleet", self.fleet.expect, version)
        loading = [(engine, self.lives[engine]) for engine in self.decide("Fleet", self.fleet.stale)]
        for engine, _ in loading:
            self._load(engine, version)
        self.publishing_s += self.costs.publish_s
        self._at(self.now + self.costs.publish_s, self._published, version, loading, self.attempt)

    def _load(self, engine: int, version: int) -> None:
        kept = self.setting.max_staleness + 1
        self.engines[engine].load(self.now, version, keep=kept, recompute=self.workload.recompute)
        self._await_finish(engine)

    def _published(self, version: int, loading: list[tuple[int, int]], attempt: int) -> None:
        """The weights are out: the step is over, and the next groups start."""
        if attempt != self.attempt:
            return
        for engine, life in loading:
            if life == self.lives[engine]:
                self.decide("Fleet", self.fleet.acknowledged, engine, version)
        self.decide("Staleness", self.staleness.published, version)
        if self.update is not None:
            self.trainer_s += self.update.busy_s
            self.update = None
            self.decide("Admission", self.admission.trained)
            self.budget.finished(version)
        self._admit()
        self._train()

    # Failures

    def _await_failure(self) -> None:
        if self.failures is not None and self.failures.per_hour > 0:
            every_s = 3600 / (self.failures.per_hour * self.setting.accelerators)
            self._at(self.now + self.random.exponential(every_s), self._accelerator_fails)

    def _accelerator_fails(self) -> None:
        victim = int(self.random.integers(self.setting.accelerators))
        is_engine = victim < self.setting.engines and not self.setting.turns
        if not is_engine:
            self._lose_trainer()
        elif victim not in self.fleet.starting():
            self._lose_engine(victim)
        self._await_failure()

    def _incident(self, actor: str) -> None:
        incident = Incident("actor_died", actor, "replaced", "simulated")
        self.stopped = not self.decide("IncidentBudget", self.budget.spend, incident)
        self.losses[actor] += 1

    def _lose_engine(self, engine: int) -> None:
        """Its groups begin anew on others."""
        assert self.failures is not None
        self._incident("rollout")
        self.lost_tokens += self._clear(engine)
        self.decide("Fleet", self.fleet.lost, engine)
        self.lives[engine] += 1
        self.engine_down_s += self.failures.restart_s
        self._at(self.now + self.failures.restart_s, self._engine_up, engine)
        self.waiting += sorted(self.held[engine])
        self.held[engine] = set()
        self._dispatch()

    def _clear(self, engine: int) -> int:
        """Take an engine's samples away; returns the tokens that its unfinished groups had."""
        lost = self.engines[engine].clear(self.now)
        self._await_finish(engine)
        for number in self.held[engine]:
            group = self.groups[number]
            lost += group.tokens.total()
            group.left, group.tokens = len(group.lengths), Counter()
        return lost

    def _engine_up(self, engine: int) -> None:
        """Bring it to the weights that count now, if there are any; else it is brought to the next."""
        self.decide("Fleet", self.fleet.started, engine)
        version = self.fleet.version
        if version is not None:
            self._load(engine, version)
            self._at(self.now + self.costs.publish_s, self._joined, engine, self.lives[engine], version)

    def _joined(self, engine: int, life: int, version: int) -> None:
        """It serves, unless others were published meanwhile, which it is being brought to."""
        if life == self.lives[engine]:
            self.decide("Fleet", self.fleet.acknowledged, engine, version)
            self._dispatch()

    def _lose_trainer(self) -> None:
        """Back to the newest checkpoint, with nothing under way."""
        assert self.failures is not None
        self._incident("policy")
        every, version = self.workload.checkpoint_every, self.admission.version
        saved = version - version % every if every else 0
        self.lost_steps += version - saved
        self.lost_tokens += sum(self.tokens_of_steps[saved:]) + sum(g.tokens.total() for g in self.groups.values())
        del self.tokens_of_steps[saved:]
        for engine in range(self.setting.engines):
            self.lost_tokens += self.engines[engine].clear(self.now)
            self._await_finish(engine)
        if self.update is not None and self.update.seconds:
            self.trainer_s += self.update.busy_s * min(1.0, (self.now - self.update.start) / self.update.seconds)
        self.ledger.drop(self.ledger.in_flight, "went_back")
        self.fleet.expect(None)
        self.attempt += 1
        self._start_from(saved)
        self.trainer_down_s += self.failures.restart_s * self.setting.trainers
        self._at(self.now + self.failures.restart_s, self._restarted, self.attempt)

    def _restarted(self, attempt: int) -> None:
        if attempt == self.attempt:
            self._publish()

    def _result(self) -> Result:
        setting, seconds = self.setting, self.now
        engine_s = sum(engine.busy_s + engine.loading_s for engine in self.engines) + self.engine_down_s
        trainer_s = self.trainer_s + self.trainer_down_s + self.publishing_s * setting.trainers
        if setting.turns:  # an accelerator works when either of its two does; both take part in publishing
            engine_s = trainer_s = engine_s + self.trainer_s + self.trainer_down_s
        tokens = self.ages.total()
        return Result(
            setting=setting,
            steps=self.admission.version,
            seconds=seconds,
            stopped=self.stopped,
            engines_idle=_idle(engine_s, setting.engines * seconds),
            trainers_idle=_idle(trainer_s, setting.trainers * seconds),
            staleness={age: count / tokens for age, count in sorted(self.ages.items())},
            trained_tokens=sum(self.tokens_of_steps),
            lost_tokens=self.lost_tokens,
            lost_steps=self.lost_steps,
            engine_failures=self.losses["rollout"],
            trainer_failures=self.losses["policy"],
            admitted=self.ledger.admitted,
            trained=self.ledger.trained,
            dropped=dict(self.ledger.dropped),
            in_flight=len(self.ledger.in_flight),
            decisions=self.decide,
        )


def _idle(busy_s: float, available_s: float) -> float:
    return max(0.0, 1 - busy_s / available_s) if available_s else 0.0
