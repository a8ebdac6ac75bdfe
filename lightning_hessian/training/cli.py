"""The command ``lightning-hessian``: train a classifier with a curvature penalty, configured with Hydra."""

from __future__ import annotations

import logging
import os
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

import hydra
import lightning as L
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf

from lightning_hessian.suggestion import suggest_strength
from lightning_hessian.training.classifier import Classifier
from lightning_hessian.training.data import ImageData
from lightning_hessian.training.report import Report, report
from lightning_hessian.training.user_errors import in_one_line

AUTO = "auto"
"""In place of a strength: choose one before training."""
AUTO_BATCHES = 4
"""On how many training batches a strength is chosen."""


@dataclass
class OptimizerConfig:
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4


@dataclass
class TraceConfig:
    samples: int = 500
    probes: int = 10


@dataclass
class Config:
    """The types of the settings that are not handed to a class of their own."""

    data: Any = MISSING
    model: Any = MISSING
    regularizer: Any = MISSING
    monitor: Any = MISSING
    robustness: Any = MISSING
    trainer: Any = MISSING
    logger: Any = MISSING
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trace: TraceConfig = field(default_factory=TraceConfig)
    seed: int = 0
    resume: str | None = None


def config_directory() -> Path:
    """``conf/`` inside the installed package, or at the top of a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def train(config: DictConfig, directory: Path) -> Report:
    """One run: train, test, measure the trace; files go to the directory."""
    if config.resume is not None and not zipfile.is_zipfile(config.resume):
        what = "is not a checkpoint" if Path(config.resume).exists() else "there is no such checkpoint"
        raise ValueError(f"resume={config.resume}: {what}. A run leaves one in its checkpoints/last.ckpt.")
    for name, least in {"samples": 1, "probes": 2}.items():
        if config.trace[name] < least:
            raise ValueError(f"trace.{name}={config.trace[name]} must be at least {least}.")
    _check_trainer(config.trainer)
    # Softplus and sigmoid tails are denormal numbers, on which a CPU is many times slower.
    torch.set_flush_denormal(True)
    L.seed_everything(config.seed, workers=True, verbose=False)

    data = hydra.utils.instantiate(config.data)
    net = hydra.utils.instantiate(config.model, shape=data.shape, classes=data.classes)
    module = Classifier(net, data.classes, **config.optimizer)
    callbacks: list[Any] = [ModelCheckpoint(directory / "checkpoints", save_last=True)]
    regularizer = _regularizer(config.regularizer) if config.regularizer else None
    others = [hydra.utils.instantiate(part) for part in (config.monitor, config.robustness) if part]
    callbacks += [part for part in (regularizer, *others) if part is not None]
    logger = hydra.utils.instantiate(config.logger) if config.logger else False
    if logger:
        callbacks.append(LearningRateMonitor("step"))
    trainer = hydra.utils.instantiate(
        config.trainer, callbacks=callbacks, logger=logger, default_root_dir=str(directory)
    )
    if regularizer is not None:
        _choose_strengths(config.regularizer, regularizer, module, data, trainer)
    OmegaConf.save(config, directory / "config.yaml", resolve=True)

    trainer.fit(module, data, ckpt_path=config.resume)
    trainer.test(module, data, verbose=False)
    data.setup("fit")  # where processes were spawned, only they have done it
    result = report(trainer, module, data, config.trace.samples, config.trace.probes, config.seed)
    if trainer.is_global_zero:
        print(result)
    return result


def _regularizer(settings: DictConfig) -> Any:
    """The callback, with strength 0 where one is yet to be chosen."""
    strength = settings.get("strength")
    if strength == AUTO:
        return hydra.utils.instantiate(settings, strength=0.0)
    if isinstance(strength, ListConfig) and AUTO in strength:
        return hydra.utils.instantiate(settings, strength=[0.0 if s == AUTO else s for s in strength])
    return hydra.utils.instantiate(settings)


def _choose_strengths(
    settings: DictConfig, regularizer: Any, module: Classifier, data: ImageData, trainer: Any
) -> None:
    """Put a number wherever ``strength`` says auto, into the callback and into the settings.

    Chosen on the module as it was initialised, also where a checkpoint is loaded later: a resumed run goes on with the
    number that the interrupted one has chosen.
    """
    asked = settings.get("strength")
    each = list(asked) if isinstance(asked, ListConfig) else [asked] * len(regularizer.penalties)
    if AUTO not in each:
        return
    data.prepare_data()
    data.setup("fit")
    if trainer.world_size == 1:  # processes that are yet to be forked cannot share a GPU that was used before
        module.to(trainer.strategy.root_device)
    for i, penalty in enumerate(regularizer.penalties):
        if each[i] == AUTO:
            found = suggest_strength(module, data.training_batches(AUTO_BATCHES), penalty)
            each[i] = found.strength
            if trainer.is_global_zero:
                print(
                    f"strength            {found.strength:.4g} ({found.low:.2g} to {found.high:.2g} over "
                    f"{len(found.by_batch)} batches), where the gradient of {penalty.name} is "
                    f"{100 * found.share:.3g} % of the task loss's"
                )
    settings.strength = regularizer.strength = each if isinstance(regularizer.penalty, Sequence) else each[0]


def _check_trainer(settings: DictConfig) -> None:
    """Lightning does not look at the types of its settings: a word for a number would fail somewhere in the middle."""
    hints = get_type_hints(L.Trainer.__init__)
    for name, value in settings.items():
        if isinstance(value, str) and name in hints and not _takes_words(hints[name]):
            raise ValueError(f"trainer.{name}={value!r} is not what Trainer takes ({hints[name]}).")


def _takes_words(hint: Any) -> bool:
    return hint in (str, Any) or isinstance(hint, str) or any(_takes_words(part) for part in get_args(hint))


@hydra.main(version_base="1.3", config_path=str(config_directory()), config_name="config")
def _run(config: DictConfig) -> float:
    with in_one_line():
        return train(config, Path(HydraConfig.get().runtime.output_dir)).test_loss


def main() -> None:
    """Entry point of the command."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # otherwise Hydra prints a page of its own for each error
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's own, about torch's trees
    with in_one_line():
        _run()


ConfigStore.instance().store("schema", Config)

if __name__ == "__main__":
    main()
