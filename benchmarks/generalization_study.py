"""Study on Fashion-MNIST: does a penalty on the Hessian's trace generalize better, against whom, and at what price?

    python benchmarks/generalization_study.py run [--networks cnn vit] [--methods none SAM ...] [--jobs 2]
    python benchmarks/generalization_study.py report    # the tables of docs/trace.md

The settings are those of `experiment=generalization`: 5,000 training and 5,000 validation images, 20 epochs. The small
CNN has batch norm, the vision transformer has none. A part of the methods is also run with 20 and 40 % wrong labels.

Every method gets the same budget: four strengths with the two seeds 100 and 101. If the best is at an end of the grid,
the grid is widened there. The strength with the highest mean validation accuracy at the end is trained with the seeds 0
to 4, and only those runs are reported. The test set is read after training only.

Each strength is a sweep of the command over seeds. The numbers are kept in docs/trace/generalization.jsonl. Runs that
are in this file are not run again, and an interrupted sweep goes on in its folder, so the study can be stopped at any
time.
"""

from __future__ import annotations

import argparse
import json
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

from lightning_hessian.cli import command  # noqa: E402
from lightning_hessian.cli.results import FILE, Results  # noqa: E402

RESULTS = ROOT / "docs" / "trace" / "generalization.jsonl"
FOLDER = ROOT / "outputs" / "generalization"
TUNING_SEEDS, SEEDS = (100, 101), (0, 1, 2, 3, 4)
MOST_WIDENED = 4
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


def method(name: str, network: str, chosen: dict[str, float]) -> Method:
    """A method's settings for a network.

    Args:
        name: its name.
        network: the network.
        chosen: the strengths that validation chose for other methods, on which a combination depends.
    """
    plain = ["regularizer=none"]
    rows: dict[str, Method] = {
        "none": Method(plain),
        "weight decay": Method(
            plain,
            "optimizer.weight_decay",
            (3e-4, 1e-3, 3e-3, 1e-2) if network == "cnn" else (3e-2, 1e-1, 3e-1, 1.0),
        ),
        "trace": Method([*TAYLOR, *AS_IN_THE_PAPER], grid=(1e-4, 3e-4, 1e-3, 3e-3)),
        "trace, 4 probes": Method(
            [*TAYLOR, *AS_IN_THE_PAPER, "regularizer.penalty.probes=4"], grid=(1e-4, 3e-4, 1e-3, 3e-3)
        ),
        "trace, dropout": Method(
            [*TAYLOR, *AS_IN_THE_PAPER, "regularizer.penalty.keep=0.1", "regularizer.penalty.drop=element"],
            grid=(1e-4, 3e-4, 1e-3, 3e-3),
        ),
        "trace, relative": Method(TAYLOR, grid=(3e-3, 1e-2, 3e-2, 1e-1)),
        "two_pass": Method(
            [*TRACE, "regularizer.penalty.method=two_pass", *AS_IN_THE_PAPER], grid=(3e-5, 1e-4, 3e-4, 1e-3)
        ),
        "gauss_newton": Method([*TRACE, *AS_IN_THE_PAPER], grid=(3e-4, 1e-3, 3e-3, 1e-2)),
        "gauss_newton, relative": Method(TRACE, grid=(1e-2, 3e-2, 1e-1, 3e-1)),
        "HessianNorm": Method(
            ["regularizer=hessian_norm", "regularizer.penalty.method=taylor"], grid=(3e-3, 1e-2, 3e-2, 1e-1)
        ),
        "SAM": Method(["regularizer=sam"], "regularizer.penalty.rho", (0.02, 0.05, 0.1, 0.2)),
        "ASAM": Method(
            ["regularizer=sam", "regularizer.penalty.adaptive=true"], "regularizer.penalty.rho", (0.25, 0.5, 1.0, 2.0)
        ),
        "Jacobian": Method(["regularizer=jacobian"], grid=(3e-5, 1e-4, 3e-4, 1e-3)),
        "confidence penalty": Method(["regularizer=confidence_penalty"], grid=(0.03, 0.1, 0.3, 1.0)),
        "label smoothing": Method(
            [*plain, "baseline=label_smoothing"], "loss.label_smoothing", (0.05, 0.1, 0.2, 0.4), highest=0.9
        ),
        "cutout": Method(
            [*plain, "baseline=cutout"],
            "data.transform.scale",
            (0.06, 0.12, 0.25, 0.5),
            highest=0.9,
            pattern="[{0},{0}]",
        ),
        "mixup": Method([*plain, "baseline=mixup"], "data.mix.alpha", (0.2, 0.5, 1.0, 2.0)),
    }
    if name != COMBINATION:
        return rows[name]
    augmentation, penalty = (
        next((one for one in chosen if one.startswith(start)), None) for start in ("augmentation: ", "penalty: ")
    )
    if augmentation is None or penalty is None:
        raise ValueError(f"{COMBINATION}: run {', '.join(AUGMENTATIONS + TRACES)} first.")
    first, second = rows[augmentation.partition(": ")[2]], rows[penalty.partition(": ")[2]]
    fixed = f"{first.setting}={first.pattern.format(chosen[augmentation])}"
    best = chosen[penalty]
    return Method(
        [*[one for one in first.overrides if one not in plain], fixed, *second.overrides],
        second.setting,
        tuple(float(f"{best * factor:.2g}") for factor in (0.1, 0.3, 1, 3)),
    )


COMBINATION = "best augmentation + best trace"
AUGMENTATIONS = ("cutout", "mixup")
TRACES = ("trace", "trace, relative", "two_pass", "gauss_newton", "gauss_newton, relative")
METHODS = (
    *("none", "SAM", "gauss_newton", "trace", "two_pass", "weight decay", "gauss_newton, relative", "mixup", "ASAM"),
    *("label smoothing", "cutout", "confidence penalty", "trace, relative", "Jacobian", "HessianNorm", COMBINATION),
    *("trace, dropout", "trace, 4 probes"),
)
SETTINGS = (("cnn", 0.0), ("vit", 0.0), ("cnn", 0.2), ("cnn", 0.4))
"""Networks and shares of wrong labels."""
UNDER_NOISE = ("none", "SAM", "gauss_newton", "trace", "two_pass", "weight decay", "mixup", "label smoothing")


def read() -> list[dict]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


class Study:
    """The runs of one network at one level of label noise."""

    def __init__(self, network: str, noise: float, jobs: int) -> None:
        self.network = network
        self.noise = noise
        self.jobs = jobs

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
        self.sweep(name, which, "final", [self.best(name)] if grid else [0.0], SEEDS)

    def best(self, name: str) -> float:
        """The tuned strength with the highest mean validation accuracy at the end."""
        of: dict[float, list[float]] = {}
        for row in self.rows(name, "tune"):
            of.setdefault(row["strength"], []).append(row["val/accuracy"])
        return max(of, key=lambda strength: statistics.mean(of[strength]))

    def chosen_parts(self) -> dict[str, float]:
        """The best augmentation and the best penalty on the trace, by validation, with their strengths."""
        chosen = {}
        for part, names in {"augmentation": AUGMENTATIONS, "penalty": TRACES}.items():
            reached = {
                name: statistics.mean(row["val/accuracy"] for row in rows)
                for name in names
                if (rows := self.rows(name, "final"))
            }
            if len(reached) == len(names):
                best = max(reached, key=lambda name: reached[name])
                chosen[f"{part}: {best}"] = self.best(best)
        return chosen

    def sweep(self, name: str, which: Method, stage: str, grid: Iterable[float], seeds: Sequence[int]) -> None:
        """Run what is not in the file."""
        have = {(row["strength"], row["seed"]) for row in self.rows(name, stage)}
        missing = [strength for strength in grid if any((strength, seed) not in have for seed in seeds)]
        for strength in missing:
            of = FOLDER / self.network / f"noise_{self.noise:g}" / name.replace(" ", "_").replace(",", "")
            folder = of / f"{stage}_{strength:g}"
            arguments = [
                *("-m", "experiment=generalization", *NETWORKS[self.network], *which.overrides),
                *(f"data.label_noise={self.noise}", f"data.root={ROOT / 'data'}"),
                *([f"{which.setting}={which.pattern.format(strength)}"] if which.grid else []),
                *(f"seed={','.join(map(str, seeds))}", f"hydra.sweep.dir={folder}"),
                *([] if self.jobs == 1 else ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={self.jobs}"]),
            ]
            sys.argv = ["lightning-hessian", *arguments]
            try:
                command.main()
            except SystemExit as stop:
                print(f"{name}: status {stop.code}", flush=True)
            self.keep(name, stage, strength, seeds, folder)

    def keep(self, name: str, stage: str, strength: float, seeds: Sequence[int], folder: Path) -> None:
        """Append a sweep's numbers to the file."""
        found = {one.settings["seed"]: one for one in (Results.load(path.parent) for path in folder.glob(f"*/{FILE}"))}
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        with RESULTS.open("a") as file:
            for seed in seeds:
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
        if network in arguments.networks:
            study = Study(network, noise, arguments.jobs)
            for name in arguments.methods or (UNDER_NOISE if noise else METHODS):
                study.run(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run"])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=[*NETWORKS])
    parser.add_argument("--methods", nargs="+", choices=METHODS)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
