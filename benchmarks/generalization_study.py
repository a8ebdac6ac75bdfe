"""Study on Fashion-MNIST: does a penalty on the Hessian's trace generalize better, against whom, and at what price?

    python benchmarks/generalization_study.py run [--networks cnn vit] [--noise 0 0.2] [--methods none SAM ...]
    python benchmarks/generalization_study.py cost      # time a step of each method, on a quiet machine
    python benchmarks/generalization_study.py report    # the tables and figures of docs/trace.md

The settings are those of `experiment=generalization`: 5,000 training and 5,000 validation images, 30 epochs. The small
CNN has batch norm, the vision transformer has none. To save time, some methods run on the transformer only, and few of
them also with 20 and 40 % wrong labels.

Every method is tuned by the same rule: three strengths with the two seeds 100 and 101. If the best is at an end of the
grid, the grid is widened there. The strength with the highest mean validation accuracy at the end is trained with the
seeds 0 to 4. The tables have those runs, the correlations also those of tuning. No strength is chosen on the test set.

The trace with four probes and the one with dropout take the strength of one probe: they differ in noise and cost.

Each strength is a sweep of the command over seeds. The numbers are kept in docs/trace/generalization.jsonl. Runs that
are in this file are not run again, and an interrupted sweep goes on in its folder, so the study can be stopped at any
time.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import statistics
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")
warnings.filterwarnings("ignore")

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from scipy import stats  # noqa: E402

from lightning_hessian.cli import command  # noqa: E402
from lightning_hessian.cli.results import FILE, Results  # noqa: E402

RESULTS = ROOT / "docs" / "trace" / "generalization.jsonl"
FOLDER = ROOT / "outputs" / "generalization"
TUNING_SEEDS, SEEDS, COST_SEEDS = (100, 101), (0, 1, 2, 3, 4), (0, 1, 2)
MOST_WIDENED = 4
STEPS = 1500
"""Training steps of a run."""
NETWORKS = {
    "cnn": ["model.width=16"],
    "vit": ["model=vit", "model.patch=7", "model.width=48", "model.depth=2", "optimizer=adamw"],
}
TRACE = ["regularizer=hessian_trace"]
TAYLOR = [*TRACE, "regularizer.penalty.method=taylor"]
AS_IN_THE_PAPER = ["regularizer.penalty.scale=none"]


@dataclass(frozen=True)
class Method:
    """A method, and how it is tuned.

    Args:
        overrides: of the command.
        setting: what is tuned.
        grid: its values, ascending; empty if nothing is tuned.
        highest: an upper bound of the values.
        pattern: how a value is written.
    """

    overrides: Sequence[str]
    setting: str = "regularizer.strength"
    grid: Sequence[float] = ()
    highest: float = float("inf")
    pattern: str = "{}"


def method(name: str, network: str, chosen: Chosen) -> Method:
    """A method's settings for a network.

    Args:
        name: its name.
        network: the network.
        chosen: of what a combination is made.
    """
    plain = ["regularizer=none"]
    rows: dict[str, Method] = {
        "none": Method(plain),
        "weight decay": Method(
            plain,
            "optimizer.weight_decay",
            (1e-3, 3e-3, 1e-2) if network == "cnn" else (1e-1, 3e-1, 1.0),
        ),
        "trace": Method([*TAYLOR, *AS_IN_THE_PAPER], grid=(1e-4, 3e-4, 1e-3)),
        "trace, 4 probes": Method([*TAYLOR, *AS_IN_THE_PAPER, "regularizer.penalty.probes=4"]),
        "trace, dropout": Method(
            [*TAYLOR, *AS_IN_THE_PAPER, "regularizer.penalty.keep=0.1", "regularizer.penalty.drop=element"],
        ),
        "trace, relative": Method(TAYLOR, grid=(3e-4, 1e-3, 3e-3)),
        "two_pass": Method([*TRACE, "regularizer.penalty.method=two_pass", *AS_IN_THE_PAPER], grid=(1e-4, 3e-4, 1e-3)),
        "gauss_newton": Method([*TRACE, *AS_IN_THE_PAPER], grid=(3e-4, 1e-3, 3e-3)),
        "gauss_newton, relative": Method(TRACE, grid=(1e-2, 3e-2, 1e-1)),
        "HessianNorm": Method(
            ["regularizer=hessian_norm", "regularizer.penalty.method=taylor"], grid=(3e-4, 1e-3, 3e-3)
        ),
        "SAM": Method(["regularizer=sam"], "regularizer.penalty.rho", (0.02, 0.05, 0.1)),
        "ASAM": Method(
            ["regularizer=sam", "regularizer.penalty.adaptive=true"], "regularizer.penalty.rho", (0.5, 1.0, 2.0)
        ),
        "Jacobian": Method(["regularizer=jacobian"], grid=(1e-4, 3e-4, 1e-3)),
        "confidence penalty": Method(["regularizer=confidence_penalty"], grid=(0.1, 0.3, 1.0)),
        "label smoothing": Method(
            [*plain, "baseline=label_smoothing"], "loss.label_smoothing", (0.05, 0.1, 0.2), highest=0.9
        ),
        "cutout": Method(
            [*plain, "baseline=cutout"],
            "data.transform.scale",
            (0.12, 0.25, 0.5),
            highest=0.9,
            pattern="[{0},{0}]",
        ),
        "mixup": Method([*plain, "baseline=mixup"], "data.mix.alpha", (0.2, 0.5, 1.0)),
    }
    if name not in COMBINATIONS:
        return rows[name]
    if name not in chosen:
        raise ValueError(f"{name}: run {COMBINATIONS[name][0]}, {', '.join(COMBINATIONS[name][1])} first.")
    (one, fixed), (other, best) = chosen[name]
    first, second = rows[one], rows[other]
    return Method(
        [
            *[override for override in first.overrides if override not in plain],
            *(f"{first.setting}={first.pattern.format(fixed)}", *second.overrides),
        ],
        second.setting,
        tuple(float(f"{best * factor:.2g}") for factor in (0.3, 1, 3)),
    )


LIKE = {"trace, 4 probes": "trace", "trace, dropout": "trace"}
"""Methods that take the strength of another."""
TRACES = "trace", "two_pass", "gauss_newton", "gauss_newton, relative"
COMBINATIONS = {
    "cutout + best trace": ("cutout", TRACES),
    "weight decay + gauss_newton": ("weight decay", ("gauss_newton",)),
}
"""What they are made of: the first part at its strength, and one of the second, tuned again."""
Chosen = dict[str, list[tuple[str, float]]]
"""The parts of a combination that validation chose, with their strengths."""
METHODS = (
    *("none", "SAM", "gauss_newton", "trace", "two_pass", "weight decay", "gauss_newton, relative", "mixup", "ASAM"),
    *("label smoothing", "cutout", "confidence penalty", "trace, relative", "Jacobian", "HessianNorm"),
    *(*COMBINATIONS, "trace, dropout", "trace, 4 probes"),
)
SETTINGS = (("cnn", 0.0), ("vit", 0.0), ("vit", 0.2), ("vit", 0.4))
"""Networks and shares of wrong labels."""
ONLY_VIT = (
    *("confidence penalty", "trace, relative", "HessianNorm", "weight decay + gauss_newton", "trace, dropout"),
    "trace, 4 probes",
)
UNDER_NOISE = ("none", "SAM", "gauss_newton", "mixup", "weight decay")
PAIRS = (
    *(("gauss_newton", other) for other in ("trace", "two_pass", "SAM", "mixup", "weight decay")),
    *(("gauss_newton, relative", other) for other in ("SAM", "weight decay")),
    *(("trace, relative", "trace"), ("trace, dropout", "trace"), ("trace, 4 probes", "trace")),
    *(("cutout + best trace", "cutout"), ("cutout + best trace", "gauss_newton, relative")),
    *(("weight decay + gauss_newton", "weight decay"), ("Jacobian", "gauss_newton"), ("Jacobian", "mixup")),
)
"""Which methods to compare."""
SHARPNESS = {
    "trace": "trace",
    "largest_eigenvalue": "largest eigenvalue",
    "relative_trace": "relative trace",
    "relative_largest_eigenvalue": "relative largest",
}
"""What is measured at the end, and how the tables call it."""
GAPS = {
    "loss gap": lambda row: row["test/loss"] - row["final/training_loss"],
    "test loss": lambda row: row["test/loss"],
    "test error": lambda row: -row["test/accuracy"],
}
COLORS = {"none": "black", "penalty on the weights' curvature": "C0", "SAM, ASAM": "C1", "others": "C2", "both": "C3"}
"""By the kind of the method."""
KINDS = {"curvature and SAM": ("penalty on the weights' curvature", "SAM, ASAM"), "others": ("others",)}
"""For the correlations."""


def read() -> list[dict]:
    return _parsed(RESULTS.stat().st_mtime_ns) if RESULTS.exists() else []


@functools.lru_cache(maxsize=1)
def _parsed(_changed: int) -> list[dict]:
    """The rows; a run in another process may append some, so they are read again when the file has changed."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()]


class Study:
    """The runs of one network at one level of label noise."""

    def __init__(self, network: str, noise: float, jobs: int) -> None:
        self.network = network
        self.noise = noise
        self.jobs = jobs

    @property
    def title(self) -> str:
        return self.network + (f", {100 * self.noise:g} % wrong labels" if self.noise else "")

    def rows(self, name: str, stage: str) -> list[dict]:
        return [
            row
            for row in read()
            if (row["network"], row["noise"], row["method"], row["stage"]) == (self.network, self.noise, name, stage)
        ]

    def run(self, name: str) -> None:
        """Tune a method, then train it with the seeds that are reported."""
        which = method(name, self.network, self.chosen_parts())
        grid = list(which.grid)
        for _ in range(1 + MOST_WIDENED if grid else 0):
            self.sweep(name, which, "tune", grid, TUNING_SEEDS)
            best = self.best(name)
            if best == grid[0]:
                grid.insert(0, float(f"{best * grid[0] / grid[1]:.1g}"))
            elif best == grid[-1] and (wider := float(f"{best * grid[-1] / grid[-2]:.1g}")) <= which.highest:
                grid.append(wider)
            else:
                break
        self.sweep(name, which, "final", [self.strength(name)], SEEDS)

    def steps(self, name: str) -> str:
        """The time of a step in units of a plain one, the median over turns."""
        timed = Study(self.network, 0.0, 1)
        own, plain = (by_seed(timed.rows(which, "cost"), "ms per step") for which in (name, "none"))
        ratios = [own[seed] / plain[seed] for seed in own if seed in plain]
        return f"{statistics.median(ratios):.1f}" if ratios else "-"

    def tuned(self, name: str) -> dict[float, float]:
        """The mean validation accuracy at the end by strength, ascending."""
        of = by_strength(self.rows(name, "tune"))
        return {strength: mean_of(of[strength], "val/accuracy") for strength in sorted(of)}

    def best(self, name: str) -> float:
        """The tuned strength with the highest mean validation accuracy."""
        tuned = self.tuned(name)
        return max(tuned, key=lambda strength: tuned[strength])

    def strength(self, name: str) -> float:
        """The strength to report, after tuning; 0 if there is nothing to tune."""
        return 0.0 if name == "none" else self.best(LIKE.get(name, name))

    def reported(self) -> dict[str, list[dict]]:
        """The runs at the tuned strength of the methods that have run with all seeds."""
        found = {}
        for name in METHODS:
            if rows := self.rows(name, "final"):
                strength = self.strength(name)
                rows = [row for row in rows if row["strength"] == strength and "failed" not in row]
                if len(rows) == len(SEEDS):
                    found[name] = rows
        return found

    def trained(self, name: str) -> list[list[dict]]:
        """The runs of a method by strength, but those that collapsed: 5 points less accurate than plain training."""
        least = mean_of(self.rows("none", "final"), "val/accuracy") - 0.05
        of = by_strength([*self.rows(name, "tune"), *self.rows(name, "final")])
        return [rows for rows in of.values() if mean_of(rows, "val/accuracy") > least]

    def chosen_parts(self) -> Chosen:
        """The parts of combinations: the first, and the trace that did best in tuning, if all have been tuned."""
        chosen: Chosen = {}
        for name, (first, traces) in COMBINATIONS.items():
            if all(self.rows(one, "tune") for one in (first, *traces)):
                best = max(traces, key=lambda one: self.tuned(one)[self.best(one)])
                chosen[name] = [(one, self.best(one)) for one in (first, best)]
        return chosen

    def sweep(self, name: str, which: Method, stage: str, grid: Iterable[float], seeds: Sequence[int]) -> None:
        """Run what is not in the file."""
        have = {(row["strength"], row["seed"]) for row in self.rows(name, stage)}
        missing = [strength for strength in grid if any((strength, seed) not in have for seed in seeds)]
        for strength in missing:
            self.keep(name, stage, strength, seeds, self.command(name, which, stage, strength, seeds))

    def command(self, name: str, which: Method, stage: str, strength: float, seeds: Sequence[int], *more: str) -> Path:
        """Run the command with these seeds. Its folder."""
        of = FOLDER / self.network / f"noise_{self.noise:g}" / name.replace(" ", "_").replace(",", "")
        folder = of / f"{stage}_{strength:g}"
        arguments = [
            *("-m", "experiment=generalization", *NETWORKS[self.network], *which.overrides),
            *(f"data.label_noise={self.noise}", f"data.root={ROOT / 'data'}", *more),
            *([f"{which.setting}={which.pattern.format(strength)}"] if strength else []),
            *(f"seed={','.join(map(str, seeds))}", f"hydra.sweep.dir={folder}"),
            *([] if self.jobs == 1 else ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={self.jobs}"]),
        ]
        sys.argv = ["lightning-hessian", *arguments]
        try:
            command.main()
        except SystemExit as stop:
            print(f"{name}: status {stop.code}", flush=True)
        return folder

    def cost(self) -> None:
        """Time two epochs of each method at its strength, in turns."""
        names = self.reported()
        for seed in COST_SEEDS:
            for name in names:
                if all(row["seed"] != seed for row in self.rows(name, "cost")):
                    which, strength = method(name, self.network, self.chosen_parts()), self.strength(name)
                    short = "trainer.max_epochs=2", "trace.samples=100", "trace.probes=2", "objective.metric=null"
                    folder = self.command(name, which, "cost", strength, [seed], *short)
                    self.keep(name, "cost", strength, [seed], folder)

    def keep(self, name: str, stage: str, strength: float, seeds: Sequence[int], folder: Path) -> None:
        """Append to the file those of a sweep's numbers that are not in it."""
        have = {row["seed"] for row in self.rows(name, stage) if row["strength"] == strength}
        found = {one.settings["seed"]: one for one in (Results.load(path.parent) for path in folder.glob(f"*/{FILE}"))}
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        with RESULTS.open("a") as file:
            for seed in (one for one in seeds if one not in have):
                row = {
                    **{"network": self.network, "noise": self.noise, "method": name, "stage": stage},
                    **{"strength": strength, "seed": seed},
                }
                row |= _numbers(found[seed]) if seed in found else {"failed": True, "val/accuracy": 0.0}
                file.write(json.dumps(row) + "\n")


def _numbers(results: Results) -> dict[str, float]:
    """A run's numbers at its end."""
    found = {**results.scalars(), "val/accuracy": 0.0, **results.epochs[-1]}
    if results.seconds_per_step is not None:
        found["ms per step"] = 1000 * results.seconds_per_step
    left_out = ("epoch", "step", "final/trace_standard_error", "best/val/accuracy")
    return {name: float(f"{value:.5g}") for name, value in found.items() if name not in left_out}


def run(arguments: argparse.Namespace) -> None:
    for network, noise in SETTINGS:
        if network in arguments.networks and noise in arguments.noise:
            study = Study(network, noise, arguments.jobs)
            methods = [name for name in METHODS if network == "vit" or name not in ONLY_VIT]
            for name in arguments.methods or (UNDER_NOISE if noise else methods):
                study.run(name)


def cost(arguments: argparse.Namespace) -> None:
    for network in arguments.networks:
        Study(network, 0.0, 1).cost()


def by_seed(rows: Iterable[dict], metric: str) -> dict[int, float]:
    return {row["seed"]: row[metric] for row in rows if metric in row}


def by_strength(rows: Iterable[dict]) -> dict[float, list[dict]]:
    of: dict[float, list[dict]] = {}
    for row in rows:
        of.setdefault(row["strength"], []).append(row)
    return of


def mean_of(rows: Iterable[dict], metric: str) -> float:
    return statistics.mean(row[metric] for row in rows)


def half_width(values: Sequence[float]) -> float:
    """Half of the mean's 95 % interval by Student's t."""
    return statistics.stdev(values) / math.sqrt(len(values)) * float(stats.t.ppf(0.975, len(values) - 1))


def interval(values: Sequence[float], digits: int, factor: float = 1.0) -> str:
    """The mean and its 95 % interval; in bold where the interval excludes 0."""
    mean, half = factor * statistics.mean(values), factor * half_width(values)
    text = f"{mean:+.{digits}f} ± {half:.{digits}f}"
    return f"**{text}**" if abs(mean) > half else text


def difference(rows: Iterable[dict], others: Iterable[dict], metric: str) -> list[float]:
    """Over the seeds that both have."""
    mine, theirs = by_seed(rows, metric), by_seed(others, metric)
    return [mine[seed] - theirs[seed] for seed in mine if seed in theirs]


def rounded(x: float) -> str:
    """To three digits, without an exponent below 100,000."""
    return f"{float(f'{x:.3g}'):g}" if abs(x) < 1e5 else f"{x:.2e}"


def line(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |")


def head(*columns: str) -> None:
    line(*columns)
    print(f"|{' --- |' * len(columns)}")


def table(study: Study) -> None:
    """The reported runs of all methods: how accurate they are; their loss, calibration, sharpness and price."""
    reported = study.reported()
    mean = {
        name: {metric: mean_of(rows, metric) for metric in rows[0] if "/" in metric} for name, rows in reported.items()
    }
    names = sorted(reported, key=lambda name: -mean[name]["test/accuracy"])

    def less(name: str, other: str, metric: str, digits: int, factor: float = 1.0) -> str:
        has_both = name != other and other in reported
        return interval(difference(reported[name], reported[other], metric), digits, factor) if has_both else ""

    print(f"\n{study.title}. Means over {len(SEEDS)} seeds.\n")
    for name in METHODS:
        if name not in reported and (rows := study.rows(name, "final")):
            print(f"Not reported: {name}, {len(rows)} runs.")
    columns = "test accuracy (%)", "less none", "less SAM", "less weight decay", "validation, less none"
    head("method", "strength", "tried", *columns)
    for name in names:
        strength, tried = study.strength(name), len(study.tuned(name))
        line(
            *(name, f"{strength:g}" if strength else "-", f"{tried or '-'}"),
            f"{100 * mean[name]['test/accuracy']:.2f}",
            *(less(name, other, "test/accuracy", 2, 100) for other in ("none", "SAM", "weight decay")),
            less(name, "none", "val/accuracy", 2, 100),
        )
    print()
    head("method", "step (none = 1)", "test loss", "less none", "calibration error", *SHARPNESS.values())
    for name in names:
        line(
            *(name, study.steps(name), f"{mean[name]['test/loss']:.3f}", less(name, "none", "test/loss", 4)),
            f"{mean[name]['test/calibration_error']:.3f}",
            *(rounded(mean[name][f"final/{what}"]) for what in SHARPNESS),
        )


def pairs(study: Study) -> None:
    """Differences between two methods."""
    reported = study.reported()
    found = [(one, other) for one, other in PAIRS if one in reported and other in reported]
    print(f"\nPairs, {study.title}.\n")
    head("method", "less", "test accuracy (points)", "validation accuracy (points)", "test loss")
    for one, other in found:
        accuracies = [
            interval(difference(reported[one], reported[other], metric), 2, 100)
            for metric in ("test/accuracy", "val/accuracy")
        ]
        line(one, other, *accuracies, interval(difference(reported[one], reported[other], "test/loss"), 4))


def correlations(study: Study) -> None:
    """Whether sharpness ranks the strengths of one method, and different methods."""
    strengths = {name: study.trained(name) for name in METHODS}
    tuned = {name: own for name, own in strengths.items() if len(own) >= 3}
    kinds = {kind: [own for name, own in tuned.items() if kind_of(name) in KINDS[kind]] for kind in KINDS}
    everything = [rows for own in strengths.values() for rows in own]
    best = list(study.reported().values())
    if any(len(group) < 3 for group in kinds.values()):
        return
    print(f"\nSpearman's rank correlation, {study.title}.\n")
    within = [f"strengths of one method: {kind}, median (range) of {len(group)}" for kind, group in kinds.items()]
    head("sharpness", "with", *within, f"all {len(everything)} strengths", f"{len(best)} methods at their best")
    for (key, sharpness), (gap, of) in itertools.product(SHARPNESS.items(), GAPS.items()):

        def rank(points: Sequence[Sequence[dict]]) -> float:
            values = [
                [statistics.mean(f(row) for row in rows) for rows in points]
                for f in (lambda row: row[f"final/{key}"], of)  # noqa: B023
            ]
            return float(stats.spearmanr(*values).statistic)

        cells = []
        for group in kinds.values():
            ranks = [rank(own) for own in group]
            cells.append(f"{statistics.median(ranks):+.2f} ({min(ranks):+.2f} to {max(ranks):+.2f})")
        line(sharpness, gap, *cells, f"{rank(everything):+.2f}", f"{rank(best):+.2f}")


def grids(study: Study) -> None:
    """What was tuned: the validation accuracy of each strength."""
    print(f"\nTuning, {study.title}: strength, validation accuracy (%).\n")
    for name in METHODS:
        if tuned := study.tuned(name):
            print(f"- {name}: " + ", ".join(f"{x:g} {100 * accuracy:.2f}" for x, accuracy in tuned.items()))


def draw_differences(studies: Sequence[Study]) -> None:
    """The differences from plain training with their intervals, without and with wrong labels."""
    studies = [study for study in studies if len(study.reported()) > 1]
    rows = [
        max(len(study.reported()) for study in pair) for pair in (studies[i : i + 2] for i in range(0, len(studies), 2))
    ]
    figure, axes = plt.subplots(
        len(rows), 2, figsize=(10, 2 + 0.24 * sum(rows)), layout="constrained", height_ratios=rows, squeeze=False
    )
    for axis in axes.flat[len(studies) :]:
        axis.set_visible(False)
    for axis, study in zip(axes.flat, studies, strict=False):
        reported = study.reported()
        none = reported.pop("none")
        found = {name: difference(rows, none, "test/accuracy") for name, rows in reported.items()}
        names = sorted(found, key=lambda name: statistics.mean(found[name]))
        for i, name in enumerate(names):
            values = [100 * value for value in found[name]]
            axis.errorbar(
                statistics.mean(values), i, xerr=half_width(values), fmt="o", color=COLORS[kind_of(name)], capsize=2
            )
        axis.axvline(0, color="gray", linewidth=0.8)
        axis.locator_params(axis="x", nbins=6)
        axis.set_yticks(range(len(names)), names)
        axis.set(title=study.title, xlabel="test accuracy less none (points)")
    legend(figure)
    figure.savefig(RESULTS.parent / "generalization.png", dpi=110)


def draw_sharpness(studies: Sequence[Study]) -> None:
    """Sharpness against the gap, of all runs that did not collapse and have a positive trace."""
    figure, axes = plt.subplots(1, len(studies), figsize=(10, 4), layout="constrained", squeeze=False)
    for axis, study in zip(axes[0], studies, strict=True):
        for name in METHODS:
            rows = [row for rows in study.trained(name) for row in rows if row["final/trace"] > 0]
            gap = [GAPS["loss gap"](row) for row in rows]
            axis.plot([row["final/trace"] for row in rows], gap, ".", color=COLORS[kind_of(name)])
        axis.set(xscale="log", xlabel="trace of the Hessian", ylabel="test loss - training loss", title=study.title)
    legend(figure)
    figure.savefig(RESULTS.parent / "sharpness.png", dpi=110)


def legend(figure: Figure) -> None:
    points = [plt.Line2D([], [], marker="o", linestyle="", color=color, label=kind) for kind, color in COLORS.items()]
    figure.legend(handles=points, loc="outside upper center", ncols=len(COLORS), fontsize="small")


def kind_of(name: str) -> str:
    if name == "none":
        return name
    if name in ("SAM", "ASAM"):
        return "SAM, ASAM"
    if name in COMBINATIONS:
        return "both"
    is_curvature = name.startswith(("trace", "two_pass", "gauss_newton", "HessianNorm"))
    return "penalty on the weights' curvature" if is_curvature else "others"


def report() -> None:
    studies = [study for study in (Study(*setting, 1) for setting in SETTINGS) if "none" in study.reported()]
    milliseconds = [row.get("ms per step", 0.0) for row in read() if row["stage"] != "cost"]
    print(f"{len(milliseconds)} runs, {sum(milliseconds) * STEPS / 3.6e6:.1f} core-hours in training steps.")
    for show in (table, pairs, correlations, grids):
        for study in studies:
            show(study)
    draw_differences(studies)
    draw_sharpness([study for study in studies if not study.noise])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "cost", "report"])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=[*NETWORKS])
    parser.add_argument("--noise", nargs="+", type=float, default=[0.0, 0.2, 0.4], help="shares of wrong labels")
    parser.add_argument("--methods", nargs="+", choices=METHODS)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    arguments = parser.parse_args()
    {"run": run, "cost": cost, "report": lambda _: report()}[arguments.what](arguments)


if __name__ == "__main__":
    main()
