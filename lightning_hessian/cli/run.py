"""One run: train, test, and measure the curvature at the end."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import hydra
import lightning as L
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from omegaconf import DictConfig, OmegaConf

from lightning_hessian.cli.checkpoint import check_checkpoint, read_checkpoint
from lightning_hessian.cli.csv_log import CSVLog
from lightning_hessian.cli.final_curvature import measure
from lightning_hessian.cli.history import History, StepTimer
from lightning_hessian.cli.parts import make_callbacks, make_data, make_module
from lightning_hessian.cli.results import Objective, Results
from lightning_hessian.cli.settings import check_settings, name_of
from lightning_hessian.cli.strengths import choose_strengths, regularizer_of
from lightning_hessian.monitoring.measurement import Curvature

CONFIG = "config.yaml"
"""The resolved settings of a run, in its folder."""
LAST = "checkpoints/last.ckpt"
"""The checkpoint of a run that training can go on from, in its folder."""


def train(
    config: DictConfig,
    directory: Path,
    *,
    checkpoint: Path | None = None,
    overrides: Sequence[str] = (),
    choices: Mapping[str, str | None] = MappingProxyType({}),
) -> Results:
    """Run once: train, test, and measure the curvature. Files go to ``directory``, the results as the last one.

    Args:
        config: the settings; strengths ``auto`` are replaced by numbers.
        directory: the run's folder.
        checkpoint: where training goes on from; None to start anew.
        overrides: the settings given on the command line, for the results.
        choices: what was chosen of each group of settings, for the results.

    Raises:
        ValueError: a setting is wrong.
    """
    check_settings(config)
    asked = OmegaConf.to_container(config, resolve=True)
    run = _prepare(config, directory, checkpoint)
    _fit(run, checkpoint)
    objective = _objective(config, run.history, run.trainer)
    best = _best_weights(run)
    metrics = _test(run, best)
    curvature, images, training_loss = _measure(run)
    results = Results(
        metrics=metrics,
        curvature=curvature,
        images=images,
        directory=directory,
        training_loss=training_loss,
        objective=objective,
        tested="last" if best is None else "best",
        epoch=_epoch(run, best),
        epochs=run.history.epochs,
        seconds_per_step=run.timer.seconds_per_step,
        settings=cast(dict[str, Any], asked),
        overrides=[*overrides],
        choices={**choices},
        tensorboard=isinstance(run.trainer.logger, TensorBoardLogger),
    )
    if run.trainer.is_global_zero:
        _log_end(run.trainer.loggers, results, config, run.trainer.global_step)
        results.save()
    return results


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What a run is made of, ready to train. ``checkpoints`` has the best weights first, if there is an objective."""

    config: DictConfig
    directory: Path
    data: L.LightningDataModule
    module: L.LightningModule
    timer: StepTimer
    history: History
    checkpoints: list[ModelCheckpoint]
    trainer: L.Trainer


def _prepare(config: DictConfig, directory: Path, checkpoint: Path | None) -> _Run:
    """Make all parts, choose the strengths, and save the settings."""
    # The tails of softplus and sigmoid are denormal numbers, which slow a CPU down many times.
    torch.set_flush_denormal(True)
    L.seed_everything(config.seed, workers=True, verbose=False)
    data = make_data(config.data)
    module = make_module(config, data)
    if checkpoint is not None:
        check_checkpoint(str(checkpoint), module)
    regularizers = {name: regularizer_of(config[name]) for name in ("regularizer", "baseline") if config[name]}
    timer, history, checkpoints = StepTimer(), History(), _checkpoints(config, directory)
    callbacks: list[Any] = [timer, *regularizers.values(), *make_callbacks(config), history, *checkpoints]
    logger = _logger(config, checkpoint)
    if logger:
        callbacks.append(LearningRateMonitor("step"))
    trainer = hydra.utils.instantiate(
        config.trainer, callbacks=callbacks, logger=logger, default_root_dir=str(directory)
    )
    for name, regularizer in regularizers.items():
        choose_strengths(config[name], regularizer, module, data, trainer)
    OmegaConf.save(config, directory / CONFIG, resolve=True)
    return _Run(
        config=config,
        directory=directory,
        data=data,
        module=module,
        timer=timer,
        history=history,
        checkpoints=checkpoints,
        trainer=trainer,
    )


def _logger(config: DictConfig, checkpoint: Path | None) -> Any:
    """The logger; False for none, as Trainer takes it."""
    logger = hydra.utils.instantiate(config.logger) if config.logger else False
    if isinstance(logger, CSVLog):
        logger.keep_rows_before(0 if checkpoint is None else read_checkpoint(str(checkpoint))["global_step"])
    return logger


def _checkpoints(config: DictConfig, directory: Path) -> list[ModelCheckpoint]:
    """Keep the weights of the epoch with the best objective, and all that training can go on from after each epoch."""
    # A run that goes on in its folder overwrites its files.
    settings: dict[str, Any] = {"save_on_train_epoch_end": True, "enable_version_counter": False}
    folder, mode = directory / Path(LAST).parent, config.objective.direction.removesuffix("imize")
    last = ModelCheckpoint(folder, filename=Path(LAST).stem, **settings)
    if config.objective.metric is None:
        return [last]
    return [ModelCheckpoint(folder, filename="best", monitor=config.objective.metric, mode=mode, **settings), last]


def _fit(run: _Run, checkpoint: Path | None) -> None:
    run.trainer.fit(run.module, run.data, ckpt_path=None if checkpoint is None else str(checkpoint))
    last = run.directory / LAST
    if run.history.learning_rate is None and last.is_file():  # the callbacks were in spawned processes
        states = torch.load(last, map_location="cpu", weights_only=False)["callbacks"]
        for one in (run.timer, run.history):
            one.restore(states.get(one.state_key, {}))


def _best_weights(run: _Run) -> str | None:
    """The checkpoint to test; None for the last weights."""
    if run.config.tested != "best":
        return None
    path = run.checkpoints[0].best_model_path
    if Path(path).is_file():
        return path
    if path and run.trainer.is_global_zero:  # `fast_dev_run` keeps none
        print(f"{path} was deleted: the last weights are tested instead.", file=sys.stderr)
    return None


def _epoch(run: _Run, best: str | None) -> int:
    """The epoch after which the weights are that were tested."""
    if best is not None:
        return int(torch.load(best, map_location="cpu", weights_only=False)["epoch"]) + 1
    return int(run.history.epochs[-1]["epoch"]) if run.history.epochs else run.trainer.current_epoch


def _test(run: _Run, best: str | None) -> dict[str, float]:
    """What the test logs; empty if the module or the data have none. The module has the weights that were tested."""
    if not is_overridden("test_step", run.module) or not is_overridden("test_dataloader", run.data):
        return {}
    found = run.trainer.test(run.module, run.data, verbose=False, ckpt_path=best)
    return {name: float(value) for of_loader in found for name, value in of_loader.items()}


def _measure(run: _Run) -> tuple[Curvature, int, float]:
    """The curvature and the loss on training samples, and their number."""
    if run.trainer.world_size > 1:
        run.data.setup("fit")  # spawned processes set up their own copies only
    trace, seed, rate = run.config.trace, run.config.seed, run.history.learning_rate
    return measure(run.trainer, run.module, run.data, trace.samples, trace.probes, seed, rate)


def _objective(config: DictConfig, history: History, trainer: L.Trainer) -> Objective | None:
    metric, direction = config.objective.metric, config.objective.direction
    if metric is None:
        return None
    values = [epoch[metric] for epoch in history.epochs if metric in epoch]
    if not values and metric not in trainer.callback_metrics:
        known = ", ".join(sorted(name for name in trainer.callback_metrics if not name.startswith("train")))
        raise ValueError(
            f"objective.metric={metric} was not logged in validation. Logged were: {known or 'nothing'}. Set it to one "
            "of these, or to null."
        )
    best = min if direction == "minimize" else max
    return Objective(metric=metric, direction=direction, value=best(values) if values else None)


def _log_end(loggers: Sequence[Logger], results: Results, config: DictConfig, step: int) -> None:
    """Give the loggers the final numbers, and the settings with them: TensorBoard's tab HParams compares runs."""
    final = {name: value for name, value in results.scalars().items() if math.isfinite(value)}
    settings = dict(_flat(OmegaConf.to_container(config, resolve=True)))
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):  # its table of runs shows the first columns only
            logger.log_hyperparams(_main_settings(settings, results.overrides), final)
        else:
            logger.log_hyperparams(settings)
        logger.log_metrics(final, step)
        logger.save()
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()  # the next job of a sweep is a run of its own


def _main_settings(settings: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """What runs are told apart by: their parts, the strength, the learning rate, the seed, and what was overridden."""
    parts = {"data": "data._target_", "model": "model._target_", "penalty": "regularizer.penalty._target_"}
    found = {name: str(settings[key]).rpartition(".")[2] for name, key in parts.items() if key in settings}
    found |= {key: settings[key] for key in ("regularizer.strength", "optimizer.lr", "seed") if key in settings}
    names = map(name_of, overrides)
    return found | {name: settings[name] for name in names if name in settings}


def _flat(settings: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(settings, Mapping | list):
        return [(prefix, settings)]
    pairs = settings.items() if isinstance(settings, Mapping) else enumerate(settings)
    return [pair for name, value in pairs for pair in _flat(value, f"{prefix}.{name}" if prefix else str(name))]
