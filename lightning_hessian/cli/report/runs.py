"""Find runs in folders: those that have finished, failed, or not finished."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lightning_hessian.cli.results import FILE, Results
from lightning_hessian.cli.run import CONFIG
from lightning_hessian.cli.settings import is_within, name_of
from lightning_hessian.cli.strengths import AUTO
from lightning_hessian.cli.sweeps import FAILURE, failures_in

_NOT_COMPARED = (
    *("seed", "resume", "compare", "hydra", "data.root", "logger", "sweep"),
    *("trainer.enable_progress_bar", "trainer.enable_model_summary", "monitor.png_directory"),
)
"""Settings that do not make runs different: runs that differ in the seed only are averaged."""
_NOT_NAMED = ("logger", "sweep", "tuned")
"""Groups of settings whose choices say nothing that the settings do not."""


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        results: its results.
        settings: its resolved settings by their dotted names, without those that make no difference.
        overridden: the names of those of them that were given on the command line.
        choices: what was chosen of each group of settings.
        seed: its seed.
        written: when it finished.
    """

    results: Results
    settings: dict[str, str]
    overridden: frozenset[str]
    choices: dict[str, str]
    seed: int
    written: float


@dataclass(frozen=True)
class Found:
    """What folders hold.

    Args:
        runs: the finished runs.
        failed: for each failed job its settings and the reason.
        unfinished: the folders of runs that were interrupted, or are still running. Those that were resumed elsewhere
            and finished there are left out.
    """

    runs: list[Run]
    failed: list[tuple[str, str]] = field(default_factory=list)
    unfinished: list[Path] = field(default_factory=list)


def find_runs(directories: Sequence[Path]) -> Found:
    """All runs in the folders, at any depth.

    Raises:
        ValueError: a folder does not exist, or there is no finished run in any.
    """
    runs, failed, unfinished = [], [], []
    seen: set[Path] = set()
    for directory in directories:
        if not directory.is_dir():
            raise ValueError(f"{directory} is not a folder. Give the folder of a sweep, or of a run.")
        for config in sorted(directory.rglob(CONFIG)):
            if config.parent.name == ".hydra":  # Hydra's own copy
                continue
            folder = config.parent
            if folder.resolve() in seen or not _is_of_a_run(folder):
                continue
            seen.add(folder.resolve())
            if (folder / FILE).is_file():
                try:
                    runs.append(_run(Results.load(folder)))
                except ValueError as error:
                    print(f"lightning-hessian: left out: {error}", file=sys.stderr)
                    failed.append((str(folder), str(error)))
            elif not (folder / FAILURE).is_file():
                unfinished.append(folder)
        failed += [(one["job"], one["reason"]) for one in failures_in(directory)]
    if not runs:
        names = ", ".join(map(str, directories))
        raise ValueError(
            f"there is no finished run in {names}: a run writes {FILE} into its folder at its end. "
            f"{len(unfinished)} runs have not finished, and {len(failed)} have failed. Start the sweep again with the "
            "same hydra.sweep.dir to finish it, or give another folder."
        )
    resumed = _resumed(runs)
    return Found(runs, failed, [folder for folder in unfinished if folder.resolve() not in resumed])


def _resumed(runs: Sequence[Run]) -> set[Path]:
    """The folders of the runs that these have gone on with, and those that these went on with in their turn."""
    found: set[Path] = set()
    for run in runs:
        before = run.results.settings.get("resume")
        while before is not None and (folder := Path(before).resolve()) not in found:
            found.add(folder)
            config = OmegaConf.load(folder / CONFIG) if (folder / CONFIG).is_file() else OmegaConf.create()
            before = OmegaConf.select(config, "resume")
    return found


def _is_of_a_run(folder: Path) -> bool:
    """Whether a folder with settings has more that a run writes."""
    return any((folder / name).exists() for name in (FILE, FAILURE, ".hydra", "checkpoints"))


def _run(results: Results) -> Run:
    settings = {name: text for name, text in _flat(results.settings) if not is_within(name, _NOT_COMPARED)}
    choices = {name: one for name, one in results.choices.items() if one and not is_within(name, _NOT_NAMED)}
    given = {name_of(one): one.partition("=")[2] for one in results.overrides}
    own = [name for name in given if name not in results.choices]
    settings |= {name: AUTO for name in settings if given.get(name) == AUTO}  # a resumed run has the number
    return Run(
        results=results,
        settings=settings,
        overridden=frozenset(name for name in settings if is_within(name, own)),
        choices=choices,
        seed=int(results.settings.get("seed", 0)),
        written=(results.directory / FILE).stat().st_mtime,
    )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Dotted names with values as text, where equal numbers are equal: but the Trainer tells 1 from 1.0."""
    found = []
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found += _flat(value, f"{name}.")
        elif isinstance(value, str):
            found.append((name, value))
        else:
            found.append((name, json.dumps(value if name.startswith("trainer.") else _whole(value))))
    return found


def _whole(value: Any) -> Any:
    """1 in place of 1.0, also in lists."""
    if isinstance(value, list):
        return [_whole(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
