"""Comparison of input penalties on Fashion-MNIST: robust accuracy at matched clean accuracy.

    python benchmarks/robustness_study.py run [--seeds 0 1 2 3 4 5] [--results docs/robustness/results.jsonl]
    python benchmarks/robustness_study.py report    # docs/robustness.md's table, and its plot

Each run is `lightning-hessian experiment=fmnist_robustness` with a regularizer, a strength and a seed. Runs with a
result in the file are skipped, so an interrupted study can be resumed. The robust accuracy at a radius is the lower one
of PGD-40 with cross-entropy and PGD-40 with the CW margin loss, each with two random restarts.

Robust accuracy and clean accuracy (on the whole test set) are averaged over seeds for each strength. Robust accuracy is
interpolated linearly between strengths at a given clean accuracy. If no strengths bracket it and none comes within half
a point, the cell stays empty. The spread over seeds is a jackknife standard error.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

EXPERIMENT = "fmnist_robustness"
STRENGTHS: dict[str, list[str]] = {
    "none": ["0"],
    "input_gradient": ["0.03", "0.1", "0.3"],
    "jacobian": ["0.001", "0.005", "0.03"],
    "input_hessian": ["0.03", "0.1", "0.3"],
    "input_gradient_hessian": ["[0.03,0.03]", "[0.1,0.1]", "[0.3,0.1]"],
}
NAMES = {
    "none": "none",
    "input_gradient": "input gradient",
    "jacobian": "Jacobian",
    "input_hessian": "input Hessian",
    "input_gradient_hessian": "gradient + Hessian",
}
RADII = {"linf": ("0.03", "0.06", "0.1"), "l2": ("0.5", "1", "1.5")}
TARGETS = (0.84, 0.833, 0.827, 0.822)
MATCHED_WITHIN = 0.005


def run(arguments: argparse.Namespace) -> None:
    """Train and attack runs without a result, one seed at a time, so that an early stop leaves complete seeds."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    from lightning_hessian.cli.run import train

    results = arguments.results
    done = {(r["method"], r["strength"], r["seed"]) for r in read(results)}
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for seed, method in itertools.product(arguments.seeds, arguments.methods):
            for strength in arguments.strengths or STRENGTHS[method]:
                if (method, strength, seed) in done:
                    continue
                overrides = [f"experiment={EXPERIMENT}", f"regularizer={method}", f"seed={seed}", "logger=none"]
                overrides += ["trainer.enable_progress_bar=false", "trainer.enable_model_summary=false"]
                overrides += [] if method == "none" else [f"regularizer.strength={strength}"]
                config = hydra.compose("config", [*overrides, *arguments.overrides])
                with tempfile.TemporaryDirectory() as directory:
                    start = time.perf_counter()
                    outcome = train(config, Path(directory))
                    seconds = time.perf_counter() - start
                row = {"method": method, "strength": strength, "seed": seed, "test": outcome.test_accuracy}
                row |= {"seconds": round(seconds, 1), **outcome.robustness}
                results.parent.mkdir(parents=True, exist_ok=True)
                with results.open("a") as file:
                    file.write(json.dumps(row) + "\n")


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def robust(row: dict, norm: str, radius: str) -> float:
    """Accuracy under the stronger of the two attacks."""
    return min(row[f"robust/pgd_{loss}{norm}_{radius}/accuracy"] for loss in ("", "cw_"))


def clean(row: dict) -> float:
    """Accuracy on the whole test set. The attacks use its first images only."""
    return row["test"]


def at_clean_accuracy(points: list[tuple[float, float]], target: float) -> float | None:
    """Robust accuracy at the clean accuracy ``target``, by linear interpolation between (clean, robust) points.

    The points are in the order of the strengths. If the curve meets the target more than once, the best value counts.
    """
    met = []
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if min(x0, x1) <= target <= max(x0, x1):
            met.append(max(y0, y1) if x0 == x1 else y0 + (y1 - y0) * (target - x0) / (x1 - x0))
    near = [y for x, y in points if abs(x - target) <= MATCHED_WITHIN]
    return max(met) if met else max(near, default=None)


def matched(rows: list[dict], method: str, seeds: list[int], target: float, norm: str, radius: str) -> float | None:
    """Interpolate on the mean curve over seeds, because the clean accuracies of a single seed are too noisy."""
    points = []
    for strength in STRENGTHS[method]:
        own = [r for r in rows if (r["method"], r["strength"]) == (method, strength) and r["seed"] in seeds]
        points.append((statistics.mean(map(clean, own)), statistics.mean(robust(r, norm, radius) for r in own)))
    return at_clean_accuracy(points, target)


def with_error(values: list[float | None]) -> str:
    """The first value, from all seeds, with its jackknife standard error from the others, which omit one seed each."""
    value, *without_one = values
    left = [v for v in without_one if v is not None]
    if value is None:
        return ""
    if len(left) < len(without_one):
        return f"{100 * value:.1f}"
    mean, n = statistics.mean(left), len(left)
    error = ((n - 1) / n * sum((v - mean) ** 2 for v in left)) ** 0.5
    return f"{100 * value:.1f} ± {100 * error:.1f}"


def spread(values: list[float]) -> str:
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{deviation}"


def report(arguments: argparse.Namespace) -> None:
    rows = read(arguments.results)
    seeds = sorted({row["seed"] for row in rows})
    methods = [method for method in NAMES if any(row["method"] == method for row in rows)]
    settings = [(norm, radius) for norm, radii in RADII.items() for radius in radii]
    baseline = statistics.mean(clean(row) for row in rows if row["method"] == "none")
    print(f"{len(rows)} runs, {len(seeds)} seeds; clean accuracy without a penalty {100 * baseline:.1f} %\n")

    heads = [f"{norm.replace('linf', 'Linf').replace('l2', 'L2')} {radius}" for norm, radius in settings]
    print("Robust accuracy (%) at matched clean accuracy, on the mean curve over seeds ± jackknife standard error:\n")
    subsets = [seeds, *([seed for seed in seeds if seed != left] for left in seeds)]
    for target in TARGETS:
        print(f"| clean accuracy {100 * target:.1f} % | " + " | ".join(heads) + " |")
        print("| --- |" + " --- |" * len(heads))
        for method in methods:
            cells = [
                with_error([matched(rows, method, some, target, norm, radius) for some in subsets])
                for norm, radius in settings
            ]
            print(f"| {NAMES[method]} | " + " | ".join(cells) + " |")
        print()

    print("By how many points the input Hessian is above, at matched clean accuracy ± jackknife standard error:\n")
    print("| clean accuracy | above | " + " | ".join(heads) + " |")
    print("| --- | --- |" + " --- |" * len(heads))
    for target, method in itertools.product(TARGETS, [m for m in methods if m not in ("none", "input_hessian")]):
        cells = []
        for norm, radius in settings:
            both = ("input_hessian", method)
            pairs = [[matched(rows, one, some, target, norm, radius) for one in both] for some in subsets]
            cells.append(with_error([None if None in pair else pair[0] - pair[1] for pair in pairs]))
        if any(cells):
            print(f"| {100 * target:.1f} % | {NAMES[method]} | " + " | ".join(cells) + " |")
    print()

    print("Every strength, mean over seeds:\n")
    print(
        "| method | strength | clean | "
        + " | ".join(heads)
        + " | CE - margin, largest gap | radius estimate | seconds |"
    )
    print("| --- |" + " --- |" * (len(heads) + 5))
    for method in methods:
        for strength in STRENGTHS[method]:
            own = [row for row in rows if (row["method"], row["strength"]) == (method, strength)]
            if not own:
                continue
            gap = max(
                row[f"robust/pgd_{norm}_{radius}/accuracy"] - row[f"robust/pgd_cw_{norm}_{radius}/accuracy"]
                for row in own
                for norm, radius in settings
            )
            cells = [spread([clean(row) for row in own])]
            cells += [spread([robust(row, norm, radius) for row in own]) for norm, radius in settings]
            cells += [f"{100 * gap:.1f}", f"{statistics.mean(row['robust/radius_estimate'] for row in own):.3f}"]
            cells += [f"{statistics.mean(row['seconds'] for row in own):.0f}"]
            print(f"| {NAMES[method]} | {strength} | " + " | ".join(cells) + " |")
    plot(rows, methods, settings, heads, arguments.results.with_name("clean_against_robust.png"))


def plot(rows: list[dict], methods: list[str], settings: list, heads: list[str], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12, 7), sharex=True, layout="constrained")
    plain = [row for row in rows if row["method"] == "none"]
    for axis, (norm, radius), head in zip(axes.flat, settings, heads, strict=True):
        for color, method in enumerate(methods):
            points = []
            for strength in STRENGTHS[method]:
                own = [row for row in rows if (row["method"], row["strength"]) == (method, strength)]
                if own:
                    x, y = [100 * clean(r) for r in own], [100 * robust(r, norm, radius) for r in own]
                    points.append((statistics.mean(x), statistics.mean(y)))
                    axis.scatter(x, y, s=8, alpha=0.4, color=f"C{color}")
            if method != "none":
                points.insert(
                    0,
                    (
                        statistics.mean(100 * clean(r) for r in plain),
                        statistics.mean(100 * robust(r, norm, radius) for r in plain),
                    ),
                )
            axis.plot(*zip(*points, strict=True), marker="o", label=NAMES[method], color=f"C{color}")
        axis.set_title(f"PGD-40, {head}")
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("clean accuracy (%)")
    for axis in axes[:, 0]:
        axis.set_ylabel("robust accuracy (%)")
    axes[0, 0].legend()
    seeds = len({row["seed"] for row in rows})
    figure.suptitle(f"Fashion-MNIST, softplus CNN: each line goes over strengths, mean of {seeds} seeds (dots)")
    figure.savefig(path, dpi=110)
    print(f"\n{path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "report"])
    parser.add_argument("--set", dest="overrides", nargs="+", default=[], help="further settings of each run")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "robustness" / "results.jsonl")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(6)))
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--strengths", nargs="+", default=None, help="for one method, instead of the study's strengths")
    arguments = parser.parse_args()
    run(arguments) if arguments.what == "run" else report(arguments)


if __name__ == "__main__":
    main()
