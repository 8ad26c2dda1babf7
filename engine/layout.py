"""Which roles a stage starts and who sits where, from its configuration alone: no Ray, no actors."""

from __future__ import annotations

from typing import get_args

from engine.config import Config, DeviceRole, ModelRewardConfig, ServerConfig
from engine.schedule.placement import Layout, Role, lay_out


def roles_of(config: Config) -> list[Role]:
    """The roles that a stage starts."""
    cpus = config.ray.cpus_per_rank

    def model(name: str, ranks: int) -> Role:
        return Role(name, ranks, cpus, on_device=True)

    if config.stage == "reward_model":
        return [model("reward_model", config.policy.ranks)]
    roles = [model("policy", config.policy.ranks)]
    if config.stage == "rl" and config.algorithm.needs_critic:
        roles.append(model("critic", config.critic.ranks))
    if config.stage == "rl" and config.compares_with_start and not config.trains_adapter:
        roles.append(model("reference", config.reference.ranks))
    if config.generates:
        roles += [model(scorer_role(source), source.ranks) for source in config.rewards.models]
        roles += [model(server_role(source), 1) for source in config.rewards.servers]
        roles.append(model("rollout", config.rollout.engines))
        if config.environment is not None:
            roles.append(Role("environments", config.environment.workers, cpus, on_device=False))
        if config.rewards.functions:
            roles.append(Role("rewards", 1, cpus * config.rewards.workers, on_device=False))
    return roles


def layout_of(config: Config) -> Layout:
    """Who sits where, by `placement`."""
    placement = config.placement
    scorers = [scorer_role(source) for source in config.rewards.models]
    groups = [
        [name for role in group for name in (scorers if role == "reward_model" else [role])]
        for group in placement.groups or [list(get_args(DeviceRole))]  # a model server never leaves its device
    ]
    device = placement.device or ("GPU" if config.device == "cuda" else None)
    return lay_out(roles_of(config), mode=placement.mode, groups=groups, device=device)


def scorer_role(source: ModelRewardConfig) -> str:
    """Name of the role that a reward model plays."""
    return f"reward_model/{source.name}"


def server_role(source: ServerConfig) -> str:
    """Name of the role of a language model that judges ask."""
    return f"server/{source.name}"
