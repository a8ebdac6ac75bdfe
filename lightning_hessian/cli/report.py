"""The report of a finished run: test accuracy and loss, and the curvature of the training loss."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_hessian.cli.classifier import Classifier
from lightning_hessian.cli.data import ImageData
from lightning_hessian.curvature import select_parameters
from lightning_hessian.monitoring.measurement import Curvature, Measurement, MeasurementConfig


@dataclass(frozen=True, kw_only=True)
class Report:
    """Results of a finished run.

    Args:
        test_accuracy: share of correctly classified test images.
        test_loss: mean cross-entropy on the test images.
        curvature: of the mean loss over ``images`` training images, in evaluation mode. ``stability`` uses the initial
            learning rate, which is the highest.
        images: number of training images for ``curvature``.
        robustness: metrics that ``AdversarialAccuracy`` logged during the test, by name. Empty if not requested.
        directory: the run's files.
        tensorboard: whether the run wrote TensorBoard events.
    """

    test_accuracy: float
    test_loss: float
    curvature: Curvature
    images: int
    robustness: dict[str, float]
    directory: Path
    tensorboard: bool

    def __str__(self) -> str:
        trace, (eigenvalue, residual) = self.curvature.trace, self.curvature.largest[0]
        return "\n".join(
            [
                f"test accuracy       {self.test_accuracy:.4f}",
                f"test loss           {self.test_loss:.4f}",
                f"Hessian trace       {trace.estimate:.4g} +- {trace.standard_error:.2g} "
                f"({trace.matvecs} probes, {self.images} training images, evaluation mode)",
                f"largest eigenvalue  {eigenvalue:.4g} (residual {residual:.1g})",
                f"stability           {self.curvature.stability:.3g} (learning rate {self.curvature.learning_rate:g} x "
                "largest eigenvalue / 2; plain gradient descent is unstable above 1)",
                *(f"{name.removeprefix('robust/'):<30}{value:.4f}" for name, value in self.robustness.items()),
                f"files               {self.directory}",
            ]
            + ([f"TensorBoard         {_TENSORBOARD} --logdir '{self.directory}'"] if self.tensorboard else [])
        )


def comparison_table(reports: Mapping[str, Report]) -> str:
    """A table of the main results, one column per run.

    Example:
        >>> from lightning_hessian.curvature import Estimate
        >>> trace, norm = Estimate(4.0, 0.5, 10), Estimate(1.0, 0.1, 10)
        >>> ends = {"largest": [(2.0, 0.01)], "smallest": [(0.0, 0.01)]}
        >>> curvature = Curvature(step=9, trace=trace, frobenius_norm=norm, layers={}, **ends)
        >>> run = Report(
        ...     test_accuracy=0.9, test_loss=0.3, curvature=curvature, images=500, robustness={},
        ...     directory=Path("here"), tensorboard=False,
        ... )
        >>> print(comparison_table({"this run": run}))
        <BLANKLINE>
                            this run
        test accuracy       0.9000
        test loss           0.3000
        Hessian trace       4 +- 0.5
        largest eigenvalue  2
        files               here
    """
    rows = [["", *reports]]
    rows.append(["test accuracy", *(f"{one.test_accuracy:.4f}" for one in reports.values())])
    rows.append(["test loss", *(f"{one.test_loss:.4f}" for one in reports.values())])
    traces = [one.curvature.trace for one in reports.values()]
    rows.append(["Hessian trace", *(f"{trace.estimate:.4g} +- {trace.standard_error:.2g}" for trace in traces)])
    rows.append(["largest eigenvalue", *(f"{one.curvature.largest[0][0]:.4g}" for one in reports.values())])
    rows.append(["files", *(str(one.directory) for one in reports.values())])
    widths = [max(len(row[i]) for row in rows[:-1]) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n" + "\n".join(lines)


# The executable of this environment, which may not be on the PATH.
_TENSORBOARD = shutil.which("tensorboard") or Path(sys.executable).with_name("tensorboard")


LANCZOS = 20
"""Lanczos steps, each one Hessian-vector product, for the largest eigenvalue."""


def report(trainer: Trainer, module: Classifier, data: ImageData, samples: int, probes: int, seed: int) -> Report:
    """Combine the metrics of ``trainer.test`` with the curvature on a fixed set of training images."""
    metrics = trainer.callback_metrics
    batches = [
        (images.to(module.device), labels.to(module.device)) for images, labels in data.training_samples(samples)
    ]
    parameters = select_parameters(dict(module.named_parameters()))
    config = MeasurementConfig(
        probes=probes, eigenvalues=1, iterations=LANCZOS, density_runs=0, layers={}, spaces={}, seed=seed
    )
    measurement = Measurement(
        trainer,
        module,
        batches=batches,
        parameters=parameters,
        config=config,
        training_mode=False,
        loss=lambda _, batch: module.loss(batch),
    )
    curvature, _ = measurement.measure(trainer.global_step, module.lr)
    return Report(
        test_accuracy=float(metrics["test/accuracy"]),
        test_loss=float(metrics["test/loss"]),
        curvature=curvature,
        images=sum(len(labels) for _, labels in batches),
        robustness={name: float(value) for name, value in metrics.items() if name.startswith("robust/")},
        directory=Path(trainer.default_root_dir),
        tensorboard=isinstance(trainer.logger, TensorBoardLogger),
    )
