"""Find runs in folders: those that have finished, failed, or not finished."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lightning_hessian.cli.results import FILE, Results
from lightning_hessian.cli.run import CONFIG
from lightning_hessian.cli.sweeps import FAILURE, failures_in

_NOT_COMPARED = ("seed", "resume", "compare", "hydra", "data.root", "logger", "sweep")
"""Settings that do not make runs different: runs that differ in the seed only are averaged."""


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        results: its results.
        overrides: its settings as given on the command line, without those that make no difference.
        seed: its seed.
    """

    results: Results
    overrides: dict[str, str]
    seed: int


@dataclass(frozen=True)
class Found:
    """What folders hold.

    Args:
        runs: the finished runs.
        failed: for each failed job its settings and the reason.
        unfinished: the folders of runs that were interrupted, or are still running.
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
    return Found(runs, failed, unfinished)


def _is_of_a_run(folder: Path) -> bool:
    """Whether a folder with settings has more that a run writes."""
    return any((folder / name).exists() for name in (FILE, FAILURE, ".hydra", "checkpoints"))


def _run(results: Results) -> Run:
    given = dict(one.lstrip("+~").partition("=")[::2] for one in results.overrides)
    compared = {
        name: value
        for name, value in given.items()
        if not any(name == other or name.startswith(f"{other}.") for other in _NOT_COMPARED)
    }
    return Run(results, compared, int(results.settings.get("seed", 0)))
