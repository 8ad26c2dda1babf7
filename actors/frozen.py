"""What models that are only asked share: loaded once, on as many ranks as wanted, off the device while others work."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import nn

from actors.group import WorkerGroup
from actors.process import offloads
from actors.split import Split
from engine.config import Config
from engine.data.batch import Batch


class FrozenActor(ABC):
    """One data-parallel copy of a frozen model."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.device = torch.device(config.device)

    def start(self) -> None:
        """Load the model."""
        self.module = self.make().to(self.device).requires_grad_(False).eval()

    @abstractmethod
    def make(self) -> nn.Module:
        """The module that is asked."""

    def sleep(self) -> None:
        """Leave the device's memory to others until `wake`."""
        if offloads(self.config):
            self.module.to("cpu")

    def wake(self) -> None:
        """Return to the device."""
        if offloads(self.config):
            self.module.to(self.device)


class FrozenGroup:
    """The controller's side: splits batches over the copies."""

    def __init__(self, config: Config, workers: WorkerGroup, hidden_size: int) -> None:
        self.config = config
        self.workers = workers
        self.hidden_size = hidden_size

    def split(self, batch: Batch) -> Split:
        """A batch over the copies."""
        return Split.of(
            batch,
            ranks=len(self.workers.actors),
            token_budget=self.config.policy.tokens_per_microbatch,
            hidden_size=self.hidden_size,
        )
