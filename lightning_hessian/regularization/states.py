"""What penalties and their strengths keep from step to step, in the Trainer's checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_hessian.regularization.active_penalty import FitPenalty

_KEY = "lightning_hessian"
_STRENGTHS = "lightning_hessian_strengths"

States = Mapping[str, Mapping[str, Any]]
"""The states of the penalties and of their strengths, each by the penalties' names."""


def save_states(penalties: Sequence[FitPenalty], checkpoint: dict[str, Any]) -> None:
    """Put the states of penalties and strengths into a checkpoint, by the names they have in logs."""
    states = {one.name: state for one in penalties if (state := one.penalty.state_dict())}
    strengths: dict[str, Any] = {one.name: dict(kept) for one in penalties if (kept := one.strength_to_keep)}
    for key, found in ((_KEY, states), (_STRENGTHS, strengths)):
        if found:
            checkpoint[key] = found


def states_in(checkpoint: Mapping[str, Any]) -> States:
    """The states that a checkpoint holds."""
    return {"penalties": checkpoint.get(_KEY, {}), "strengths": checkpoint.get(_STRENGTHS, {})}


def load_states(one: FitPenalty, states: States) -> None:
    """Let a penalty and its strength go on from their states; what has no state starts anew."""
    one.penalty.load_state_dict(states.get("penalties", {}).get(one.name, {}))
    one.strength_state = states.get("strengths", {}).get(one.name, {})
    if one.control is not None:
        one.control.load_state_dict(one.strength_state)
