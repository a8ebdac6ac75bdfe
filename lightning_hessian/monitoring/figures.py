"""Figures of curvature. They import matplotlib on first use, because it is optional."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from lightning_hessian.curvature import SpectralDensity
from lightning_hessian.monitoring.measurement import Curvature

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_UNITS = "loss / parameter²"


def eigenvalues_over_training(history: Sequence[Curvature]) -> Figure:
    """Extreme eigenvalues against the optimizer step, with 2 / learning rate if it is known."""
    figure, axes = _figure()
    for name, color, label in (("largest", "C3", "largest"), ("smallest", "C0", "smallest")):
        for rank in range(len(getattr(history[-1], name))):
            # A resumed run may measure more eigenvalues than before.
            pairs = [(one.step, getattr(one, name)[rank][0]) for one in history if rank < len(getattr(one, name))]
            axes.plot(
                *zip(*pairs, strict=True), "o-", color=color, markersize=3, linewidth=1, label=None if rank else label
            )
    edges = [(one.step, 2 / one.learning_rate) for one in history if one.learning_rate]
    # With a decaying learning rate the edge grows without bound and would hide the eigenvalues.
    highest = max(one.largest[0][0] for one in history)
    edges = [edge for edge in edges if edge[1] < 3 * highest]
    if edges:
        axes.plot(*zip(*edges, strict=True), "k--", linewidth=1, label="2 / learning rate")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="optimizer step", ylabel=f"eigenvalue ({_UNITS})")
    axes.set_title(f"Eigenvalues over training, step {history[-1].step}")
    axes.legend(frameon=False)
    return figure


def spectral_density(density: SpectralDensity, step: int) -> Figure:
    """The density of eigenvalues on a logarithmic axis, which shows both the bulk at 0 and the outliers."""
    figure, axes = _figure()
    low, high = density.nodes.min().item(), density.nodes.max().item()
    width = max(high - low, abs(high), 1e-12) / 100
    grid = torch.linspace(low - 5 * width, high + 5 * width, 2000, dtype=density.nodes.dtype, device="cpu")
    values = density.on_grid(grid.to(density.nodes.device), width).cpu()
    axes.semilogy(grid.numpy(), values.numpy(), color="C0", linewidth=1)
    highest = values.max().item()
    axes.set_ylim(max(highest * 1e-8, 1e-12), 5 * highest)
    axes.set(
        xlabel=f"eigenvalue of the Hessian ({_UNITS})",
        ylabel="density (parameter² / loss)",
        title=f"Spectral density, step {step} (Gaussian of {width:.2g})",
    )
    return figure


def traces_by_layer(curvature: Curvature) -> Figure:
    """One bar per group of parameters, with its standard error."""
    names = list(curvature.layers)
    figure, axes = _figure(height=max(2.2, 0.28 * len(names) + 1.2))
    traces = [curvature.layers[name].estimate for name in names]
    errors = [curvature.layers[name].standard_error for name in names]
    axes.barh(names, traces, xerr=errors, color="C0", error_kw={"linewidth": 1})
    axes.invert_yaxis()  # the first layer on top
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(
        xlabel=f"trace of the layer's block ({_UNITS}), ± standard error",
        title=f"Trace by layer, step {curvature.step}",
    )
    return figure


def _figure(height: float = 3.2) -> tuple[Figure, Any]:
    # Not with pyplot: it keeps figures alive and may open windows.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, height), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
