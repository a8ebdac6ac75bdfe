"""The command ``lightning-hessian``: train a classifier with a curvature penalty, configured with Hydra.

Exit status: 0 on success, 2 after a user error, 3 if training diverged. A sweep continues after a failed job, gives it
an infinite objective, and exits with the highest status of its jobs.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, get_args, get_type_hints

import hydra
import lightning as L
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf

from lightning_hessian.cli.checkpoint import check_checkpoint
from lightning_hessian.cli.classifier import Classifier
from lightning_hessian.cli.data import ImageData
from lightning_hessian.cli.report import Report, comparison_table, report
from lightning_hessian.cli.user_errors import Diverged, exit_on_user_error, print_user_error
from lightning_hessian.regularization.adaptive import Adaptive
from lightning_hessian.regularization.curvature_budget import CurvatureBudget
from lightning_hessian.regularization.gradient_share import GradientShare
from lightning_hessian.regularization.suggest import suggest_strength
from lightning_hessian.step.isolation import random_state_kept

AUTO = "auto"
"""As a strength: choose one before training."""
ADAPTIVE: dict[str, Callable[[float], Adaptive]] = {
    "share": GradientShare,
    "trace": lambda target: CurvatureBudget(trace=target),
    "stability": lambda target: CurvatureBudget(stability=target),
}
"""As a strength, with a colon and a number behind it, such as share:0.1: strengths that adapt in training."""
AUTO_BATCHES = 4
"""Number of training batches used to suggest a strength."""
AUTO_STEPS = 100
"""Minimum number of unpenalized training steps between two suggestions."""


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
    """Types of the settings that no other class validates."""

    data: Any = MISSING
    model: Any = MISSING
    baseline: Any = field(default_factory=dict)
    regularizer: Any = MISSING
    monitor: Any = MISSING
    robustness: Any = MISSING
    trainer: Any = MISSING
    logger: Any = MISSING
    loss: Any = MISSING
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trace: TraceConfig = field(default_factory=TraceConfig)
    seed: int = 0
    resume: str | None = None
    compare: str | None = None


def config_directory() -> Path:
    """``conf/`` in the installed package, or at the root of a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def train(config: DictConfig, directory: Path) -> Report:
    """Run once: train, test, and measure the curvature. Files go to ``directory``."""
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed={config.seed} must be a whole number from 0 to {2**32 - 1}.")
    for name, least in {"samples": 1, "probes": 2}.items():
        if config.trace[name] < least:
            raise ValueError(f"trace.{name}={config.trace[name]} must be at least {least}.")
    _check_trainer(config.trainer)
    # The tails of softplus and sigmoid are denormal numbers, which slow a CPU down many times.
    torch.set_flush_denormal(True)
    L.seed_everything(config.seed, workers=True, verbose=False)

    data = hydra.utils.instantiate(config.data)
    net = hydra.utils.instantiate(config.model, shape=data.shape, classes=data.classes)
    module = Classifier(net, data.classes, hydra.utils.instantiate(config.loss), **config.optimizer)
    if config.resume is not None:
        check_checkpoint(config.resume, module)
    callbacks: list[Any] = [ModelCheckpoint(directory / "checkpoints", save_last=True)]
    regularizers = {name: _regularizer(config[name]) for name in ("regularizer", "baseline") if config[name]}
    callbacks += regularizers.values()
    callbacks += [hydra.utils.instantiate(part) for part in (config.monitor, config.robustness) if part]
    logger = hydra.utils.instantiate(config.logger) if config.logger else False
    if logger:
        callbacks.append(LearningRateMonitor("step"))
    trainer = hydra.utils.instantiate(
        config.trainer, callbacks=callbacks, logger=logger, default_root_dir=str(directory)
    )
    for name, regularizer in regularizers.items():
        _choose_strengths(config[name], regularizer, module, data, trainer)
    OmegaConf.save(config, directory / "config.yaml", resolve=True)

    trainer.fit(module, data, ckpt_path=config.resume)
    trainer.test(module, data, verbose=False)
    data.setup("fit")  # spawned processes set up their own copies only
    return report(trainer, module, data, config.trace.samples, config.trace.probes, config.seed)


def _regularizer(settings: DictConfig) -> Any:
    """The callback, with strength 0 in place of ``auto``."""
    strength = _strength(settings.get("strength"))
    if not any(isinstance(one, Adaptive) for one in (strength if isinstance(strength, list) else [strength])):
        return hydra.utils.instantiate(settings, strength=strength)
    # Not through `instantiate`, which takes no objects.
    return hydra.utils.instantiate(settings, strength=0.0, _partial_=True)(strength=strength)


def _strength(asked: Any) -> Any:
    """A strength of the settings: a number, ``auto``, one that adapts, or a list of these."""
    if isinstance(asked, ListConfig):
        return [_strength(one) for one in asked]
    if asked == AUTO:
        return 0.0
    kind, colon, number = asked.partition(":") if isinstance(asked, str) else ("", "", "")
    if not colon:
        return asked
    try:
        return ADAPTIVE[kind](float(number))
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"strength={asked!r} is none of share:0.1 (the penalty's share of the gradient, in (0, 1]), trace:10 or "
            "stability:0.5 (targets for the curvature, positive)."
        ) from error


def _choose_strengths(
    settings: DictConfig, regularizer: Any, module: Classifier, data: ImageData, trainer: Any
) -> None:
    """Replace each ``auto`` strength by a number, in the callback and in the settings.

    The number is the lowest suggestion while a copy of the model trains without a penalty, so the penalty's share of
    the gradient stays within the requested share along the way. The initial weights alone do not suffice: input
    derivatives there are 100 to 1,000 times smaller than soon after (0 for the vision transformer), and a strength
    that fits them destroys training. A resumed run starts from the same weights and chooses the same number.
    """
    asked = settings.get("strength")
    each = list(asked) if isinstance(asked, ListConfig) else [asked] * len(regularizer.penalties)
    if AUTO not in each:
        return
    data.prepare_data()
    data.setup("fit")
    if trainer.world_size == 1:  # processes forked later cannot use a GPU that this process has initialized
        module.to(trainer.strategy.root_device)
    penalties = {i: penalty for i, penalty in enumerate(regularizer.penalties) if each[i] == AUTO}
    with random_state_kept(module.device):
        suggestions = [
            {i: suggest_strength(snapshot, data.training_batches(AUTO_BATCHES), p) for i, p in penalties.items()}
            for snapshot in _unpenalized_training(module, data, trainer)
        ]
    for i, penalty in penalties.items():
        lowest = min((suggestion[i] for suggestion in suggestions), key=float)
        each[i] = lowest.strength
        if trainer.is_global_zero:
            print(
                f"strength            {lowest.strength:.4g} ({lowest.low:.2g} to {lowest.high:.2g} over "
                f"{len(lowest.by_batch)} batches), where the gradient of {penalty.name} is "
                f"{100 * lowest.share:.3g} % of the task loss's"
            )
    settings.strength = each if isinstance(regularizer.penalty, Sequence) else each[0]
    regularizer.strength = _strength(settings.strength)


def _unpenalized_training(module: Classifier, data: ImageData, trainer: L.Trainer) -> Iterator[Classifier]:
    """Train a copy without a penalty, and yield it after each epoch, or each ``AUTO_STEPS`` steps if that is longer.

    Stops once the mean loss of such a part is below half the first loss, or when the run's epochs or steps are used up.
    """
    twin = copy.deepcopy(module)
    epoch = len(data.train_dataloader())
    part = max(AUTO_STEPS, epoch)
    ends = [end for end in ((trainer.max_epochs or 0) * epoch, trainer.max_steps) if end > 0]
    parts = max(1, min(ends, default=0) // part)
    optimizer = twin.optimizer()
    schedule = twin.schedule(optimizer, parts * part)
    batches = data.training_batches(parts * part)
    first: float | None = None
    for _ in range(parts):
        losses: list[float] = []
        for batch in islice(batches, part):
            optimizer.zero_grad()
            images, labels = move_data_to_device(batch, module.device)
            loss = twin.training_loss(twin(images), labels)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise Diverged(
                    f"the training loss is {losses[-1]} without a penalty: training has diverged, so no strength can "
                    "be chosen for regularizer.strength=auto. Lower optimizer.lr."
                )
        yield twin
        first = losses[0] if first is None else first
        if statistics.mean(losses) < first / 2:
            return


def _check_trainer(settings: DictConfig) -> None:
    """Refuse strings where Trainer takes none. Lightning does not check types, so training would fail later."""
    hints = get_type_hints(L.Trainer.__init__)
    for name, value in settings.items():
        if isinstance(value, str) and name in hints and not _accepts_strings(hints[name]):
            raise ValueError(f"trainer.{name}={value!r} is not what Trainer takes ({hints[name]}).")


def _accepts_strings(hint: Any) -> bool:
    return hint in (str, Any) or isinstance(hint, str) or any(_accepts_strings(part) for part in get_args(hint))


def _reports(config: DictConfig, directory: Path) -> dict[str, Report]:
    """Run the settings, then the comparison if ``compare`` is set, and print both reports."""
    choices = sorted(path.stem for path in (config_directory() / "regularizer").glob("*.yaml"))
    if config.compare is not None and config.compare not in choices:
        raise ValueError(
            f"compare={config.compare} is not a regularizer to compare with. Choose one of {', '.join(choices)}, or "
            "null for no comparison."
        )
    reports = {"this run": train(config, directory)}
    _print(reports["this run"])
    if config.compare is not None:
        name = f"compare_{config.compare}"
        other = _with_regularizer(config, _defaults_of(config.compare), name, directory / name)
        reports[f"compare={config.compare}"] = train(other, directory / name)
        _print(comparison_table(reports))
    return reports


def _defaults_of(regularizer: str) -> Any:
    """A regularizer's default settings for this run's model."""
    model = HydraConfig.get().runtime.choices["model"]
    return hydra.compose("config", [f"model={model}", f"regularizer={regularizer}"]).regularizer


@rank_zero_only
def _print(text: object) -> None:
    print(text)


def _with_regularizer(config: DictConfig, regularizer: Any, name: str, directory: Path) -> DictConfig:
    """The same settings with another regularizer, not resumed, and with all files in ``directory``."""
    directory.mkdir(exist_ok=True)
    other = copy.deepcopy(config)
    other.regularizer = regularizer
    other.resume = other.compare = None
    if "save_dir" in other.logger:
        other.logger.save_dir = str(directory)
    if other.monitor.get("png_directory") is not None:
        other.monitor.png_directory = str(Path(other.monitor.png_directory) / name)
    return other


def _objective(reports: dict[str, Report]) -> float:
    """What a sweep minimizes: the test loss, or infinity if it is not finite, because some sweepers stop at NaN."""
    loss = reports["this run"].test_loss
    return loss if math.isfinite(loss) else math.inf


def _refuse_divergence(reports: dict[str, Report]) -> None:
    for name, result in reports.items():
        if not math.isfinite(result.test_loss):
            raise Diverged(
                f"the test loss of {name} is {result.test_loss}: training has diverged, and the numbers above are "
                "worthless. Lower optimizer.lr or regularizer.strength, or set trainer.gradient_clip_val."
            )


_statuses: list[int] = []
"""Exit statuses of a sweep's failed jobs."""


@hydra.main(version_base="1.3", config_path=str(config_directory()), config_name="config")
def _run(config: DictConfig) -> float:
    job = HydraConfig.get()
    in_sweep = job.mode == RunMode.MULTIRUN
    objective = math.inf
    try:
        reports = _reports(config, Path(job.runtime.output_dir))
        objective = _objective(reports)
        _refuse_divergence(reports)
    except Exception as error:
        status = print_user_error(error, f"job {job.job.num} ({' '.join(job.overrides.task)}): " if in_sweep else "")
        if status is None:
            raise
        if not in_sweep:
            sys.exit(status)
        _statuses.append(status)  # the sweep continues
    return objective


def main() -> None:
    """Entry point of the command."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # otherwise Hydra prints its own long report of each error
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's use of torch's pytree
    _statuses.clear()
    with exit_on_user_error():
        _run()
    if _statuses:
        sys.exit(max(_statuses))


ConfigStore.instance().store("schema", Config)

if __name__ == "__main__":
    from lightning_hessian.cli import command  # not as __main__: user errors are recognized by the module's name

    command.main()
