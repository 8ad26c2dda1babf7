"""The run's cluster: Ray, one placement group for all roles, the worker groups. The only file that imports actors/.

What does not fit is an error that says what is missing, before anything starts; a placement group never waits for ever.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from actors.group import ActorError, Slots, WorkerGroup, rendezvous, start_all
from actors.policy import PolicyActor, PolicyGroup
from actors.reference import ReferenceActor, ReferenceGroup
from actors.reward_group import RewardGroup
from actors.reward_model import RewardModelActor, RewardModelGroup
from actors.reward_pool import RewardPool
from actors.rollout import RolloutActor, RolloutGroup, engine_environment
from engine.config import Config, UserError
from engine.roles import Sampling, Workers

CLOSE_TIMEOUT_S = 3.0
JOIN_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Role:
    """How many ranks a role has and what each reserves."""

    name: str
    ranks: int
    resources: dict[str, float]


def roles_of(config: Config) -> list[Role]:
    """The roles that a stage starts, in the order of their bundles."""
    cpu = {"CPU": config.ray.cpus_per_rank}
    model = cpu | ({"GPU": 1.0} if config.device == "cuda" else {})
    if config.stage == "reward_model":
        return [Role("reward_model", config.policy.ranks, model)]
    roles = [Role("policy", config.policy.ranks, model)]
    if config.stage == "rl" and config.algorithm.kl_coef > 0 and not config.trains_adapter:
        roles.append(Role("reference", config.reference.ranks, model))
    if config.generates:
        pool = {"CPU": config.ray.cpus_per_rank * config.rewards.workers}
        roles += [Role("rollout", config.rollout.engines, model), Role("rewards", 1, pool)]
    return roles


def required(roles: list[Role]) -> dict[str, float]:
    """Sum of what the roles reserve."""
    total: dict[str, float] = {}
    for role in roles:
        for resource, amount in role.resources.items():
            total[resource] = total.get(resource, 0.0) + amount * role.ranks
    return total


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
            need = max(required(roles_of(stage))["CPU"] for stage in stages)
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
def started_workers(config: Config, *, updates: int, annotators: int = 0) -> Iterator[Workers]:
    """Place and start every role of a stage, hand them over ready to use, and end them afterwards.

    `updates` is the stage's total of optimizer updates, `annotators` the number of a reward model's extra heads.

    Raises:
        UserError: the cluster cannot hold the roles, or a user function does not load.
        ActorError: an actor failed to start.
    """
    config = _with_absolute_paths(config)
    with contextlib.ExitStack() as stack:
        slots = stack.enter_context(_placed(config))
        timeout_s = config.timeouts.start

        def make(
            name: str, actor_class: type, arguments: list[tuple[Any, ...]], env: dict[str, str], concurrency: int = 1
        ) -> WorkerGroup:
            group = WorkerGroup(name, actor_class, slots[name], arguments=arguments, env=env, concurrency=concurrency)
            stack.callback(group.kill)
            return group

        pool = engines = reference = None
        if "rollout" in slots:
            pool = make("rewards", RewardPool, [(config.rewards,)], {"OMP_NUM_THREADS": "1"}, concurrency=256)
            env = engine_environment(config.device, config.rollout.threads)
            served = [(config,)] * config.rollout.engines
            engines = make("rollout", RolloutActor, served, env, concurrency=1024)
            stack.callback(_close_pool, pool)
            start_all([pool], timeout_s)
        trained_name = "policy" if "policy" in slots else "reward_model"
        infos = rendezvous(slots[trained_name], config.timeouts.place)
        env = trainer_environment(config.device, config.policy.threads)
        if trained_name == "policy":
            trained = make("policy", PolicyActor, [(config, info, updates) for info in infos], env)
        else:
            heads = [(config, info, updates, annotators) for info in infos]
            trained = make("reward_model", RewardModelActor, heads, env)
        if "reference" in slots:
            env = trainer_environment(config.device, config.reference.threads)
            reference = make("reference", ReferenceActor, [(config,)] * config.reference.ranks, env)
        start_all([group for group in (engines, trained, reference) if group], timeout_s)
        if trained_name == "reward_model":
            yield Workers(reward_model=RewardModelGroup(config, trained))
            return
        policy = PolicyGroup(config, trained)
        sampling = None
        if engines is not None and pool is not None:
            sampling = Sampling(RolloutGroup(config, engines, policy), RewardGroup(config, pool))
        frozen = ReferenceGroup(config, reference, policy.hidden_size) if reference else None
        yield Workers(policy=policy, reference=frozen, sampling=sampling)


def trainer_environment(device: str, threads: int) -> dict[str, str]:
    """Environment of a training or scoring process."""
    env = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(threads)}
    if device == "cpu":
        env |= {"DS_ACCELERATOR": "cpu"}
    return env


@contextlib.contextmanager
def _placed(config: Config) -> Iterator[dict[str, Slots]]:
    """Reserve a bundle for every rank of every role in one placement group."""
    roles = roles_of(config)
    _check_fits(roles)
    bundles = [role.resources for role in roles for _ in range(role.ranks)]
    placement = placement_group(bundles, strategy="PACK")
    try:
        if not placement.wait(config.timeouts.place):
            raise UserError(
                f"ray: the cluster did not free {_shown(required(roles))} within {config.timeouts.place:.0f} s; "
                f"free now: {_shown(ray.available_resources())}; "
                "wait for other jobs, or lower ranks, engines or ray.cpus_per_rank"
            )
        firsts = [sum(r.ranks for r in roles[:i]) for i in range(len(roles))]
        yield {r.name: Slots(placement, first, r.ranks, r.resources) for r, first in zip(roles, firsts, strict=True)}
    finally:
        remove_placement_group(placement)


def _check_fits(roles: list[Role]) -> None:
    have, need = ray.cluster_resources(), required(roles)
    short = {r: amount for r, amount in need.items() if have.get(r, 0.0) < amount}
    if short:
        table = ", ".join(f"{role.name}: {role.ranks} x {_shown(role.resources)}" for role in roles)
        raise UserError(
            f"ray: the run needs {_shown(need)} ({table}) but the whole cluster has {_shown(have)}; "
            "add nodes, or lower ranks, engines or ray.cpus_per_rank"
        )


def _shown(resources: dict[str, float]) -> str:
    return ", ".join(f"{resources[name]:g} {name}" for name in ("CPU", "GPU") if name in resources) or "nothing"


def _close_pool(pool: WorkerGroup) -> None:
    with contextlib.suppress(ActorError):  # it is killed next
        pool.call("close", timeout_s=CLOSE_TIMEOUT_S)


def _with_absolute_paths(config: Config) -> Config:
    """Local paths made absolute: actors do not share the controller's working directory."""
    model = config.model.model_copy(update={"path": _absolute(config.model.path)})
    distill = config.distill.model_copy(update={"teacher": _absolute(config.distill.teacher)})
    functions = []
    for entry in config.rewards.functions:
        file, colon, name = entry.function.rpartition(":")
        if file.endswith(".py"):
            entry = entry.model_copy(update={"function": f"{Path(file).absolute()}{colon}{name}"})
        functions.append(entry)
    rewards = config.rewards.model_copy(update={"functions": functions})
    return config.model_copy(update={"model": model, "distill": distill, "rewards": rewards})


def _absolute(path: str) -> str:
    return str(Path(path).absolute()) if path and Path(path).is_dir() else path
