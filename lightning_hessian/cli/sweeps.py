"""Sweeps: the folders of their jobs, what a job has done before, and what is said at their end."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from lightning_hessian.cli.checkpoint import is_readable
from lightning_hessian.cli.results import FILE, Results
from lightning_hessian.cli.run import CONFIG, LAST
from lightning_hessian.cli.strengths import AUTO
from lightning_hessian.cli.user_errors import exit_on_user_error

FAILURE = "failure.json"
"""In the folder of a job that failed: the exit status and the reason."""
SETTINGS = "sweep.yaml"
"""In the folder of an Optuna sweep: the settings that all of its trials have."""
_LONGEST = 220
"""File systems allow names of 255 bytes."""
_MAKE_NO_DIFFERENCE = (
    *("logger.save_dir", "trainer.enable_progress_bar", "trainer.enable_model_summary"),
    "sweep.trials",
)
"""A job, or a sweep, goes on where these are different."""

statuses: list[int] = []
"""The exit status of each failed job of the sweep that has ended in this process."""


def folder_name(overrides: str) -> str:
    """A job's folder: its overrides, shortened if they are long, without characters that separate folders.

    Example:
        >>> folder_name("regularizer.strength=0.01,seed=1")
        'regularizer.strength=0.01,seed=1'
        >>> folder_name("data.root=/tmp/x")
        'data.root=_tmp_x-4a2be6b3'
    """
    name = re.sub(r"[^a-zA-Z0-9_.,=+\-\[\]]", "_", overrides) or "defaults"
    if name == (overrides or "defaults") and len(name) <= _LONGEST:
        return name
    return f"{name[:_LONGEST]}-{hashlib.sha256(overrides.encode()).hexdigest()[:8]}"


def trials_left(directory: str, wanted: int) -> int:
    """How many trials of an Optuna sweep are left to run, by the storage in the sweep's folder."""
    storage = Path(directory) / "optuna.db"
    if not storage.is_file():
        return wanted
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    studies = optuna.get_all_study_summaries(f"sqlite:///{storage}")
    trials = [trial for one in studies for trial in optuna.load_study(one.study_name, f"sqlite:///{storage}").trials]
    return max(0, wanted - sum(trial.state == optuna.trial.TrialState.COMPLETE for trial in trials))


OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)
OmegaConf.register_new_resolver("trials_left", trials_left, replace=True)


def search_space(config: DictConfig, trial: Any) -> None:
    """What Optuna searches beside the strength: the method, and its dropout if it has one."""
    if "HessianTrace" not in str(config.regularizer.get("penalty")):
        return
    method = trial.suggest_categorical("regularizer.penalty.method", ["gauss_newton", "two_pass", "taylor"])
    if method == "taylor":
        trial.suggest_categorical("regularizer.penalty.keep", [1.0, 0.5])


def done_before(config: DictConfig, directory: Path) -> tuple[Results | None, Path | None]:
    """What a job finds in its folder: its results if it has finished, or else the checkpoint to go on from.

    Raises:
        ValueError: the folder is that of another job.
    """
    if not (directory / CONFIG).is_file():
        return None, None
    asked, found = (OmegaConf.to_container(one, resolve=True) for one in (config, OmegaConf.load(directory / CONFIG)))
    if (other := _difference(asked, found)) is not None:
        raise ValueError(
            f"the folder {directory} has a run with other settings ({other}). Choose another hydra.sweep.dir, or "
            "delete the folder."
        )
    if (directory / FILE).is_file():
        return Results.load(directory), None
    if not (directory / LAST).is_file():
        return None, None
    if not is_readable(directory / LAST):  # the job was killed while it wrote
        print(f"{directory / LAST} is cut off: the job starts anew.", file=sys.stderr)
        return None, None
    return None, directory / LAST


def _difference(asked: Any, found: Any, name: str = "") -> str | None:
    """The first setting that differs. A strength that was asked for as ``auto`` is a number in the folder."""
    if isinstance(asked, Mapping) and isinstance(found, Mapping):
        for key in [*asked, *(key for key in found if key not in asked)]:
            inner = f"{name}.{key}" if name else str(key)
            if (other := _difference(asked.get(key), found.get(key), inner)) is not None:
                return other
        return None
    if isinstance(asked, list) and isinstance(found, list) and len(asked) == len(found):
        pairs = enumerate(zip(asked, found, strict=True))
        return next((d for i, (a, b) in pairs if (d := _difference(a, b, f"{name}.{i}")) is not None), None)
    if asked == found or name in _MAKE_NO_DIFFERENCE or AUTO in (asked if isinstance(asked, list) else [asked]):
        return None
    return f"{name}: {found} there, {asked} now"


def check_search(config: DictConfig, directory: Path) -> None:
    """Keep the settings of an Optuna sweep in its folder, and refuse others when it is started again.

    The trials are optimized together, so they must have the same settings but for those that Optuna searches.

    Raises:
        ValueError: the folder has a sweep with other settings.
    """
    asked = OmegaConf.to_container(OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"]))
    path = directory / SETTINGS
    if not path.is_file():
        OmegaConf.save(OmegaConf.create(asked), path)
    elif (other := _difference(asked, OmegaConf.to_container(OmegaConf.load(path)))) is not None:
        raise ValueError(
            f"{directory} has trials of a sweep with other settings ({other}), and Optuna would mix them with the new "
            "ones. Choose another hydra.sweep.dir, or delete the folder."
        )


@contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Wait until no other process runs the job in this folder: workers of a sweep that was killed finish their job."""
    if os.environ.get("LOCAL_RANK", "0") != "0":  # a process of the same job
        yield
        return
    lock = FileLock(directory / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waits               another process runs the job in {directory}", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def record_failure(directory: Path, job: str, reason: str, status: int) -> None:
    """Keep why a job failed, for the end of the sweep: the job may run in another process."""
    if directory.is_dir():
        partial = directory / f"{FAILURE}.partial"
        partial.write_text(json.dumps({"job": job, "reason": reason, "status": status}))
        partial.replace(directory / FAILURE)


def forget_failure(directory: Path) -> None:
    """A job that failed runs again."""
    (directory / FAILURE).unlink(missing_ok=True)


def failures_in(directory: Path, since: float = 0.0) -> list[dict[str, Any]]:
    """The failed jobs in a folder, at any depth, with the reason and the exit status of each.

    Args:
        directory: the folder.
        since: leave out those that failed before this time, in seconds.
    """
    found = []
    for path in sorted(directory.rglob(FAILURE)):
        if path.stat().st_mtime < since:
            continue
        try:
            state = json.loads(path.read_text())
            found.append({name: state[name] for name in ("job", "reason", "status")})
        except (json.JSONDecodeError, KeyError, TypeError):
            found.append({"job": str(path.parent), "reason": f"its {FAILURE} cannot be read", "status": 1})
    return found


class SweepEnd(Callback):
    """Makes and checks a sweep's folder, and says at the end which jobs failed and how to see the results."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        statuses.clear()
        directory = Path(config.hydra.sweep.dir)
        directory.mkdir(parents=True, exist_ok=True)
        if "optuna" in config.hydra.sweeper._target_:
            with exit_on_user_error():  # Hydra warns of exceptions in callbacks, and goes on
                check_search(config, directory)
        self._started = time.time()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        directory = Path(config.hydra.sweep.dir)
        failed = failures_in(directory)
        statuses.extend(one["status"] for one in failures_in(directory, self._started))
        finished = len(list(directory.glob(f"*/{FILE}")))
        if failed:
            print(f"\n{len(failed)} of the jobs failed:", file=sys.stderr)
            for one in failed:
                print(f"  {one['job']}: {one['reason']}", file=sys.stderr)
        print(f"\n{finished} runs have finished.")
        if finished:
            print(f"Compare them: lightning-hessian report '{directory}'")
        if failed and not (directory / SETTINGS).is_file():  # Optuna has counted its failed trials
            print(f"Run what failed again: the same command with hydra.sweep.dir='{directory}'")
