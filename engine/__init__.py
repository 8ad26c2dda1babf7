"""Gnomon: a Ray-based distributed RLHF engine. Decides what runs, in which order, on which data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine.config_file import load_config
from engine.environments.contract import Environment, Turn
from engine.rewards.contract import Sample, reward

if TYPE_CHECKING:
    from engine.pipeline import run

__all__ = ["Environment", "Sample", "Turn", "load_config", "reward", "run"]


def __getattr__(name: str) -> Any:
    """`run` brings in torch and Ray, so it is imported at its first use."""
    if name == "run":
        from engine.pipeline import run

        return run
    raise AttributeError(f"module 'engine' has no attribute {name!r}")
