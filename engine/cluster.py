"""The run's cluster: Ray, one placement group for all roles, the worker groups. The only file that imports actors/.

What does not fit is an error that says what is missing, before anything starts; a placement group never waits for ever.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from actors.critic import CriticActor, CriticGroup, critic_config
from actors.environment import EnvironmentActor
from actors.group import ActorError, Arguments, Slots, Turns, WorkerGroup, rendezvous, start_all
from actors.model_server import ModelServerActor
from actors.policy import PolicyActor, PolicyGroup
from actors.reference import ReferenceActor, ReferenceGroup
from actors.reward_group import RewardGroup
from actors.reward_model import RewardModelActor, RewardModelGroup
from actors.reward_pool import RewardPool
from actors.reward_scorer import RewardScorerActor, RewardScorerGroup
from actors.rollout import RolloutActor, engine_environment
from actors.rollout_group import RolloutGroup
from actors.weight_transfer import Route
from engine.config import Config, RewardsConfig, UserError
from engine.layout import layout_of, scorer_role, server_role
from engine.roles import Record, Report, Sampling, Workers, unrecorded
from engine.schedule.placement import shortage

REMEDY = "add nodes, let roles share devices (placement.mode), or lower ranks, engines or ray.cpus_per_rank"
WAITING = 64
"""Calls of the controller that wait in an engine or the reward functions' process at the same time; others queue. Each
has a thread, which comes to hold about 50 KB for good."""
CLOSE_TIMEOUT_S = 3.0
JOIN_TIMEOUT_S = 10.0


@contextlib.contextmanager
def connected(stages: Sequence[Config]) -> Iterator[None]:
    """Join the configured cluster, or start one for these stages alone and end it afterwards.

    A program that has called `ray.init` itself keeps its own connection.

    Raises:
        UserError: the configured cluster cannot be reached.
    """
    if ray.is_initialized():
        yield
        return
    config = stages[0].ray
    address = config.address or os.environ.get("RAY_ADDRESS")
    earlier = _daemons()
    try:
        if address is None:
            store = config.object_store_gib
            need = max(sum(bundle["CPU"] for bundle in layout_of(stage).bundles) for stage in stages)
            ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, math.ceil(need)),  # a laptop's roles take turns on its cores
                object_store_memory=int(store * 2**30) if store else None,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        else:
            _join(address)
        yield
    finally:
        started = [process for daemon in _daemons() - earlier for process in _tree(daemon)]
        ray.shutdown()
        _end(started, _daemons() - earlier)


def _daemons() -> set[psutil.Process]:
    """Ray's own processes that this one has started; the cluster's workers and agents are below them."""
    return {child for child in psutil.Process().children() if child.name() in ("raylet", "gcs_server")}


def _tree(daemon: psutil.Process) -> list[psutil.Process]:
    """A process and everything below it."""
    try:
        return [daemon, *daemon.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _end(started: list[psutil.Process], survivors: set[psutil.Process]) -> None:
    """Kill what `ray.shutdown` leaves: it does not know of daemons whose start was interrupted half-way."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for daemon in survivors:
            daemon.suspend()  # it must not start another process once its tree is known
    for process in [process for daemon in survivors for process in _tree(daemon)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    for process in psutil.wait_procs(started, timeout=CLOSE_TIMEOUT_S)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _join(address: str) -> None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if host and port.isdigit():  # Ray itself would try for minutes
            socket.create_connection((host.strip("[]"), int(port)), JOIN_TIMEOUT_S).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"ray.address: no cluster answers at {address!r}: {error}; start one there, mend the address, or leave "
            "ray.address (and RAY_ADDRESS) out to run on this machine"
        ) from None


@contextlib.contextmanager
def started_workers(
    config: Config,
    *,
    updates: int,
    annotators: int = 0,
    route: Route | None = None,
    report: Report = lambda incident: None,
    record: Record = unrecorded,
) -> Iterator[Workers]:
    """Place and start every role of a stage, hand them over ready to use, and end them afterwards.

    `updates` is the stage's total of optimizer updates, `annotators` the number of a reward model's extra heads,
    `route` how weights reach the engines, if not as `Config.weight_route` says;
    `report` takes down who was lost and replaced, `record` what the engines' scheduler decided and when who worked.

    Raises:
        UserError: the cluster cannot hold the roles, or a user function does not load.
        ActorError: an actor failed to start.
    """
    config, route = _with_absolute_paths(config), route or config.weight_route
    with contextlib.ExitStack() as stack:
        crew = _Crew(config, stack.enter_context(_placed(config)), stack, report, record)
        if "rewards" in crew.slots:
            env = {"OMP_NUM_THREADS": "1"} | _started_servers(crew, stack)
            crew.make("rewards", RewardPool, [(config.rewards,)], env, concurrency=WAITING, replaceable=True)
            stack.callback(_close, crew.groups["rewards"])
            start_all([crew.groups["rewards"]], config.timeouts.start)
        if config.environment is not None and "environments" in crew.slots:
            own = [(config.environment,)] * config.environment.workers
            crew.make("environments", EnvironmentActor, own, {"OMP_NUM_THREADS": "1"}, concurrency=1024, restarts=-1)
            start_all([crew.groups["environments"]], config.timeouts.start)
        if "rollout" in crew.slots:
            env = engine_environment(config.device, config.rollout.threads)
            environments = crew.groups["environments"].actors if "environments" in crew.groups else []
            arguments = [(config, environments, route)] * config.rollout.engines
            crew.make("rollout", RolloutActor, arguments, env, concurrency=WAITING)
        if "reward_model" in crew.slots:
            crew.make_trained("reward_model", RewardModelActor, config, updates, annotators)
        else:
            warmup = config.critic.warmup_steps * config.updates_per_step if "critic" in crew.slots else 0
            crew.make_trained("policy", PolicyActor, config, updates - warmup, route)
        if "critic" in crew.slots:
            crew.make_trained("critic", CriticActor, critic_config(config), updates)
        if "reference" in crew.slots:
            env = trainer_environment(config.device, config.policy.threads)
            crew.make("reference", ReferenceActor, [(config,)] * config.reference.ranks, env, replaceable=True)
        for source in config.rewards.models if config.generates else []:
            env = trainer_environment(config.device, config.policy.threads)
            crew.make(scorer_role(source), RewardScorerActor, [(config, source)] * source.ranks, env, replaceable=True)
        started = ("rewards", "environments", *map(server_role, config.rewards.servers))
        start_all([group for name, group in crew.groups.items() if name not in started], config.timeouts.start)
        yield crew.workers(route)


def reward_pool(rewards: RewardsConfig) -> RewardPool:
    """Processes that run reward functions outside of a run, without Ray; the caller starts and closes them."""
    return RewardPool(rewards)


class _Crew:
    """The worker groups of a stage, made one by one."""

    def __init__(
        self,
        config: Config,
        slots: dict[str, Slots],
        stack: contextlib.ExitStack,
        report: Report,
        record: Record,
    ) -> None:
        self.config = config
        self.slots = slots
        self.groups: dict[str, WorkerGroup] = {}
        self._stack = stack
        self._report = report
        self._record = record
        self._turns: dict[str, Turns] = {}
        if config.placement.mode == "turns":
            for roles in layout_of(config).sharing:
                self._turns |= dict.fromkeys(roles, Turns(config.timeouts.publish))

    def make(
        self,
        name: str,
        actor_class: type,
        arguments: Arguments | Callable[[], Arguments],
        env: dict[str, str],
        *,
        concurrency: int = 1,
        restarts: int = 0,
        replaceable: bool = False,
    ) -> None:
        """A group whose actors get these arguments, rank by rank; it is killed at the end."""
        group = WorkerGroup(
            name,
            actor_class,
            self.slots[name],
            arguments=arguments,
            env=env,
            concurrency=concurrency,
            restarts=restarts,
            turns=self._turns.get(name),
            start_s=self.config.timeouts.start,
            silence_s=self.config.timeouts.silence,
            replaceable=replaceable,
            report=self._report,
            record=self._record,
        )
        self._stack.callback(group.kill)
        self.groups[name] = group

    def make_trained(self, name: str, actor_class: type, config: Config, *arguments: Any) -> None:
        """A group whose ranks train one model together."""

        def own() -> list[tuple[Any, ...]]:
            return [(config, info, *arguments) for info in rendezvous(self.slots[name], config.timeouts.start)]

        self.make(name, actor_class, own, trainer_environment(config.device, config.policy.threads))

    def workers(self, route: Route) -> Workers:
        """The groups, once they are started, as the stages see them."""
        config, groups = self.config, self.groups
        if "reward_model" in groups:
            trained = RewardModelGroup(config, groups["reward_model"])
            return Workers(reward_model=trained, rebuild=lambda name, all_trained: groups[name].rebuild())
        policy = PolicyGroup(config, groups["policy"])
        sampling = None
        if "rollout" in groups:
            scorers = {
                source.name: RewardScorerGroup(config, source, groups[scorer_role(source)], policy.hidden_size)
                for source in config.rewards.models
            }
            rewards = RewardGroup(config, groups.get("rewards"), scorers)
            sampling = Sampling(RolloutGroup(config, groups["rollout"], policy, route), rewards)

        def rebuild(name: str, all_trained: bool) -> None:
            trained = {"policy", "critic"} & groups.keys() if all_trained else set[str]()
            for group in trained | {name} - {"rollout"}:  # engines are replaced one by one
                groups[group].rebuild()
            if sampling is not None:
                sampling.rollouts.reset()
                sampling.rewards.reset()

        reference = groups.get("reference")
        return Workers(
            policy=policy,
            critic=CriticGroup(critic_config(config), groups["critic"]) if "critic" in groups else None,
            reference=ReferenceGroup(config, reference, policy.hidden_size) if reference else None,
            sampling=sampling,
            rebuild=rebuild,
        )


def trainer_environment(device: str, threads: int) -> dict[str, str]:
    """Environment of a training or scoring process."""
    env = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(threads)}
    if device == "cpu":
        env |= {"DS_ACCELERATOR": "cpu"}
    return env


@contextlib.contextmanager
def _placed(config: Config) -> Iterator[dict[str, Slots]]:
    """Reserve the bundles of the layout in one placement group; role -> where its ranks sit."""
    layout = layout_of(config)
    nodes = {node["NodeName"] + node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    if problem := shortage(layout, nodes):
        raise UserError(f"placement: {problem}; {REMEDY}")
    placement = placement_group(list(layout.bundles), strategy="PACK")
    try:
        if not placement.wait(config.timeouts.start):
            raise UserError(
                f"placement: the cluster did not free {_shown(layout.bundles)} within {config.timeouts.start:.0f} s; "
                f"free now: {_shown([ray.available_resources()])}; wait for other jobs, or {REMEDY}"
            )
        yield {role: Slots(placement, seats) for role, seats in layout.seats.items()}
    finally:
        remove_placement_group(placement)


def _shown(bundles: Sequence[Mapping[str, float]]) -> str:
    """Sum of resources that bundles name, in words."""
    names = dict.fromkeys(name for bundle in bundles for name in bundle if name.isidentifier() and "node" not in name)
    sums = {name: sum(bundle.get(name, 0.0) for bundle in bundles) for name in names}
    return ", ".join(f"{amount:g} {name}" for name, amount in sums.items()) or "nothing"


def _started_servers(crew: _Crew, stack: contextlib.ExitStack) -> dict[str, str]:
    """Start `rewards.servers`; the variables in which the reward functions find them."""
    config, found = crew.config, dict[str, str]()
    for server in config.rewards.servers:
        crew.make(server_role(server), ModelServerActor, [(config, server)], {})
        stack.callback(_close, crew.groups[server_role(server)])
    start_all([crew.groups[server_role(server)] for server in config.rewards.servers], config.timeouts.start)
    for server in config.rewards.servers:
        [(url, key)] = crew.groups[server_role(server)].call("address", timeout_s=config.timeouts.start)
        found |= {f"GNOMON_SERVER_{server.name.upper()}_URL": url, f"GNOMON_SERVER_{server.name.upper()}_KEY": key}
    return found


def _close(group: WorkerGroup) -> None:
    with contextlib.suppress(ActorError):  # it is killed next
        group.call("close", timeout_s=CLOSE_TIMEOUT_S)


def _with_absolute_paths(config: Config) -> Config:
    """Local paths made absolute: actors do not share the controller's working directory."""
    config = config.with_model_paths(_absolute)
    functions = [
        f.model_copy(update={"function": _absolute(f.function), "arguments": _absolute_within(f.arguments)})
        for f in config.rewards.functions
    ]
    environment = config.environment and config.environment.model_copy(
        update={
            "path": _absolute(config.environment.path),
            "arguments": _absolute_within(config.environment.arguments),
        }
    )
    own = {key: _absolute(getattr(config.algorithm, key)) for key in ("advantage", "loss")}
    return config.model_copy(
        update={
            "rewards": config.rewards.model_copy(update={"functions": functions}),
            "environment": environment,
            "algorithm": config.algorithm.model_copy(update=own),
        }
    )


def _absolute_within(value: Any) -> Any:
    """Arguments with every `file.py:name` in them from the root on."""
    if isinstance(value, dict):
        return {key: _absolute_within(held) for key, held in value.items()}
    if isinstance(value, list):
        return [_absolute_within(held) for held in value]
    return _absolute(value) if isinstance(value, str) and value.rpartition(":")[0].endswith(".py") else value


def _absolute(place: str) -> str:
    """A folder, or `file.py:name`, from the root on; other names as they are."""
    file, colon, name = place.rpartition(":")
    if file.endswith(".py"):
        return f"{Path(file).absolute()}{colon}{name}"
    return str(Path(place).absolute()) if place and Path(place).is_dir() else place
