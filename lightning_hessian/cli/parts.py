"""Makes the parts of a run from its settings: the data, the module to train, and the callbacks."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any

import hydra
from lightning.pytorch import LightningDataModule, LightningModule
from omegaconf import DictConfig
from torch import nn

from lightning_hessian.arguments import is_number
from lightning_hessian.cli.classifier import Classifier
from lightning_hessian.cli.language_model import LanguageModel
from lightning_hessian.cli.text import TextData

DATA_ATTRIBUTES = ("shape", "classes", "length")
"""What a model may need to know of the data."""


def make_data(settings: DictConfig) -> LightningDataModule:
    """The data module.

    Raises:
        ValueError: the settings make something else.
    """
    check_target("data", settings)
    data = hydra.utils.instantiate(settings)
    if not isinstance(data, LightningDataModule):
        raise ValueError(f"data._target_={settings._target_} is not a LightningDataModule.")
    return data


def make_module(config: DictConfig, data: LightningDataModule) -> LightningModule:
    """The module to train: the model itself if it is a LightningModule, else a classifier around it.

    The model gets those of the data's attributes ``shape``, ``classes`` and ``length`` that its arguments name and the
    settings do not set.

    Raises:
        ValueError: the settings make something else, or a classifier does not know the number of classes.
    """
    settings = config.model
    for name in ("model", "loss", "optimizer", "scheduler"):
        check_target(name, config[name])
    accepted = _arguments(settings._target_)
    asked = [name for name in DATA_ATTRIBUTES if name in accepted and name not in settings]
    known = {name: getattr(data, name) for name in DATA_ATTRIBUTES if hasattr(data, name)}
    missing = [name for name in asked if name not in known and accepted[name].default is inspect.Parameter.empty]
    if missing:
        raise ValueError(
            f"model._target_={settings._target_} needs {' and '.join(missing)}, which {type(data).__name__} does not "
            f"provide: the model is for other data. Choose another model or other data, or set model.{missing[0]}."
        )
    model = hydra.utils.instantiate(settings, **{name: known[name] for name in asked if name in known})
    if isinstance(model, LightningModule):
        return model
    if not isinstance(model, nn.Module):
        raise ValueError(f"model._target_={settings._target_} is neither a LightningModule nor an nn.Module.")
    if "classes" not in known:
        raise ValueError(
            f"model._target_={settings._target_} is an nn.Module, which is trained as a classifier, and "
            f"{type(data).__name__} does not tell the number of classes. Give the data module an attribute `classes`, "
            "or make the model a LightningModule."
        )
    for name in ("lr", "momentum", "weight_decay"):
        if name in config.optimizer and not is_number(config.optimizer[name]):
            raise ValueError(f"optimizer.{name}={config.optimizer[name]!r} must be a number.")
    smoothing = config.loss.get("label_smoothing", 0)
    if not is_number(smoothing) or not 0 <= float(smoothing) <= 1:
        raise ValueError(f"loss.label_smoothing={smoothing!r} must be a number from 0 to 1.")
    loss, optimizer = (hydra.utils.instantiate(config[name]) for name in ("loss", "optimizer"))
    schedule = hydra.utils.instantiate(config.scheduler) if config.scheduler else None
    kind = LanguageModel if isinstance(data, TextData) else Classifier
    return kind(model, known["classes"], loss, optimizer, schedule)


def _arguments(target: str) -> Mapping[str, inspect.Parameter]:
    """The arguments that a class or a function takes, by name."""
    try:
        return inspect.signature(hydra.utils.get_object(target)).parameters
    except ValueError:  # built-in classes do not tell
        return {}


def check_target(group: str, settings: Any) -> None:
    """Check that the class or the function that a part of the settings names can be imported.

    Raises:
        ValueError: it cannot.
    """
    target = settings.get("_target_") if settings else None
    if target is None:
        return
    logger = logging.getLogger("hydra.utils")  # prints what is raised anyway
    before, logger.disabled = logger.disabled, True
    try:
        hydra.utils.get_object(target)
    except ImportError as error:
        raise ValueError(
            f"{group}._target_={target} cannot be imported ({' '.join(str(error).split())}). Correct the name, start "
            "the command in the folder of its module, or install it."
        ) from error
    finally:
        logger.disabled = before


def make_callbacks(config: DictConfig) -> list[Any]:
    """The callbacks of the groups that have one each."""
    return [hydra.utils.instantiate(part) for part in (config.monitor, config.robustness) if part]
