"""The course of a run, epoch by epoch, and the time of its steps, for its results."""

from __future__ import annotations

import math
import time
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer


class _Kept(Callback):
    """Keeps some attributes in checkpoints, so a resumed run has what was before."""

    kept: ClassVar[tuple[str, ...]] = ()
    _is_fitting = False

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._is_fitting:  # a checkpoint loaded for testing has what was until then
            self.restore(state_dict)

    def restore(self, state: dict[str, Any]) -> None:
        """Take the attributes from a state."""
        for name, value in state.items():
            setattr(self, name, value)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._is_fitting = stage == "fit"


class StepTimer(_Kept):
    """Measures the time of training steps. It must be the first of the callbacks, so as not to measure the others.

    Attributes:
        seconds: in training steps.
        steps: number of batches in them.
    """

    kept = ("seconds", "steps")

    def __init__(self) -> None:
        self.seconds = 0.0
        self.steps = 0
        self._started = 0.0

    @property
    def seconds_per_step(self) -> float | None:
        """None without a step."""
        return self.seconds / self.steps if self.steps else None

    def on_train_batch_start(self, *_: Any) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self._started
        self.steps += 1


class History(_Kept):
    """Keeps every metric after each epoch, and the initial learning rate.

    Attributes:
        epochs: for each epoch its number from 1 on, the optimizer steps until then, and the metrics by name.
        learning_rate: the largest of all parameter groups at the start; None without an optimizer.
    """

    kept = ("epochs", "learning_rate")

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []
        self.learning_rate: float | None = None
        self._validated = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        rates = [float(group.get("initial_lr", group["lr"])) for group in groups if "lr" in group]
        if self.learning_rate is None:
            self.learning_rate = max(rates, default=None)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = {name: float(value) for name, value in trainer.callback_metrics.items() if not _is_of_training(name)}
        if not self._validated:  # Lightning still has the last validation's metrics
            found = {name: value for name, value in found.items() if not name.startswith("val")}
        self.epochs.append({"epoch": trainer.current_epoch + 1, "step": trainer.global_step, **_finite(found)})

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated = False
        self._take_training_metrics(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._take_training_metrics(trainer)

    def _take_training_metrics(self, trainer: Trainer) -> None:
        """Lightning has an epoch's training metrics only after `on_train_epoch_end`."""
        if self.epochs:
            found = {name: float(value) for name, value in trainer.callback_metrics.items() if _is_of_training(name)}
            self.epochs[-1].update(_finite(found))


def _is_of_training(name: str) -> bool:
    return name.startswith("train")


def _finite(metrics: dict[str, float]) -> dict[str, float]:
    """JSON has no NaN."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
