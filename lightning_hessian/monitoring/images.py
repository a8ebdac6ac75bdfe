"""Figures for the loggers that take images: TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger


def are_taken_by(logger: Logger) -> bool:
    """Whether a logger takes images."""
    return isinstance(logger, TensorBoardLogger | WandbLogger | MLFlowLogger)


def log(logger: Logger, name: str, figure: Any, step: int) -> None:
    """Give a figure to a logger that takes images.

    Args:
        logger: the logger.
        name: the name in it. MLflow has a file of this name for each step.
        figure: of matplotlib.
        step: the number of optimizer steps.
    """
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_figure(name, figure, global_step=step)
    elif isinstance(logger, WandbLogger):
        logger.log_image(name, [figure], step=step)
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_figure(logger.run_id, figure, f"{name}/step_{step}.png")
