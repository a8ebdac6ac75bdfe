"""Strengths of the settings: numbers, strengths that adapt, and ``auto``, which is chosen before training."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import hydra
import lightning as L
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningDataModule, LightningModule
from omegaconf import DictConfig, ListConfig

from lightning_hessian.cli.classifier import Classifier
from lightning_hessian.cli.in_memory import InMemoryData
from lightning_hessian.cli.user_errors import Diverged
from lightning_hessian.regularization.adaptive import Adaptive
from lightning_hessian.regularization.curvature_budget import CurvatureBudget
from lightning_hessian.regularization.gradient_share import GradientShare
from lightning_hessian.regularization.suggest import suggest_strength
from lightning_hessian.step.isolation import random_state_kept

AUTO = "auto"
"""As a strength: choose one before training."""
ADAPTIVE: dict[str, Callable[[float], Adaptive]] = {
    "share": GradientShare,
    "trace": lambda target: CurvatureBudget(trace=target),
    "stability": lambda target: CurvatureBudget(stability=target),
}
"""As a strength, with a colon and a number behind it, such as share:0.1: strengths that adapt in training."""
AUTO_BATCHES = 4
"""Number of training batches used to suggest a strength."""
AUTO_STEPS = 100
"""Minimum number of unpenalized training steps between two suggestions."""


def regularizer_of(settings: DictConfig) -> Any:
    """The callback, with strength 0 in place of ``auto``."""
    strength = _strength(settings.get("strength"))
    if not any(isinstance(one, Adaptive) for one in (strength if isinstance(strength, list) else [strength])):
        return hydra.utils.instantiate(settings, strength=strength)
    # Not through `instantiate`, which takes no objects.
    return hydra.utils.instantiate(settings, strength=0.0, _partial_=True)(strength=strength)


def _strength(asked: Any) -> Any:
    """A strength of the settings: a number, ``auto``, one that adapts, or a list of these."""
    if isinstance(asked, ListConfig):
        return [_strength(one) for one in asked]
    if asked == AUTO:
        return 0.0
    kind, colon, number = asked.partition(":") if isinstance(asked, str) else ("", "", "")
    if not colon and asked not in ADAPTIVE:
        return asked
    try:
        return ADAPTIVE[kind](float(number))
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"strength={asked!r} is none of share:0.1 (the penalty's share of the gradient, in (0, 1]), trace:10 or "
            "stability:0.5 (targets for the curvature, positive)."
        ) from error


def choose_strengths(
    settings: DictConfig, regularizer: Any, module: LightningModule, data: LightningDataModule, trainer: Any
) -> None:
    """Replace each ``auto`` strength by a number, in the callback and in the settings.

    The number is the lowest suggestion while a copy of the model trains without a penalty, so the penalty's share of
    the gradient stays within the requested share along the way. The initial weights alone do not suffice: input
    derivatives there are 100 to 1,000 times smaller than soon after (0 for the vision transformer), and a strength
    that fits them destroys training. A job of a sweep that goes on starts from the same weights and chooses the same
    number; ``resume=`` takes the number that was chosen.

    Raises:
        ValueError: the module or the data are not the command line's own.
        Diverged: training without a penalty diverges.
    """
    asked = settings.get("strength")
    each = list(asked) if isinstance(asked, ListConfig) else [asked] * len(regularizer.penalties)
    if AUTO not in each:
        return
    if not isinstance(module, Classifier) or not isinstance(data, InMemoryData):
        raise ValueError(
            "strength=auto trains a copy of the command line's own classifier on its own data. For a "
            "LightningModule or a LightningDataModule of yours take share:0.1, or call suggest_strength in Python."
        )
    data.prepare_data()
    data.setup("fit")
    if trainer.world_size == 1:  # processes forked later cannot use a GPU that this process has initialized
        module.to(trainer.strategy.root_device)
    penalties = {i: penalty for i, penalty in enumerate(regularizer.penalties) if each[i] == AUTO}
    with random_state_kept(module.device):
        suggestions = [
            {i: suggest_strength(snapshot, data.training_batches(AUTO_BATCHES), p) for i, p in penalties.items()}
            for snapshot in _unpenalized_training(module, data, trainer)
        ]
    for i, penalty in penalties.items():
        lowest = min((suggestion[i] for suggestion in suggestions), key=float)
        each[i] = lowest.strength
        if trainer.is_global_zero:
            print(
                f"strength            {lowest.strength:.4g} ({lowest.low:.2g} to {lowest.high:.2g} over "
                f"{len(lowest.by_batch)} batches), where the gradient of {penalty.name} is "
                f"{100 * lowest.share:.3g} % of the task loss's"
            )
    settings.strength = each if isinstance(regularizer.penalty, Sequence) else each[0]
    regularizer.strength = _strength(settings.strength)


def _unpenalized_training(module: Classifier, data: InMemoryData, trainer: L.Trainer) -> Iterator[Classifier]:
    """Train a copy without a penalty, and yield it after each epoch, or each ``AUTO_STEPS`` steps if that is longer.

    Stops once the mean loss of such a part is below half the first loss, or when the run's epochs or steps are used up.
    """
    twin = copy.deepcopy(module)
    epoch = len(data.train_dataloader())
    part = max(AUTO_STEPS, epoch)
    ends = [end for end in ((trainer.max_epochs or 0) * epoch, trainer.max_steps) if end > 0]
    parts = max(1, min(ends, default=0) // part)
    optimizer = twin.optimizer()
    schedule = twin.schedule(optimizer, parts * part)
    batches = data.training_batches(parts * part)
    first: float | None = None
    for _ in range(parts):
        losses: list[float] = []
        for batch in islice(batches, part):
            optimizer.zero_grad()
            loss = twin.training_loss(*twin.logits_and_targets(move_data_to_device(batch, module.device)))
            loss.backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise Diverged(
                    f"the training loss is {losses[-1]} without a penalty: training has diverged, so no strength can "
                    "be chosen for regularizer.strength=auto. Lower optimizer.lr."
                )
        yield twin
        first = losses[0] if first is None else first
        if statistics.mean(losses) < first / 2:
            return
