"""The learning rates of a Trainer's optimizers."""

from __future__ import annotations

from lightning.pytorch import Trainer


def learning_rates(trainer: Trainer) -> list[float]:
    """The present learning rate of each parameter group that has one, over all optimizers."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return [float(group["lr"]) for group in groups if group.get("lr") is not None]
