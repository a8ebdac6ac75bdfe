"""The settings of a run: where they are, their types, and what is refused before anything is made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

import lightning as L
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf


@dataclass
class ObjectiveConfig:
    metric: str | None = "val/loss"
    direction: str = "minimize"


@dataclass
class TraceConfig:
    samples: int = 500
    probes: int = 10


@dataclass
class Config:
    """Types of the settings that no other class validates."""

    data: Any = MISSING
    model: Any = MISSING
    optimizer: Any = MISSING
    scheduler: Any = MISSING
    baseline: Any = field(default_factory=dict)
    regularizer: Any = MISSING
    monitor: Any = MISSING
    robustness: Any = MISSING
    trainer: Any = MISSING
    logger: Any = MISSING
    loss: Any = MISSING
    sweep: Any = field(default_factory=dict)
    trace: TraceConfig = field(default_factory=TraceConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    tested: str = "last"
    input_layer: Any = None
    seed: int = 0
    resume: str | None = None
    compare: str | None = None


def config_directory() -> Path:
    """``conf/`` in the installed package, or at the root of a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def name_of(override: str) -> str:
    """The setting, or the group of settings, that an override of the command line sets.

    Example:
        >>> name_of("+trainer.profiler=simple"), name_of("~scheduler"), name_of("regularizer@baseline=jacobian")
        ('trainer.profiler', 'scheduler', 'regularizer')
    """
    return override.lstrip("+~").partition("=")[0].partition("@")[0]


def is_within(name: str, parts: Sequence[str]) -> bool:
    """Whether a setting, or a group of settings, is one of these or lies beneath one.

    Example:
        >>> is_within("data.root", ["data"]), is_within("data.root", ["data.root"]), is_within("database", ["data"])
        (True, True, False)
    """
    return any(name == part or name.startswith((f"{part}.", f"{part}/")) for part in parts)


def check_settings(config: DictConfig) -> None:
    """Refuse settings that would fail late, or not at all.

    Raises:
        ValueError: a setting is out of its range.
    """
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed={config.seed} must be a whole number from 0 to {2**32 - 1}.")
    for name, least in {"samples": 1, "probes": 2}.items():
        if config.trace[name] < least:
            raise ValueError(f"trace.{name}={config.trace[name]} must be at least {least}.")
    for name, choices in {"tested": ("last", "best"), "objective.direction": ("minimize", "maximize")}.items():
        value = OmegaConf.select(config, name)
        if value not in choices:
            raise ValueError(f"{name}={value} is none of {', '.join(choices)}.")
    metric = config.objective.metric
    if metric is not None and metric.startswith(("test", "train")):
        raise ValueError(
            f"objective.metric={metric}: only validation data may choose; test data must not choose anything. Take "
            "a validation metric, such as val/loss."
        )
    if metric is None and (config.tested == "best" or config.sweep):
        raise ValueError("objective.metric=null: there is no best epoch or trial. Set it to a validation metric.")
    _check_trainer(config.trainer)


def _check_trainer(settings: DictConfig) -> None:
    """Refuse strings where Trainer takes none. Lightning does not check types, so training would fail later."""
    hints = get_type_hints(L.Trainer.__init__)
    for name, value in settings.items():
        if isinstance(value, str) and name in hints and not _accepts_strings(hints[name]):
            raise ValueError(f"trainer.{name}={value!r} is not what Trainer takes ({hints[name]}).")


def _accepts_strings(hint: Any) -> bool:
    return hint in (str, Any) or isinstance(hint, str) or any(_accepts_strings(part) for part in get_args(hint))


ConfigStore.instance().store("schema", Config)
