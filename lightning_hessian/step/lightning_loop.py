"""Lightning's Trainer as a training loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor

from lightning_hessian.step.learning_rates import learning_rates
from lightning_hessian.step.loop import Sharding


@dataclass(frozen=True)
class LightningLoop:
    """The Trainer of a LightningModule as a :class:`~lightning_hessian.step.loop.TrainingLoop`.

    Args:
        trainer: the Trainer.
        module: the module that it trains.
    """

    trainer: Trainer
    module: LightningModule

    @property
    def is_training(self) -> bool:
        return bool(self.trainer.training)

    @property
    def global_step(self) -> int:
        return self.trainer.global_step

    @property
    def batches_before(self) -> int:
        return self.trainer.fit_loop.total_batch_idx

    @property
    def is_automatic(self) -> bool:
        return self.module.automatic_optimization

    @property
    def ends_optimizer_step(self) -> bool:
        return not (self.is_automatic and self.trainer.fit_loop.epoch_loop._should_accumulate())

    @property
    def precision(self) -> str:
        return str(self.trainer.precision)

    @property
    def gradient_scale(self) -> float | None:
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return None if scaler is None else float(scaler.get_scale())

    @property
    def sharding(self) -> Sharding | None:
        strategy = self.trainer.strategy
        if not isinstance(strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
            return None
        return Sharding(type(strategy).__name__, in_graph=isinstance(strategy, ModelParallelStrategy))

    @property
    def rank(self) -> int:
        return self.trainer.global_rank

    @property
    def world_size(self) -> int:
        return self.trainer.world_size

    @property
    def synchronizes_gradients(self) -> bool:
        return bool(getattr(self.trainer.strategy.model, "require_backward_grad_sync", False))

    @property
    def has_static_graph(self) -> bool:
        return bool(getattr(self.trainer.strategy, "_ddp_kwargs", {}).get("static_graph"))

    @property
    def learning_rates(self) -> list[float]:
        return learning_rates(self.trainer)

    @property
    def callbacks(self) -> Sequence[object]:
        return self.trainer.callbacks  # type: ignore[attr-defined]

    @property
    def loggers(self) -> Sequence[Any]:
        return self.trainer.loggers

    def autocast_dtype(self, kind: str) -> torch.dtype | None:
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        # Lightning's context sets the default dtype of float64 or bfloat16 training.
        kind = self.module.device.type
        with self.trainer.precision_plugin.train_step_context(), torch.autocast(kind, enabled=False):
            yield

    def mean(self, tensor: Tensor) -> Tensor:
        # Lightning reduces in place.
        return tensor if self.world_size == 1 else self.trainer.strategy.reduce(tensor.clone(), reduce_op="mean")

    def total(self, tensor: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(tensor, reduce_op="sum")

    def all(self, condition: bool) -> bool:
        return condition if self.world_size == 1 else self.trainer.strategy.reduce_boolean_decision(condition, all=True)

    def log(self, name: str, value: Tensor | float, reduce: bool) -> None:
        several = reduce and self.world_size > 1
        # With the batch size given Lightning does not look for it, which a step that takes an iterator would not
        # survive.
        self.module.log(name, value, on_step=True, on_epoch=False, sync_dist=several, batch_size=1)

    def report(self, scalars: Mapping[str, float], step: int) -> None:
        self.trainer.callback_metrics.update({name: torch.tensor(value) for name, value in scalars.items()})
        for logger in self.trainer.loggers:
            logger.log_metrics(dict(scalars), step=step)
