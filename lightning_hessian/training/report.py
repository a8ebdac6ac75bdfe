"""What a finished run is told by: test accuracy and loss, and the trace of the Hessian."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_hessian.curvature import (
    BatchedHessianOperator,
    Estimate,
    higher_order,
    hutchinson_trace,
    select_parameters,
)
from lightning_hessian.state import evaluation_mode
from lightning_hessian.training.classifier import Classifier
from lightning_hessian.training.data import ImageData


@dataclass(frozen=True)
class Report:
    """The end of a run.

    Args:
        test_accuracy: share of the test images that are classified rightly.
        test_loss: mean cross-entropy on the test images.
        trace: tr(H) of the mean loss over ``trace_samples`` training images, in evaluation mode.
        trace_samples: how many images that were.
        robustness: what ``AdversarialAccuracy`` logged in the test, by name; empty where it was not asked for.
        directory: where the run left its files.
        tensorboard: whether there are events to look at.
    """

    test_accuracy: float
    test_loss: float
    trace: Estimate
    trace_samples: int
    robustness: dict[str, float]
    directory: Path
    tensorboard: bool

    def __str__(self) -> str:
        return "\n".join(
            [
                f"test accuracy   {self.test_accuracy:.4f}",
                f"test loss       {self.test_loss:.4f}",
                f"Hessian trace   {self.trace.estimate:.4g} +- {self.trace.standard_error:.2g} "
                f"({self.trace.matvecs} probes, {self.trace_samples} training images, evaluation mode)",
                *(f"{name.removeprefix('robust/'):<30}{value:.4f}" for name, value in self.robustness.items()),
                f"files           {self.directory}",
            ]
            + ([f"TensorBoard     {_TENSORBOARD} --logdir '{self.directory}'"] if self.tensorboard else [])
        )


# Of this environment, which need not be on the PATH.
_TENSORBOARD = shutil.which("tensorboard") or Path(sys.executable).with_name("tensorboard")


def hessian_trace(module: Classifier, data: ImageData, samples: int, probes: int, seed: int) -> Estimate:
    """tr(H) of the mean training loss by Hutchinson's method, in evaluation mode, on a fixed set of images."""
    batches = [
        (images.to(module.device), labels.to(module.device)) for images, labels in data.training_samples(samples)
    ]

    def loss(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        with higher_order(module):
            return module.loss(batch)

    with evaluation_mode(module.modules()):
        parameters = select_parameters(dict(module.named_parameters())).values()
        operator = BatchedHessianOperator(loss, parameters, batches, lambda batch: len(batch[1]))
        return hutchinson_trace(operator, probes, seed)


def report(trainer: Trainer, module: Classifier, data: ImageData, trace: Estimate, samples: int) -> Report:
    """Put together what ``trainer.test`` measured and the trace."""
    metrics = trainer.callback_metrics
    return Report(
        float(metrics["test/accuracy"]),
        float(metrics["test/loss"]),
        trace,
        min(samples, len(data.train_dataloader().dataset)),  # type: ignore[arg-type]
        {name: float(value) for name, value in metrics.items() if name.startswith("robust/")},
        Path(trainer.default_root_dir),
        isinstance(trainer.logger, TensorBoardLogger),
    )
