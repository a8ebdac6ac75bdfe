"""What a finished run is told by: test accuracy and loss, and the curvature of the training loss."""

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
    extreme_eigenvalues,
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
        trace: tr(H) of the mean loss over ``images`` training images, in evaluation mode.
        largest_eigenvalue: of the same H.
        residual: how far from it there is an eigenvalue at most.
        learning_rate: eta, at its height.
        images: how many training images that were.
        robustness: what ``AdversarialAccuracy`` logged in the test, by name; empty where it was not asked for.
        directory: where the run left its files.
        tensorboard: whether there are events to look at.
    """

    test_accuracy: float
    test_loss: float
    trace: Estimate
    largest_eigenvalue: float
    residual: float
    learning_rate: float
    images: int
    robustness: dict[str, float]
    directory: Path
    tensorboard: bool

    @property
    def stability(self) -> float:
        """eta lambda_max / 2."""
        return self.learning_rate * self.largest_eigenvalue / 2

    def __str__(self) -> str:
        return "\n".join(
            [
                f"test accuracy       {self.test_accuracy:.4f}",
                f"test loss           {self.test_loss:.4f}",
                f"Hessian trace       {self.trace.estimate:.4g} +- {self.trace.standard_error:.2g} "
                f"({self.trace.matvecs} probes, {self.images} training images, evaluation mode)",
                f"largest eigenvalue  {self.largest_eigenvalue:.4g} (residual {self.residual:.1g})",
                f"stability           {self.stability:.3g} (learning rate {self.learning_rate:g} x largest eigenvalue "
                "/ 2; plain gradient descent is unstable above 1)",
                *(f"{name.removeprefix('robust/'):<30}{value:.4f}" for name, value in self.robustness.items()),
                f"files               {self.directory}",
            ]
            + ([f"TensorBoard         {_TENSORBOARD} --logdir '{self.directory}'"] if self.tensorboard else [])
        )


# Of this environment, which need not be on the PATH.
_TENSORBOARD = shutil.which("tensorboard") or Path(sys.executable).with_name("tensorboard")


LANCZOS = 20
"""Products that the search for the largest eigenvalue spends."""


def report(trainer: Trainer, module: Classifier, data: ImageData, samples: int, probes: int, seed: int) -> Report:
    """Put together what ``trainer.test`` measured and the curvature on a fixed set of training images."""
    metrics = trainer.callback_metrics
    batches = [
        (images.to(module.device), labels.to(module.device)) for images, labels in data.training_samples(samples)
    ]

    def loss(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        with higher_order(module, derivatives=2):
            return module.loss(batch)

    with evaluation_mode(module.modules()):
        parameters = select_parameters(dict(module.named_parameters())).values()
        operator = BatchedHessianOperator(loss, parameters, batches, lambda batch: len(batch[1]))
        trace = hutchinson_trace(operator, probes, seed)
        largest = extreme_eigenvalues(operator, 1, 0, LANCZOS, seed).largest
    return Report(
        float(metrics["test/accuracy"]),
        float(metrics["test/loss"]),
        trace,
        largest.values.item(),
        largest.residuals.item(),
        module.lr,
        sum(len(labels) for _, labels in batches),
        {name: float(value) for name, value in metrics.items() if name.startswith("robust/")},
        Path(trainer.default_root_dir),
        isinstance(trainer.logger, TensorBoardLogger),
    )
