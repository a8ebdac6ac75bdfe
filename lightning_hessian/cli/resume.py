"""Go on with a run: its own settings, what the command line changes in them, and the checkpoint."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from lightning_hessian.cli.checkpoint import read_checkpoint
from lightning_hessian.cli.csv_log import FILE as METRICS
from lightning_hessian.cli.results import FILE
from lightning_hessian.cli.run import CONFIG, LAST
from lightning_hessian.cli.settings import config_directory, is_within, name_of

_OWN = ("resume", "compare")
"""What belongs to the command that resumes, not to the run."""
OVERRIDES, HYDRA = ".hydra/overrides.yaml", ".hydra/hydra.yaml"
"""In the folder of a run: what was given on the command line, and Hydra's own settings."""
_GROUPS_OF_MANY = ("experiment", "baseline", "tuned", "sweep")
"""Groups whose choices set several parts of a run."""
_LENGTH = ("trainer.max_epochs", "trainer.max_steps")
_FIXED = {
    "optimizer": "the checkpoint has the optimizer's state and learning rate",
    "scheduler": "the checkpoint has the state of the schedule",
    "seed": "the order of the data and the random state go on",
    "data": "the run has trained on these data, and the schedule depends on the number of steps",
    "trainer.accumulate_grad_batches": "it changes the number of steps, on which the schedule depends",
    "trainer.limit_train_batches": "it changes the number of steps, on which the schedule depends",
}
"""What cannot change in the middle of a run, and why."""
_FREE = ("data.root", "data.num_workers")
"""What can change all the same."""


def with_the_runs_own(arguments: Sequence[str]) -> list[str]:
    """The command's arguments, with those of the run that ``resume=`` names where the command does not give them.

    So what the command sets refers to what the run has chosen, such as its regularizer. The folder is quoted, because
    folders of a sweep's jobs have ``=`` and ``,`` in their names, which mean something to Hydra.

    Raises:
        ValueError: an argument takes a part of the run away.
    """
    given = next((one for one in arguments if one.startswith("resume=")), "")
    asked = given.removeprefix("resume=")
    if asked in ("", "null"):
        return [*arguments]
    for one in arguments:
        if one.startswith("~") and (config_directory() / one[1:]).is_dir():
            raise ValueError(
                f"resume={asked}: {one} takes a part of the run away, and a run needs all of them. Choose another one "
                f"by {one[1:]}=..., or leave {one} out."
            )
    path = Path(asked.strip("\"'").replace("\\", ""))
    if str(path) == str(Path(asked)):
        given = f"resume='{asked}'" if '"' in asked else f'resume="{asked}"'
    names = [name_of(one) for one in arguments]
    own = [one for one in _overrides_in(_folder_of(path)) if not is_within(name_of(one), names)]
    at = [one.startswith("resume=") for one in arguments].index(True)
    return [*_flags_of(_folder_of(path)), *arguments[:at], *own, given, *arguments[at + 1 :]]


def resumed(config: DictConfig, overrides: Sequence[str]) -> tuple[DictConfig, Path, list[str], list[str]]:
    """The settings of the run that ``config.resume`` names, with the overrides of the command line.

    Args:
        config: the settings of the command.
        overrides: those given on the command line, and the run's own.

    Returns:
        The settings, the checkpoint, a line about each setting that is changed, and the overrides that the run has now.

    Raises:
        ValueError: there is no run to go on with, it has finished, or an override cannot be applied.
    """
    asked = config.resume
    directory = _directory(asked)
    before = OmegaConf.load(directory / CONFIG)
    settings = copy.deepcopy(before)
    assert isinstance(before, DictConfig)
    assert isinstance(settings, DictConfig)
    changes, of_the_run = [], _overrides_in(directory)
    kept = [one for one in overrides if name_of(one) not in _OWN]
    for override in (one for one in kept if one not in of_the_run):
        name = name_of(override)
        if name in _GROUPS_OF_MANY:
            raise ValueError(f"resume={asked}: {override} sets several parts of a run. Give the settings one by one.")
        fixed = next((why for part, why in _FIXED.items() if is_within(name, [part])), None)
        if fixed is not None and name not in _FREE:
            raise ValueError(f"resume={asked}: {override} cannot change in the middle of a run: {fixed}.")
        old = OmegaConf.select(settings, name)
        if override.startswith("~"):
            parent, _, key = name.rpartition(".")
            OmegaConf.select(settings, parent).pop(key) if parent else settings.pop(name)
        else:
            OmegaConf.update(settings, name, OmegaConf.select(config, name), merge=False, force_add=True)
        now = OmegaConf.select(settings, name)
        if now != old:
            changes.append(f"resumed with {override} (the run had {_short(old)})")
    if "save_dir" in config.logger and "save_dir" in settings.logger:
        settings.logger.save_dir = config.logger.save_dir  # this command's folder
    settings.resume, settings.compare = str(directory.resolve()), None
    longer = [name for name in _LENGTH if OmegaConf.select(before, name) != OmegaConf.select(settings, name)]
    if longer and read_checkpoint(str(directory / LAST))["lr_schedulers"]:
        raise ValueError(
            f"resume={asked}: {longer[0]} was {OmegaConf.select(before, longer[0])}, and the schedule of the learning "
            "rate ends there. Beyond its end a cosine schedule runs backwards. Keep the length, or start a new run."
        )
    if (directory / FILE).is_file() and not longer:
        raise ValueError(f"resume={asked}: that run has finished; its results are in {directory / FILE}.")
    return settings, directory / LAST, changes, kept


def moved(checkpoint: Path, directory: Path) -> Path:
    """A copy of a run's checkpoints in the folder where it goes on, so that the best epoch until then still counts.

    The rows that ``logger=csv`` has written come along.
    """
    there, here = checkpoint.parent, directory / checkpoint.parent.name
    if here.resolve() == there.resolve():
        return checkpoint
    state = read_checkpoint(str(checkpoint))
    here.mkdir(parents=True, exist_ok=True)
    for best in there.glob("best.ckpt"):
        shutil.copy2(best, here)
    for rows in there.parent.glob(METRICS):
        shutil.copy2(rows, directory)
    for name, own in state["callbacks"].items():
        if name.startswith("ModelCheckpoint"):
            state["callbacks"][name] = _with_paths(own, str(there.resolve()), str(here.resolve()))
    torch.save(state, here / checkpoint.name)
    return here / checkpoint.name


def _with_paths(state: Any, old: str, new: str) -> Any:
    """The state with one folder in place of another, in values and keys."""
    if isinstance(state, Mapping):
        return {_with_paths(key, old, new): _with_paths(value, old, new) for key, value in state.items()}
    return state.replace(old, new) if isinstance(state, str) else state


def save_overrides(overrides: Sequence[str], directory: Path) -> None:
    """Keep overrides in a run's folder, as Hydra does in that of the command."""
    (directory / OVERRIDES).parent.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create([*overrides]), directory / OVERRIDES)


def _overrides_in(directory: Path) -> list[str]:
    """The overrides of a run that belong to itself."""
    path = directory / OVERRIDES
    found = [*OmegaConf.load(path)] if path.is_file() else []
    return [one for one in map(str, found) if not is_within(name_of(one), (*_OWN, "sweep"))]


def _flags_of(directory: Path) -> list[str]:
    """Where a run's settings came from, if from the user's own files. In front of other flags, which count then."""
    if not (directory / HYDRA).is_file():
        return []
    found = OmegaConf.load(directory / HYDRA).hydra
    folders = [one.path for one in found.runtime.config_sources if one.provider == "command-line"]
    return ["--config-name", found.job.config_name, *(part for one in folders for part in ("--config-dir", one))]


def _directory(asked: str) -> Path:
    path = Path(asked)
    if not path.exists():
        raise ValueError(f"resume={asked}: there is no such folder. Give the folder of a run.")
    if path.is_file() and path.name != Path(LAST).name:
        raise ValueError(f"resume={asked}: a run goes on from its {LAST}. Give the folder of the run.")
    directory = _folder_of(path)
    if not (directory / CONFIG).is_file():
        raise ValueError(
            f"resume={asked}: there is no {CONFIG} in {directory}, so it is not the folder of a run. A run is resumed "
            "with its own settings, not from a checkpoint alone."
        )
    if not (directory / LAST).is_file():
        raise ValueError(
            f"resume={asked}: there is no {LAST} in it, because the run stopped in its first epoch, or the checkpoint "
            "was deleted. Start the run anew."
        )
    return directory


def _folder_of(path: Path) -> Path:
    """The folder of a run, from itself or from the checkpoint in it."""
    return path.parent.parent if path.is_file() else path


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
