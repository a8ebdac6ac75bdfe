"""The command ``lightning-hessian``: train with a curvature penalty, configured with Hydra.

Exit status: 0 on success, 2 after a user error, 3 if training diverged, 1 after any other error in a sweep. A sweep
continues after a failed job, gives it the worst objective, and exits with the highest status of its jobs. Started again
with the same folder, it goes on.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig

from lightning_hessian.cli import sweeps
from lightning_hessian.cli.results import Results, comparison_table
from lightning_hessian.cli.resume import moved, resumed, save_overrides, with_the_runs_own
from lightning_hessian.cli.run import train
from lightning_hessian.cli.settings import config_directory, is_within, name_of
from lightning_hessian.cli.user_errors import Diverged, exit_on_user_error, print_user_error

Choices = dict[str, str | None]
"""What was chosen of each group of settings."""
Runner = Callable[[DictConfig, Path, list[str], Choices], Results]
"""Runs settings in a folder, with the overrides and the choices that are kept in the results."""


def _runs(config: DictConfig, directory: Path, run: Runner) -> dict[str, Results]:
    """Run the settings, then the comparison if ``compare`` is set, and print both results."""
    choices = GlobalHydra.instance().config_loader().get_group_options("regularizer")
    if config.compare is not None and config.compare not in choices:
        raise ValueError(
            f"compare={config.compare} is not a regularizer to compare with. Choose one of {', '.join(choices)}, or "
            "null for no comparison."
        )
    if config.compare is not None and config.resume is not None:
        raise ValueError(
            f"compare={config.compare} starts a run anew, and resume={config.resume} goes on with one. Keep one."
        )
    other = None if config.compare is None else _with_regularizer(config, directory)
    overrides, chosen = [*HydraConfig.get().overrides.task], _choices()
    found = {"this run": run(config, directory, overrides, chosen)}
    _print(found["this run"])
    if other is not None:
        name = f"compare={config.compare}"
        others = [one for one in overrides if not is_within(name_of(one), ("regularizer", "compare", "resume"))]
        others.append(f"regularizer={config.compare}")
        save_overrides(others, directory / _folder(config))
        found[name] = run(other, directory / _folder(config), others, {**chosen, "regularizer": config.compare})
        _print(comparison_table(found))
    return found


def _choices() -> Choices:
    """What was chosen of each group of this command's settings."""
    return {name: one for name, one in HydraConfig.get().runtime.choices.items() if not name.startswith("hydra/")}


def _folder(config: DictConfig) -> str:
    """The name of the comparison's folder."""
    return f"compare_{config.compare}"


def _defaults_of(regularizer: str) -> Any:
    """A regularizer's default settings for this run's model."""
    model = HydraConfig.get().runtime.choices["model"]
    return hydra.compose("config", [f"model={model}", f"regularizer={regularizer}"]).regularizer


@rank_zero_only
def _print(text: object) -> None:
    print(text)


def _with_regularizer(config: DictConfig, directory: Path) -> DictConfig:
    """The same settings with the other regularizer, not resumed, and with all files in a folder of ``directory``."""
    name = _folder(config)
    (directory / name).mkdir(exist_ok=True)
    other = copy.deepcopy(config)
    other.regularizer = _defaults_of(config.compare)
    other.resume = other.compare = None
    if "save_dir" in other.logger:
        other.logger.save_dir = str(directory / name)
    if other.monitor.get("png_directory") is not None:
        other.monitor.png_directory = str(Path(other.monitor.png_directory) / name)
    return other


def _run_once(config: DictConfig, directory: Path, overrides: list[str], chosen: Choices) -> Results:
    """A run by itself, or one that goes on with another."""
    if config.resume is None:
        return train(config, directory, overrides=overrides, choices=chosen)
    config, checkpoint, changes, overrides = resumed(config, overrides)
    for change in changes:
        _print(change)
    checkpoint = moved(checkpoint, directory)
    return train(config, directory, checkpoint=checkpoint, overrides=overrides, choices=chosen)


def _run_job(config: DictConfig, directory: Path, overrides: list[str], chosen: Choices) -> Results:
    """A job of a sweep, which goes on where it was interrupted."""
    if config.resume is not None:
        raise ValueError(
            f"resume={config.resume}: a sweep does not resume another run. Start the same sweep again with its "
            "hydra.sweep.dir, and it goes on."
        )
    with sweeps.alone_in(directory):
        sweeps.forget_failure(directory)
        results, checkpoint = sweeps.done_before(config, directory)
        if results is not None:
            _print(f"finished before     {directory}")
            return results
        if checkpoint is not None:
            _print(f"goes on from        {checkpoint}")
        return train(config, directory, checkpoint=checkpoint, overrides=overrides, choices=chosen)


def _refuse_divergence(runs: dict[str, Results]) -> None:
    for name, result in runs.items():
        losses = [value for metric, value in result.metrics.items() if metric.endswith("loss")]
        bad = next((value for value in losses if not math.isfinite(value)), None)
        if bad is not None:
            raise Diverged(
                f"the test loss of {name} is {bad}: training has diverged, and the numbers above are "
                "worthless. Lower optimizer.lr or regularizer.strength, or set trainer.gradient_clip_val."
            )


def _objective_of(config: DictConfig, runs: dict[str, Results]) -> float:
    objective = runs["this run"].objective if runs else None
    if objective is not None:
        return objective.number
    return math.inf if config.objective.direction == "minimize" else -math.inf


@hydra.main(version_base="1.3", config_path=str(config_directory()), config_name="config")
def _run(config: DictConfig) -> float:
    """One command, or one job of a sweep; the best validation metric, for a sweeper."""
    _silence()  # a launcher may have started another process
    job = HydraConfig.get()
    directory = Path(job.runtime.output_dir)
    if job.mode != RunMode.MULTIRUN:
        with exit_on_user_error():
            runs = _runs(config, directory, _run_once)
            _refuse_divergence(runs)
        return _objective_of(config, runs)
    runs = {}
    name = f"job {job.job.num} ({' '.join(job.overrides.task)})"
    try:
        runs = _runs(config, directory, _run_job)
        _refuse_divergence(runs)
    except Exception as error:  # the other jobs are not lost
        runs = {}  # the worst objective
        status = print_user_error(error, f"{name}: ")
        if status is None:
            traceback.print_exc()
        sweeps.record_failure(directory, name, " ".join(str(error).split()) or type(error).__name__, status or 1)
    return _objective_of(config, runs)


def _silence() -> None:
    """Leave out Lightning's messages that nobody needs."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's use of torch's pytree


def main() -> None:
    """Entry point of the command."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # otherwise Hydra prints its own long report of each error
    _silence()
    sys.path.insert(0, os.getcwd())  # models of the user's own; an installed command does not look there
    sweeps.statuses.clear()
    with exit_on_user_error():
        sys.argv[1:] = with_the_runs_own(sys.argv[1:])
        _run()
    if sweeps.statuses:
        sys.exit(max(sweeps.statuses))


if __name__ == "__main__":
    from lightning_hessian.cli import command  # not as __main__: user errors are recognized by the module's name

    command.main()
