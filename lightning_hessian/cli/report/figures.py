"""The plots of a report, for light and for dark pages."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from lightning_hessian.cli.report.runs import Run
from lightning_hessian.cli.report.table import NONE, Group, Mean, label_of, others_of, scalars

MODES = {"light": ("#1b1f24", "#ffffff"), "dark": ("#e6e8ea", "#15181c")}
"""Colors of the text and of the page."""
_MOST = 8
"""More groups than this make a plot unreadable: the first are drawn."""
_COLORS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#76b7b2", "#edc948", "#9c755f")


def draw_all(groups: Sequence[Group], directory: Path) -> dict[str, str]:
    """Write each plot for both modes as ``<name>_<mode>.png``; their captions by name."""
    captions = {}
    for mode, (ink, paper) in MODES.items():
        style: dict[Any, Any] = {
            **{f"{part}.color": ink for part in ("text", "xtick", "ytick")},
            **{f"axes.{part}": ink for part in ("labelcolor", "edgecolor", "titlecolor")},
            "figure.facecolor": paper,
            "axes.facecolor": paper,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.prop_cycle": plt.cycler(color=_COLORS),
            "legend.frameon": False,
            "savefig.dpi": 130,
        }
        with plt.rc_context(style):
            for name, caption, figure in _figures(groups):
                figure.savefig(directory / f"{name}_{mode}.png")
                plt.close(figure)
                captions[name] = caption
    return captions


def _figures(groups: Sequence[Group]) -> Iterator[tuple[str, str, Figure]]:
    if (figure := _over_strength(groups)) is not None:
        caption = "Means over the seeds, with their standard errors. Strength 0 is at the left edge."
        yield "strength", caption + " Dashed: no penalty." * bool(_without_strength(groups)), figure
    if (figure := _over_epochs(groups)) is not None:
        shown = f" The first {_MOST} groups of the table." if len(groups) > _MOST else ""
        yield "epochs", f"Validation after each epoch, means over the seeds.{shown}", figure
    if (figure := _sharpness(groups)) is not None:
        yield (
            "sharpness",
            "The trace of the Hessian at the end of each run, against the test loss less the training loss.",
            figure,
        )


def _strength_of(groups: Sequence[Group]) -> str:
    """The name of the strength in the groups' settings; empty if they do not differ in it."""
    named = [name for name in groups[0].settings if name.endswith("strength")]
    return min(named, key=lambda name: "baseline" in name, default="")


def _without_strength(groups: Sequence[Group]) -> list[Group]:
    name = _strength_of(groups)
    return [group for group in groups if group.is_reference and group.settings.get(name) == NONE]


def _over_strength(groups: Sequence[Group]) -> Figure | None:
    """Accuracy and trace over the strength, one line for each combination of the other settings.

    Runs with no penalty at all have no strength: they are a dashed line across.
    """
    name = _strength_of(groups)
    lines: dict[str, list[tuple[float, Group]]] = {}
    for group in groups:
        strength = _number(group.settings.get(name, ""))
        if strength is not None:
            lines.setdefault(group.label_without(name), []).append((strength, group))
    lines = {others: points for others, points in lines.items() if len(points) > 1}
    plain = _without_strength(groups)
    known = {name for run in groups[0].runs for name in scalars(run)}
    metrics = [metric for metric in ("test/accuracy", "final/trace") if metric in known]
    if not lines or not metrics:
        return None
    positive = [x for points in lines.values() for x, _ in points if x > 0]
    figure, axes = plt.subplots(1, len(metrics), figsize=(4.2 * len(metrics), 3.4), layout="constrained", squeeze=False)
    for axis, metric in zip(axes[0], metrics, strict=True):
        for others, points in list(lines.items())[:_MOST]:
            xs, groups_here = zip(*sorted(points, key=lambda pair: pair[0]), strict=True)
            _line(axis, list(xs), [group.mean(metric) for group in groups_here], others)
        for group in plain[:_MOST]:
            like_it = [i for i, points in enumerate(lines.values()) if others_of(points[0][1]) == others_of(group)]
            color = _COLORS[like_it[0] % len(_COLORS)] if len(plain) > 1 and len(like_it) == 1 else "gray"
            axis.axhline(group.mean(metric).value, color=color, linestyle="--", label=group.label_without(name))
        if positive:
            axis.set_xscale("symlog", linthresh=min(positive))
        axis.set(xlabel=name, ylabel=label_of(metric))
    if any(lines) or plain:
        axes[0][0].legend(fontsize="small")
    return figure


def _over_epochs(groups: Sequence[Group]) -> Figure | None:
    names = dict.fromkeys(name for g in groups for run in g.runs for epoch in run.results.epochs for name in epoch)
    usual = ["val/accuracy", "val/loss"]
    metrics: list[str] = [name for name in usual if name in names] or [n for n in names if n.startswith("val")][:2]
    if not metrics:
        return None
    figure, axes = plt.subplots(1, len(metrics), figsize=(4.2 * len(metrics), 3.6), layout="constrained", squeeze=False)
    for axis, metric in zip(axes[0], metrics, strict=True):
        for group in groups[:_MOST]:
            by_epoch: dict[int, list[float]] = {}
            for run in group.runs:
                for epoch in run.results.epochs:
                    if metric in epoch:
                        by_epoch.setdefault(int(epoch["epoch"]), []).append(epoch[metric])
            if by_epoch:
                _line(axis, sorted(by_epoch), [Mean.of(by_epoch[epoch]) for epoch in sorted(by_epoch)], group.label)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set(xlabel="epoch", ylabel=label_of(metric))
    if len(groups) > 1:
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", fontsize="small", ncols=2)
    return figure


def _sharpness(groups: Sequence[Group]) -> Figure | None:
    points = [(group, [pair for run in group.runs if (pair := _trace_and_gap(run)) is not None]) for group in groups]
    if sum(len(found) for _, found in points) < 3:
        return None
    figure, axis = plt.subplots(figsize=(5.4, 3.8), layout="constrained")
    for group, found in points[:_MOST]:
        axis.plot([x for x, _ in found], [y for _, y in found], "o", label=group.label)
    rest = [pair for _, found in points[_MOST:] for pair in found]
    if rest:
        axis.plot([x for x, _ in rest], [y for _, y in rest], ".", color="gray", label="other groups")
    if all(x > 0 for _, found in points for x, _ in found):
        axis.set_xscale("log")
        for which in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
            which(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
    axis.set(xlabel="trace of the Hessian", ylabel="test loss - training loss")
    if len(groups) > 1:
        figure.legend(loc="outside lower center", fontsize="small", ncols=2)
    return figure


def _trace_and_gap(run: Run) -> tuple[float, float] | None:
    pair = tuple(scalars(run).get(name, math.nan) for name in ("final/trace", "generalization gap"))
    return (pair[0], pair[1]) if all(map(math.isfinite, pair)) else None


def _line(axis: Any, xs: Sequence[float], means: Sequence[Mean], label: str) -> None:
    errors = [mean.error or 0.0 for mean in means]
    axis.errorbar(xs, [mean.value for mean in means], errors, marker="o", markersize=3, capsize=2, label=label or None)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
