"""The curvature of the training loss at the end of a run."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor

from lightning_hessian.cli.classifier import Classifier
from lightning_hessian.cli.in_memory import InMemoryData
from lightning_hessian.curvature import select_parameters
from lightning_hessian.monitoring.measurement import Curvature, Measurement, MeasurementConfig, fixed_batches
from lightning_hessian.step.batches import samples_in
from lightning_hessian.step.lightning_loop import LightningLoop

LANCZOS = 20
"""Lanczos steps, each one Hessian-vector product, for the largest eigenvalue."""


def measure(
    trainer: Trainer,
    module: LightningModule,
    data: LightningDataModule,
    samples: int,
    probes: int,
    seed: int,
    learning_rate: float | None,
) -> tuple[Curvature, int, float]:
    """The curvature of the mean loss over training samples, in evaluation mode; their number; and the mean loss.

    The loss is the cross-entropy of a classifier, and the training step's of any other module. The samples are the
    first ones in the order of the data (of another data module: the first batches that it gives to a training).
    """
    batches = _batches(module, data, samples, seed)
    config = MeasurementConfig(
        probes=probes,
        eigenvalues=1,
        iterations=LANCZOS,
        density_runs=0,
        layers={},
        spaces={},
        seed=seed,
        relative=True,
    )
    measurement = Measurement(
        LightningLoop(trainer, module),
        module,
        batches=batches,
        parameters=select_parameters(dict(module.named_parameters())),
        config=config,
        training_mode=False,
        loss=_cross_entropy if isinstance(module, Classifier) else None,
    )
    curvature, _ = measurement.measure(trainer.global_step, learning_rate)
    sizes = [samples_in(batch) or 1 for batch in batches]
    mean = sum(size * x for size, x in zip(sizes, measurement.losses(), strict=True)) / sum(sizes)
    return curvature, sum(sizes), mean


def _cross_entropy(module: Any, batch: Any) -> Tensor:
    return module.loss(batch)


def _batches(module: LightningModule, data: LightningDataModule, samples: int, seed: int) -> list[Any]:
    if isinstance(data, InMemoryData):
        return [(x.to(module.device), y.to(module.device)) for x, y in data.training_samples(samples)]
    loader = data.train_dataloader()
    (first,) = fixed_batches(module, loader, 1, seed)
    return fixed_batches(module, loader, math.ceil(samples / (samples_in(first) or 1)), seed)
