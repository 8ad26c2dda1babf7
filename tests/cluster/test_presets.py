"""Every preset learns a planted task on the real engine: answers full of the letter e.

One vLLM engine and one pool of reward functions serve all runs; policy, critic and reference are each run's own.
`pytest --thorough` runs three seeds instead of one.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.util.placement_group import placement_group, remove_placement_group

from actors.critic import CriticActor, CriticGroup, critic_config
from actors.group import Slots, WorkerGroup, rendezvous, start_all
from actors.policy import PolicyActor, PolicyGroup
from actors.reference import ReferenceActor, ReferenceGroup
from actors.reward_group import RewardGroup
from actors.reward_pool import RewardPool
from actors.rollout import RolloutActor, engine_environment
from actors.rollout_group import RolloutGroup
from engine.cluster import trainer_environment
from engine.config import Config
from engine.config_file import load_config
from engine.layout import roles_of
from engine.plan import prepare
from engine.presets import PRESETS
from engine.remote_checkpoints import checkpoints_of
from engine.roles import Sampling, Workers
from engine.schedule.placement import Seat
from engine.stages.loop import Loop
from engine.stages.rl import RLStage
from engine.stop_signals import StopSignals
from engine.tracking.incidents import IncidentLog
from engine.tracking.tracker import Tracker
from tests.conftest import thorough

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(300)]
STEPS = 24
COVERED = ("dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "cispo", "iterative_dpo")
"""Whose parts other presets train with; every preset's advantages and losses are tested one by one elsewhere."""
RISE = 0.4
"""Share of e that a run must gain, from its first step to the mean of its last four. It starts at about 0.04."""
OWN = ("advantage", "loss")
EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_algorithm.py"

CHANGES: dict[str, dict[str, Any]] = {
    # The KL of a whole sample is large beside a reward of at most 1.
    "ppo": {"algorithm": {"kl_coef": 0.0005}, "critic": {"learning_rate": 0.003}, "rl": {"minibatches_per_step": 2}},
    "rloo": {"algorithm": {"kl_coef": 0.0005}},
    "reinforce_pp": {"algorithm": {"kl_coef": 0.0005}},
    "reinforce_pp_baseline": {"algorithm": {"kl_coef": 0.001}},
    # Nearly all responses of a model with random weights are cut: the penalty must not be all that is learned.
    "dapo": {"algorithm": {"overlong_penalty": 0.05}},
    "iterative_dpo": {"rl": {"minibatches_per_step": 2}},
}


def merged(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    return {**base, **{k: merged(base[k], v) if isinstance(base.get(k), dict) else v for k, v in top.items()}}


@dataclass
class Served:
    """An engine and a pool that outlive a run."""

    raw: dict[str, Any]
    engines: WorkerGroup
    pool: WorkerGroup
    runs: int = 0

    def alarms(self) -> set[str]:
        """What the last run's alarms were."""
        file = Path(self.raw["output_dir"]) / f"run-{self.runs - 1}" / "events.jsonl"
        events = [json.loads(line) for line in file.read_text().splitlines()]
        return {event["alarm"] for event in events if event["kind"] == "alarm"}

    def train(self, algorithm: dict[str, Any], seed: int = 0, **changes: Any) -> list[dict[str, float]]:
        """A whole run; returns the metrics of its steps."""
        raw = merged(self.raw, changes | {"algorithm": algorithm, "seed": seed, "name": f"run-{self.runs}"})
        config = Config.model_validate(raw)
        plan = prepare(config)
        self.runs += 1
        with contextlib.ExitStack() as stack:
            tracker = Tracker(config)
            stack.callback(tracker.close, "succeeded")
            workers = self._workers(config, plan.updates, stack)
            stage = partial(RLStage, config, workers, tracker, plan)
            incidents = IncidentLog(tracker, stop_after=0)
            Loop(config, workers, stage, tracker, checkpoints_of(config), incidents, StopSignals()).run()
        rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
        return [row for row in rows if "reward/mean" in row]

    def _workers(self, config: Config, updates: int, stack: contextlib.ExitStack) -> Workers:
        groups = {}
        for role in roles_of(config):
            if role.name in ("policy", "critic", "reference"):
                slots = stack.enter_context(reserved())
                mine = critic_config(config) if role.name == "critic" else config
                info = [] if role.name == "reference" else [rendezvous(slots, 60)[0], updates]
                actor = {"policy": PolicyActor, "critic": CriticActor, "reference": ReferenceActor}[role.name]
                env = trainer_environment("cpu", 1)
                groups[role.name] = WorkerGroup(role.name, actor, slots, arguments=[(mine, *info)], env=env)
                stack.callback(groups[role.name].kill)
        start_all(list(groups.values()), 120)
        policy = PolicyGroup(config, groups["policy"])
        self.engines.call("reset", timeout_s=60)  # they hold another run's weights
        rollouts = RolloutGroup(config, self.engines, policy)
        reference = groups.get("reference")
        return Workers(
            policy=policy,
            critic=CriticGroup(critic_config(config), groups["critic"]) if "critic" in groups else None,
            reference=ReferenceGroup(config, reference, policy.hidden_size) if reference else None,
            sampling=Sampling(rollouts, RewardGroup(config, self.pool, {})),
        )


@contextlib.contextmanager
def reserved() -> Iterator[Slots]:
    placement = placement_group([{"CPU": 1}])
    assert placement.wait(60)
    yield Slots(placement, [Seat(0, {"CPU": 1})])
    remove_placement_group(placement)


@pytest.fixture(scope="module")
def served(tiny_model, tmp_path_factory, ray_session) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("presets")
    for name, high in (("rows", 0), ("bonus", 1)):
        rows = [{"prompt": f"{kind} {i}", "bonus": b} for i in range(8) for kind, b in (("plain", 0), ("rich", high))]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.py").write_text(
        "def share_of_e(completions, **columns):\n"
        "    return [text.count('e') / max(1, len(text)) for text in completions]\n\n\n"
        "def bonus(completions, bonus):\n"
        "    return bonus\n\n\n"
        "def variety(completions, **columns):\n"
        "    return [len(set(text)) / max(1, len(text)) for text in completions]\n\n\n"
        "def even_tokens(completions, completion_ids):\n"
        "    return [sum(i % 2 == 0 for i in ids) / max(1, len(ids)) for ids in completion_ids]\n"
    )
    task = f"{folder / 'task.py'}"
    raw = {
        "output_dir": str(folder / "runs"),
        "model": {"path": str(tiny_model)},
        "data": {"train": str(folder / "rows.jsonl")},
        "rewards": {
            "functions": [f"{task}:share_of_e", f"{task}:bonus"]
            + [{"function": f"{task}:{name}", "weight": 0} for name in ("variety", "even_tokens")]
        },
        "rl": {"steps": STEPS, "prompts_per_step": 8, "samples_per_prompt": 8},
        "optimizer": {"learning_rate": 0.01},
        "policy": {"tokens_per_microbatch": 2048},
        "rollout": {"max_new_tokens": 8, "max_model_len": 64, "kv_cache_gib": 0.03},
    }
    config = Config.model_validate(raw)
    with reserved() as first, reserved() as second:
        env = engine_environment("cpu", 1)
        engines = WorkerGroup("rollout", RolloutActor, first, arguments=[(config,)], env=env, concurrency=256)
        pool = WorkerGroup("rewards", RewardPool, second, arguments=[(config.rewards,)], env={}, concurrency=256)
        start_all([engines, pool], 120)
        yield Served(raw, engines, pool)
        pool.call("close", timeout_s=30)
        pool.kill()
        engines.kill()


def gain(steps: list[dict[str, float]]) -> float:
    shares = [step["reward/share_of_e/mean"] for step in steps]
    return float(np.mean(shares[-4:])) - shares[0]


@pytest.mark.parametrize("name", [*(p for p in PRESETS if p not in COVERED), *thorough(*COVERED)])
def test_a_preset_learns_the_planted_task(name, served, seeds):
    for seed in seeds:
        changes = dict(CHANGES.get(name, {}))
        steps = served.train({"name": name} | changes.pop("algorithm", {}), seed, **changes)
        print(f"{name}, seed {seed}: share of e {steps[0]['reward/share_of_e/mean']:.3f}, gain {gain(steps):.3f}")
        assert gain(steps) > RISE
        mismatches = [step["mismatch/logp_abs_max"] for step in steps if "mismatch/logp_abs_max" in step]
        assert bool(mismatches) == (PRESETS[name].get("loss") != "preference")
        assert max(mismatches, default=0.0) < 1e-3


def test_a_policy_that_games_its_reward_raises_the_alarms(served):
    """Paid for the letter e it says nothing else; what is only measured, the variety of its answers, falls."""
    steps = served.train({"name": "grpo"})
    assert steps[-1]["reward/variety/mean"] < 0.7 * steps[0]["reward/variety/mean"]
    assert "check_falls" in served.alarms()


def test_a_policy_that_learns_what_it_should_raises_none(served):
    task = served.raw["rewards"]["functions"][0].partition(":")[0]
    steps = served.train(
        {"name": "grpo"}, rewards={"functions": [f"{task}:even_tokens"]}, optimizer={"learning_rate": 0.003}
    )
    means = [step["reward/mean"] for step in steps]
    print([round(x, 2) for x in means])
    assert means[-1] > means[0] + 0.1
    assert served.alarms() == set()


def test_the_critic_explains_most_of_the_variance_of_the_returns(served):
    """Half of the prompts give one point more, whatever the answer: that is for the critic to find out."""
    steps = served.train(
        {"name": "ppo", "kl_coef": 0.0005},
        data={"train": served.raw["data"]["train"].replace("rows", "bonus")},
        rl={"minibatches_per_step": 4},
        optimizer={"learning_rate": 0.002},
        critic={"learning_rate": 0.003},
    )
    explained = [step["critic/explained_variance"] for step in steps]
    print([round(x, 2) for x in explained])
    assert explained[0] < 0.05, "a head of zeros explains nothing"
    assert np.mean(explained[-4:]) > 0.5
    assert gain(steps) > 0, "the policy learns too"


def test_an_algorithm_of_ones_own_learns_the_planted_task(served):
    config = load_config(EXAMPLE.with_suffix(".yaml"))
    own = {name: getattr(config.algorithm, name).replace("examples/", f"{EXAMPLE.parent}/") for name in OWN}
    assert all(place.startswith(str(EXAMPLE)) for place in own.values())
    assert len(EXAMPLE.read_text().splitlines()) < 30
    steps = served.train({"name": "grpo"} | own)
    assert gain(steps) > RISE
