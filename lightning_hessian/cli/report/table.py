"""Groups of runs that differ in the seed only, and the table of their means."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_hessian.cli.report.runs import Run

DEFAULT = "default"
"""A setting that was not given."""
_REFERENCES = {"regularizer": "none", "regularizer.strength": "0"}
"""Settings of runs without a penalty."""
_GAP = "generalization gap"
_FIRST = ("best/", "val", "test/accuracy", "test/loss", "robust/", "final/trace", "final/largest_eigenvalue", _GAP)
_LEFT_OUT = ("final/trace_standard_error", "final/training_loss", "curvature/")
_LABELS = {
    "test/accuracy": "test accuracy",
    "test/loss": "test loss",
    "final/trace": "trace",
    "final/largest_eigenvalue": "largest eigenvalue",
    "final/stability": "stability",
}


@dataclass(frozen=True)
class Mean:
    """A mean over seeds, and its standard error: None for one run.

    Example:
        >>> print(Mean.of([1.0, 2.0, 3.0]), Mean.of([0.25]), Mean.of([]))
        2.00 ± 0.58 0.25 -
    """

    value: float
    error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """NaN for no value, or where one is not finite."""
        if not values or not all(map(math.isfinite, values)):
            return cls(math.nan, None)
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(statistics.mean(values), error)

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "-"
        if not self.error:
            return f"{self.value:.4g}"
        digits = max(0, 1 - math.floor(math.log10(self.error)))  # two digits of the error
        return f"{self.value:.{digits}f} ± {self.error:.{digits}f}"


@dataclass(frozen=True)
class Group:
    """Runs that differ in the seed only.

    Args:
        settings: the settings in which groups differ, by name.
        runs: the runs.
    """

    settings: dict[str, str]
    runs: list[Run]

    @property
    def label(self) -> str:
        """Its settings in one line."""
        return ", ".join(f"{name}={value}" for name, value in self.settings.items()) or "all runs"

    @property
    def is_reference(self) -> bool:
        """Whether its runs have no penalty."""
        return any(_is_reference(name, value) for name, value in self.settings.items())

    def values(self, metric: str) -> dict[int, float]:
        """A final number of its runs, by seed."""
        return {run.seed: found for run in self.runs if (found := scalars(run).get(metric)) is not None}

    def mean(self, metric: str) -> Mean:
        """The mean of a final number."""
        return Mean.of([*self.values(metric).values()])

    def difference(self, metric: str, other: Group) -> Mean:
        """The mean difference of a final number from another group's, over the seeds that both have."""
        mine, theirs = self.values(metric), other.values(metric)
        return Mean.of([mine[seed] - theirs[seed] for seed in mine if seed in theirs])


def _is_reference(name: str, value: str) -> bool:
    if name not in _REFERENCES:
        return False
    try:
        return float(value) == float(_REFERENCES[name])
    except ValueError:
        return value == _REFERENCES[name]


def scalars(run: Run) -> dict[str, float]:
    """All final numbers of a run."""
    named = run.results.scalars()
    if run.results.training_loss is not None and "test/loss" in named:
        named[_GAP] = named["test/loss"] - run.results.training_loss
    if run.results.epochs and run.results.tested == "last":
        named |= {name: value for name, value in run.results.epochs[-1].items() if name.startswith("val")}
    if run.results.seconds_per_step is not None:
        named["ms per step"] = 1000 * run.results.seconds_per_step
    return named


def groups_of(runs: Sequence[Run]) -> list[Group]:
    """The groups, best objective first. They are told apart by the settings that are not the same in all runs."""
    names = dict.fromkeys(name for run in runs for name in run.overrides)
    differing = [name for name in names if len({run.overrides.get(name, DEFAULT) for run in runs}) > 1]
    found: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        found.setdefault(tuple(run.overrides.get(name, DEFAULT) for name in differing), []).append(run)
    groups = [Group(dict(zip(differing, key, strict=True)), members) for key, members in found.items()]
    return sorted(groups, key=_rank)


def _rank(group: Group) -> float:
    objectives = [run.results.objective for run in group.runs]
    values = [(1 if one.direction == "minimize" else -1) * one.number for one in objectives if one is not None]
    return statistics.mean(values) if values else math.inf


def metrics_of(groups: Iterable[Group]) -> list[str]:
    """The metrics that some run has, the main ones first."""
    names = dict.fromkeys(name for group in groups for run in group.runs for name in scalars(run))
    kept = [name for name in names if not name.startswith(_LEFT_OUT)]
    ranks = {name: [name.startswith(first) for first in (*_FIRST, "")].index(True) for name in kept}
    return sorted(kept, key=ranks.__getitem__)


def label_of(metric: str) -> str:
    """A metric's name in tables and plots.

    Example:
        >>> label_of("final/trace"), label_of("robust/pgd_linf_0.1/accuracy"), label_of("best/val/loss")
        ('trace', 'pgd_linf_0.1/accuracy', 'best val/loss')
    """
    return _LABELS.get(metric, metric.removeprefix("robust/").replace("best/", "best ").replace("final/", ""))


def reference_of(group: Group, groups: Iterable[Group]) -> Group | None:
    """The group without a penalty that has the same settings otherwise."""

    def others(one: Group) -> dict[str, str]:
        return {k: x for k, x in one.settings.items() if k != "regularizer" and not k.startswith("regularizer.")}

    found = (one for one in groups if one is not group and one.is_reference and others(one) == others(group))
    return None if group.is_reference else next(found, None)


def table_of(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of the table of means."""
    metrics, settings = metrics_of(groups), list(groups[0].settings)
    references = [reference_of(group, groups) for group in groups]
    compares = any(one is not None for one in references) and "test/accuracy" in metrics
    header = [*settings, "runs", *map(label_of, metrics)] + ["test accuracy - without penalty"] * compares
    rows = []
    for group, reference in zip(groups, references, strict=True):
        row = [*group.settings.values(), str(len(group.runs)), *(str(group.mean(metric)) for metric in metrics)]
        if compares:
            row.append("" if reference is None else str(group.difference("test/accuracy", reference)))
        rows.append(row)
    return header, rows


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table as a CSV file."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def write_runs(path: Path, groups: Sequence[Group]) -> None:
    """One line for each run, with all of its final numbers, as a CSV file."""
    metrics, settings = metrics_of(groups), list(groups[0].settings)
    rows = [
        [*group.settings.values(), run.seed, *(scalars(run).get(name, "") for name in metrics), run.results.directory]
        for group in groups
        for run in group.runs
    ]
    write_csv(path, [*settings, "seed", *metrics, "directory"], rows)
