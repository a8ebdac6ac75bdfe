"""What is logged in training: names and values in one place."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_hessian.step.loop import TrainingLoop

ADDED = "train/penalty"
"""What the penalties have added to the loss."""


def log_penalty(loop: TrainingLoop, name: str, value: Tensor) -> None:
    """``curvature/<name>``: the raw value of a penalty, the mean over the ranks."""
    loop.log(f"curvature/{name}", value, reduce=True)


def log_added(loop: TrainingLoop, added: Tensor | None, like: Tensor) -> None:
    """``train/penalty``: what was added to the loss, the mean over the ranks; None for nothing."""
    loop.log(ADDED, torch.zeros_like(like) if added is None else added, reduce=True)


def log_skipped(loop: TrainingLoop, skipped: Mapping[str, int]) -> None:
    """``train/<name>_skipped``: on how many steps of the fit a penalty was left out because it was not finite."""
    for name, count in skipped.items():
        loop.log(f"train/{name}_skipped", float(count), reduce=False)


def log_strength(loop: TrainingLoop, name: str | None, strength: float) -> None:
    """``train/strength``, or ``train/<name>_strength``: the present strength of a penalty whose strength adapts."""
    loop.log("train/strength" if name is None else f"train/{name}_strength", strength, reduce=False)
