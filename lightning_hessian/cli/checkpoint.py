"""Validate a checkpoint before a run resumes from it."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

_KEYS = ("state_dict", "loops", "optimizer_states", "lr_schedulers", "pytorch-lightning_version")


def check_checkpoint(path: str, module: nn.Module) -> None:
    """Check that Lightning can resume training this module from the file.

    Raises:
        ValueError: the file does not exist, is damaged, is not a checkpoint of Lightning's Trainer, or holds the
            weights of another model.
    """
    state = read_checkpoint(path).get("state_dict")
    expected = {name: tensor.shape for name, tensor in module.state_dict().items()}
    found = {name: tensor.shape for name, tensor in state.items()} if isinstance(state, dict) else {}
    for name in [*expected, *found]:
        if expected.get(name) != found.get(name):
            here, there = (
                f"has {name!r} of shape {tuple(shapes[name])}" if name in shapes else f"has no {name!r}"
                for shapes in (expected, found)
            )
            raise ValueError(
                f"resume={path}: the checkpoint is of another model. It {there}, and the model here {here}. Use the "
                "model and data settings of the run that wrote it; they are in its config.yaml."
            )


def is_readable(path: Path) -> bool:
    """Whether the file is a whole checkpoint of Lightning's Trainer."""
    try:
        read_checkpoint(str(path))
    except ValueError:
        return False
    return True


def read_checkpoint(path: str) -> dict[str, Any]:
    """The contents of a checkpoint of Lightning's Trainer.

    Raises:
        ValueError: the file does not exist, is damaged, or is something else.
    """
    if not Path(path).exists():
        raise _checkpoint_error(path, "there is no such checkpoint")
    if not zipfile.is_zipfile(path):
        raise _checkpoint_error(path, "is not a checkpoint, or is cut off")
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True)
    except Exception as error:  # torch.load raises many types on a foreign or damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise _checkpoint_error(path, f"is not a checkpoint that can be read ({reason[:100]})") from error
    missing = [key for key in _KEYS if key not in checkpoint] if isinstance(checkpoint, dict) else list(_KEYS)
    if missing:
        raise _checkpoint_error(path, f"is not a checkpoint of Lightning's Trainer: it has no {', '.join(missing)}")
    return checkpoint


def _checkpoint_error(path: str, problem: str) -> ValueError:
    return ValueError(f"resume={path}: {problem}. A run writes its checkpoint to checkpoints/last.ckpt.")
