"""What is logged in training: names and values in one place."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lightning.pytorch import LightningModule
from torch import Tensor


def log_penalty(module: LightningModule, name: str, value: Tensor) -> None:
    """``curvature/<name>``: the raw value of a penalty, the mean over the ranks."""
    _log(module, f"curvature/{name}", value)


def log_added(module: LightningModule, added: Tensor | None, like: Tensor) -> None:
    """``train/penalty``: what was added to the loss, the mean over the ranks; None for nothing."""
    _log(module, "train/penalty", torch.zeros_like(like) if added is None else added)


def log_skipped(module: LightningModule, skipped: Mapping[str, int]) -> None:
    """``train/<name>_skipped``: on how many steps of the fit a penalty was left out because it was not finite."""
    for name, count in skipped.items():
        _log(module, f"train/{name}_skipped", float(count), reduce=False)


def log_strength(module: LightningModule, name: str | None, strength: float) -> None:
    """``train/strength``, or ``train/<name>_strength``: the present strength of a penalty whose strength adapts."""
    _log(module, "train/strength" if name is None else f"train/{name}_strength", strength, reduce=False)


def _log(module: LightningModule, name: str, value: Tensor | float, reduce: bool = True) -> None:
    several = reduce and module.trainer.world_size > 1
    # With the batch size given Lightning does not look for it, which a step that takes an iterator would not survive.
    module.log(name, value, on_step=True, on_epoch=False, sync_dist=several, batch_size=1)
