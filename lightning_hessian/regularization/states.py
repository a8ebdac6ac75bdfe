"""What penalties keep from step to step, in the Trainer's checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_hessian.penalties import Penalty
from lightning_hessian.regularization.active_penalty import unique_names

_KEY = "lightning_hessian"


def save_states(penalties: Sequence[Penalty], checkpoint: dict[str, Any]) -> None:
    """Put the penalties' states into a checkpoint, by the names they have in logs."""
    states = {
        name: state
        for name, penalty in zip(unique_names(penalties), penalties, strict=True)
        if (state := penalty.state_dict())
    }
    if states:
        checkpoint[_KEY] = states


def states_in(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """The states that a checkpoint holds, by the penalties' names."""
    states: Mapping[str, Any] = checkpoint.get(_KEY, {})
    return states
