"""The supply of groups: which prompts are drawn, when they start, which of the finished groups a step takes.

    prompts --(as many as engine/schedule/admission.py allows)--> experience --> accepted or not --> a step's groups

With `rl.max_staleness` 0 nothing is under way while models are trained. With more, generation goes on meanwhile: a call
that blocks runs in a thread of its own (`beside`) and this one, the only one that engines and rewards know, hands
responses on to the rewards and gives out prompts as places become free.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from engine.config import Config
from engine.data.batch import Batch
from engine.data.sampler import RowSampler
from engine.plan import Plan
from engine.roles import SamplingSettings
from engine.schedule.admission import Admission
from engine.schedule.ledger import SampleLedger, spans
from engine.schedule.staleness import Staleness
from engine.stages.early_passes import EarlyPasses
from engine.stages.experience import TICK_S, WAIT_S, Experience, Group, no_reward_error, sample_seeds, to_batch
from engine.tracking.tracker import Tracker


@dataclass(frozen=True)
class _Drawn:
    """A prompt that was drawn: which in the whole run, its row and its samples."""

    ordinal: int
    row: int
    sample_ids: list[int]


class Supply:
    """Groups under way, and those that wait for a step."""

    def __init__(
        self,
        config: Config,
        plan: Plan,
        tracker: Tracker,
        experience: Experience,
        ledger: SampleLedger,
        passes: EarlyPasses,
    ) -> None:
        self.config = config
        self.prompts = plan.train_prompts
        self.tracker = tracker
        self.experience = experience
        self.ledger = ledger
        self.passes = passes
        self.sampler = RowSampler(len(plan.train_prompts), seed=config.seed)
        self.admission = Admission(config.rl.prompts_per_step, config.rl.max_staleness, config.rl.steps)
        self.staleness = Staleness(config.rl.max_staleness)
        self.settings = SamplingSettings(
            config.rollout.temperature, config.rollout.max_new_tokens, tuple(config.rollout.stop)
        )
        self._ordinal = 0
        self._again: list[_Drawn] = []
        """Under way when the state was taken: to be started again."""
        self._open: dict[int, _Drawn] = {}
        self._finished: dict[int, Group] = {}
        self._replaced = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="training")

    def begin(self, step: int) -> None:
        """Nothing is under way, so many steps are over, and engines have their weights."""
        self.admission.resume(step)
        self.staleness.published(step)

    def take(self, step: int) -> tuple[list[Group], list[Group]]:
        """A step's groups, generated and scored: all that were drawn, and those that are to be trained.

        With dynamic sampling (arXiv:2503.14476) groups whose rewards do not differ are replaced by those of other
        prompts, `dynamic_sampling_rounds` times as many in a step as it has groups; then places stay empty.

        Raises:
            UserError: no sample has a reward.
        """
        self._fill(step)
        scoring = False
        while not self.admission.ready():
            if not scoring and self.experience.only_scoring:
                scoring = True
                self.tracker.event("phase", step=step, phase="score")
            self.experience.poll(WAIT_S)
            self._sort(step)
        taken = self.admission.take()
        left_out = [number for number in self._finished if number not in self._open and number not in taken]
        numbers = sorted([*taken, *left_out])
        groups = self.experience.compose([self._finished.pop(number) for number in numbers], learn=True)
        for number in taken:
            del self._open[number]
        self._replaced = 0
        accepted = [group for number, group in zip(numbers, groups, strict=True) if number in set(taken)]
        for group in accepted:
            self._drop(group, {})
        if not any(group.kept() for group in groups):
            raise no_reward_error(groups)
        return groups, accepted

    def beside(self, call: Callable[..., Any], *arguments: Any, step: int) -> Any:
        """What a call returns that blocks; groups go on meanwhile."""
        if not self.experience.under_way:
            return call(*arguments)
        result = self._thread.submit(call, *arguments)
        while not wait([result], TICK_S).done:
            self.experience.poll(0.0)
            self._sort(step)
        return result.result()

    def stale_shares(self, batch: Batch) -> dict[str, float]:
        """How old the tokens are that are to be trained, in versions. Raises as `Staleness.of`."""
        return self.staleness.shares(batch.version[batch.loss_mask])

    def trained(self, version: int | None) -> None:
        """The step is over; engines have this version, or none came of it."""
        if version is not None:
            self.staleness.published(version)
        self.admission.trained()

    def state_dict(self) -> dict[str, Any]:
        """Order of prompts, and what is under way."""
        drawn = [*self._again, *(self._open[number] for number in sorted(self._open))]
        return {
            "sampler": self.sampler.state_dict(),
            "ordinal": self._ordinal,
            "under_way": [vars(held) for held in drawn],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`: what was under way is generated again, with the same seeds."""
        self.sampler.load_state_dict(state["sampler"])
        self._ordinal = state["ordinal"]
        self._again = [_Drawn(**held) for held in state["under_way"]]

    def _fill(self, step: int) -> None:
        """Start as many groups as may start."""
        room = self.admission.room()
        drawn, self._again = self._again[:room], self._again[room:]
        rows = self.sampler.next(room - len(drawn))
        if rows:
            new = [self._draw(row) for row in rows]
            ids = spans(i for held in new for i in held.sample_ids)
            self.tracker.event("admitted", step=step, rows=rows, sample_ids=ids)
            drawn = [*drawn, *new]
        if not drawn:
            return
        per_step, samples = self.config.rl.prompts_per_step, self.config.rl.samples_per_prompt
        places = [divmod(held.ordinal, per_step) for held in drawn]
        seeds = [sample_seeds(self.config.seed, 1 + index, place, count=samples) for index, place in places]
        prompts = [self.prompts[held.row] for held in drawn]
        numbers = self.experience.ask(prompts, [held.sample_ids for held in drawn], seeds, self.settings)
        for number, held in zip(numbers, drawn, strict=True):
            self.admission.start(number)
            self._open[number] = held

    def _draw(self, row: int) -> _Drawn:
        self._ordinal += 1
        return _Drawn(self._ordinal - 1, int(row), self.ledger.admit(self.config.rl.samples_per_prompt))

    def _sort(self, step: int) -> None:
        """Accept the groups that have come, or replace them."""
        for number in [number for number in self.experience.done if number in self._open]:
            group = self._finished[number] = self.experience.done.pop(number)
            [judged] = self.experience.compose([group], learn=False)
            if judged.differs() or self.config.algorithm.dynamic_sampling_rounds == 0:
                self.admission.finish(number)
                if judged.kept():
                    self.passes.start(to_batch([judged]))
                continue
            self._drop(judged, dict.fromkeys(range(len(group.sample_ids)), "group_without_signal"))
            del self._open[number]
            most = self.config.algorithm.dynamic_sampling_rounds * self.config.rl.prompts_per_step
            self.admission.reject(number, replace=self._replaced < most)
            self._replaced += 1
        self._fill(step)

    def _drop(self, group: Group, reasons: dict[int, str]) -> None:
        for position, reason in (reasons | group.dropped()).items():
            self.ledger.drop([group.sample_ids[position]], reason)
