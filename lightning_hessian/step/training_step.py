"""Call a module's own training step outside of the Trainer's loop."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature


def training_step(module: Any, batch: Any, index: int) -> Any:
    """Call the module's ``training_step``, with the batch index if it takes one."""
    if is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2):
        return module.training_step(batch, index)
    return module.training_step(batch)
