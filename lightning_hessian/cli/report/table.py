"""Groups of runs that differ in the seed only, and the table of their means."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_hessian.cli.report.runs import Run

NONE = "-"
"""In place of a setting that a run does not have."""
_GAP = "generalization gap"
_FIRST = (
    "best/",
    "val",
    "test/accuracy",
    "test/loss",
    "test/",
    "robust/",
    "final/trace",
    "final/largest_eigenvalue",
    _GAP,
)
_LEFT_OUT = ("final/trace_standard_error", "final/training_loss", "curvature/")
_LABELS = {
    "test/accuracy": "test accuracy",
    "test/loss": "test loss",
    "test/calibration_error": "calibration error",
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
        return self.label_without(None) or "all runs"

    def label_without(self, left_out: str | None) -> str:
        """Its settings but for one, in one line."""
        pairs = [(name, value) for name, value in self.settings.items() if name != left_out]
        return ", ".join(f"{name}={value}" for name, value in pairs if value != NONE)

    @property
    def is_reference(self) -> bool:
        """Whether its runs have no penalty."""
        regularizer = self.runs[0].results.settings.get("regularizer")
        return regularizer == {} or (regularizer is not None and regularizer.get("strength") == 0)

    @property
    def rank(self) -> float:
        """The mean objective, the lower the better; infinite without one."""
        objectives = [run.results.objective for run in self.runs]
        values = [(1 if one.direction == "minimize" else -1) * one.number for one in objectives if one is not None]
        return statistics.mean(values) if values else math.inf

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
    """The groups, best objective first: runs with the same settings but for the seed, whichever way they were given.

    A group is named by the choices in which groups differ, and by the settings that were given on the command line or
    that the choices leave open. Of several runs with the same settings and seed it has the newest. Different objectives
    do not compare: then the groups are in the order in which they were found.
    """
    found: dict[frozenset[tuple[str, str]], dict[int, Run]] = {}
    following = _following_the_seed(runs)
    equal = {name for name in following if all(run.settings.get(name, str(run.seed)) == str(run.seed) for run in runs)}
    for run in runs:
        left = {name for name in following if run.settings.get(name) == str(run.seed)}
        same = found.setdefault(frozenset(pair for pair in run.settings.items() if pair[0] not in left), {})
        if run.seed not in same or run.written >= same[run.seed].written:
            same[run.seed] = run
    members = [[*same.values()] for same in found.values()]
    first = [runs_here[0] for runs_here in members]

    def values(name: str) -> list[str]:
        return [run.settings.get(name, NONE) for run in first]

    def chosen(name: str) -> list[str]:
        return [run.choices.get(name, NONE) for run in first]

    choices = [name for name in _names(reversed(run.choices) for run in first) if len({*chosen(name)}) > 1]
    combinations = [*zip(*map(chosen, choices), strict=True)] or [()] * len(first)
    given = frozenset[str]().union(*(run.overridden for run in runs))
    differing = [
        name
        for name in _names(run.settings for run in first)
        if len({*values(name)}) > 1
        and name not in equal
        and (name in given or len({*zip(combinations, values(name), strict=True)}) > len({*combinations}))
    ]
    columns = {**{name: chosen(name) for name in choices}, **{name: values(name) for name in differing}}
    groups = [
        Group({name: column[i] for name, column in columns.items()}, runs_here) for i, runs_here in enumerate(members)
    ]
    return groups if len(objectives_of(groups)) > 1 else sorted(groups, key=lambda group: group.rank)


def objectives_of(groups: Iterable[Group]) -> list[str]:
    """The objectives of the runs, such as ``minimize val/loss``."""
    found = [run.results.objective for group in groups for run in group.runs]
    return [*dict.fromkeys(f"{one.direction} {one.metric}" for one in found if one is not None)]


def _names(each: Iterable[Iterable[str]]) -> list[str]:
    return [*dict.fromkeys(name for names in each for name in names)]


def _following_the_seed(runs: Sequence[Run]) -> frozenset[str]:
    """The settings that are the run's seed wherever they were not given on the command line."""

    def follows(name: str) -> bool:
        pairs = {(run.settings[name], run.seed) for run in runs if name in run.settings and name not in run.overridden}
        return len(pairs) > 1 and all(value == str(seed) for value, seed in pairs)

    return frozenset(filter(follows, _names(run.settings for run in runs)))


def metrics_of(groups: Iterable[Group]) -> list[str]:
    """The metrics that some run has, the main ones first."""
    names = dict.fromkeys(name for group in groups for run in group.runs for name in scalars(run))
    kept = [name for name in names if not name.startswith(_LEFT_OUT)]
    ranks = {name: [name.startswith(first) for first in (*_FIRST, "")].index(True) for name in kept}
    return sorted(kept, key=ranks.__getitem__)


def label_of(metric: str) -> str:
    """A metric's name in tables and plots.

    Example:
        >>> label_of("final/relative_trace"), label_of("robust/pgd_linf_0.1/accuracy"), label_of("best/val/loss")
        ('relative trace', 'pgd_linf_0.1/accuracy', 'best val/loss')
    """
    if metric.startswith("final/"):
        return metric.removeprefix("final/").replace("_", " ")
    return _LABELS.get(metric, metric.removeprefix("robust/").replace("best/", "best "))


def others_of(group: Group) -> dict[str, str]:
    """A group's settings but for its regularizer's."""
    return {k: x for k, x in group.settings.items() if k != "regularizer" and not k.startswith("regularizer.")}


def reference_of(group: Group, groups: Iterable[Group]) -> Group | None:
    """The group without a penalty that has the same settings otherwise, and the most seeds in common."""
    found = [one for one in groups if one is not group and one.is_reference and others_of(one) == others_of(group)]
    seeds = {run.seed for run in group.runs}
    common = [len(seeds & {run.seed for run in one.runs}) for one in found]
    return found[common.index(max(common))] if found and not group.is_reference else None


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
