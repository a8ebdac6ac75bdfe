"""Results of a finished run: printed at its end, kept in its results.json."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_hessian.monitoring.measurement import Curvature

FILE = "results.json"
"""In the folder of a finished run."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a sweep optimizes.

    Args:
        metric: name of a validation metric.
        direction: ``"minimize"`` or ``"maximize"``.
        value: the best value over the epochs; None if the metric was never finite.
    """

    metric: str
    direction: str
    value: float | None

    @property
    def number(self) -> float:
        """The value, or the worst one: some sweepers stop at NaN."""
        worst = math.inf if self.direction == "minimize" else -math.inf
        return worst if self.value is None else self.value


@dataclass(frozen=True, kw_only=True)
class Results:
    """Results of a finished run.

    Args:
        metrics: what the test logged, by name. NaN where training diverged.
        curvature: of the mean loss over ``images`` training samples, in evaluation mode. ``stability`` uses the initial
            learning rate, which is the highest.
        images: number of training samples for ``curvature``.
        training_loss: the mean loss on the same samples, in evaluation mode.
        objective: None where none is set.
        tested: which weights were tested and measured: ``"last"`` or ``"best"``.
        epoch: the epoch from which they are.
        epochs: the metrics after each epoch, by name.
        seconds_per_step: of training; None without a step.
        settings: as asked for.
        overrides: the settings given on the command line, in order.
        choices: what was chosen of each group of settings, by the group's name.
        directory: the run's files.
        tensorboard: whether the run wrote TensorBoard events.
    """

    metrics: dict[str, float]
    curvature: Curvature
    images: int
    directory: Path
    training_loss: float | None = None
    objective: Objective | None = None
    tested: str = "last"
    epoch: int | None = None
    epochs: list[dict[str, float]] = field(default_factory=list)
    seconds_per_step: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    choices: dict[str, str | None] = field(default_factory=dict)
    tensorboard: bool = False

    @property
    def test_accuracy(self) -> float:
        """NaN if the test logs none."""
        return self.metrics.get("test/accuracy", math.nan)

    @property
    def test_loss(self) -> float:
        """NaN if the test logs none."""
        return self.metrics.get("test/loss", math.nan)

    @property
    def robustness(self) -> dict[str, float]:
        """What :class:`AdversarialAccuracy` logged in the test, by name."""
        return {name: value for name, value in self.metrics.items() if name.startswith("robust/")}

    def scalars(self) -> dict[str, float]:
        """All final numbers, by the names they have in logs and tables."""
        named = {**self.metrics, **{f"final/{name}": value for name, value in _main(self.curvature).items()}}
        if self.training_loss is not None:
            named["final/training_loss"] = self.training_loss
        if self.objective is not None and self.objective.value is not None:
            named[f"best/{self.objective.metric}"] = self.objective.value
        return named

    def save(self) -> None:
        """Write results.json into the directory; the file is there as a whole or not at all."""
        state = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        state["curvature"] = self.curvature.state_dict()
        state["objective"] = None if self.objective is None else dataclasses.asdict(self.objective)
        state["directory"] = str(self.directory)
        partial = self.directory / f"{FILE}.partial"
        state["metrics"] = {k: x if math.isfinite(x) else None for k, x in self.metrics.items()}  # JSON has no NaN
        partial.write_text(json.dumps(state, indent=1))
        partial.replace(self.directory / FILE)

    @classmethod
    def load(cls, directory: Path) -> Results:
        """The results in a folder, wherever it has been moved.

        Raises:
            ValueError: the folder has no results, or they cannot be read.
        """
        path = directory / FILE
        if not path.is_file():
            raise ValueError(f"{directory} has no {FILE}: it is not the folder of a finished run.")
        try:
            state = json.loads(path.read_text())
            state["curvature"] = Curvature.from_state_dict(state["curvature"])
            state["metrics"] = {k: math.nan if x is None else x for k, x in state["metrics"].items()}
            state["objective"] = None if state["objective"] is None else Objective(**state["objective"])
            return cls(**{**state, "directory": directory})
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path} cannot be read ({error}). It is damaged, or was written by another version of this package."
            ) from error

    def __str__(self) -> str:
        trace, (eigenvalue, residual) = self.curvature.trace, self.curvature.largest[0]
        usual = [f"{name:<20}{self.metrics[key]:.4f}" for name, key in _USUAL.items() if key in self.metrics]
        told = [*_USUAL.values(), *(name for name in self.metrics if name.startswith("curvature/"))]
        others = {name: value for name, value in self.metrics.items() if name not in told}
        lines = [
            *usual,
            f"Hessian trace       {trace.estimate:.4g} +- {trace.standard_error:.2g} "
            f"({trace.matvecs} probes, {self.images} training samples, evaluation mode)",
            f"largest eigenvalue  {eigenvalue:.4g} (residual {residual:.1g})",
        ]
        if self.curvature.stability is not None:
            lines.append(
                f"stability           {self.curvature.stability:.3g} (learning rate {self.curvature.learning_rate:g} x "
                "largest eigenvalue / 2; plain gradient descent is unstable above 1)"
            )
        lines += [f"{name.removeprefix('robust/'):<30}{value:.4f}" for name, value in others.items()]
        lines.append(f"tested              {self._tested()}")
        lines.append(f"files               {self.directory}")
        if self.tensorboard:
            lines.append(f"TensorBoard         {_TENSORBOARD} --logdir '{self.directory}'")
        return "\n".join(lines)

    def _tested(self) -> str:
        at = "" if self.epoch is None else f" of epoch {self.epoch}"
        if self.objective is None:
            return f"the {self.tested} weights{at}"
        metric = self.objective.metric
        if self.objective.value is None:
            return f"the {self.tested} weights{at} ({metric} was never finite)"
        last = next((epoch[metric] for epoch in reversed(self.epochs) if metric in epoch), None)
        end = f", {last:.4f} at the end" if last is not None and self.tested == "last" else ""
        return f"the {self.tested} weights{at} (best {metric} {self.objective.value:.4f}{end})"


def comparison_table(runs: Mapping[str, Results]) -> str:
    """A table of the main results, one column per run.

    Example:
        >>> from lightning_hessian.curvature import Estimate
        >>> trace, norm = Estimate(4.0, 0.5, 10), Estimate(1.0, 0.1, 10)
        >>> ends = {"largest": [(2.0, 0.01)], "smallest": [(0.0, 0.01)]}
        >>> curvature = Curvature(step=9, trace=trace, frobenius_norm=norm, layers={}, **ends)
        >>> metrics = {"test/accuracy": 0.9, "test/loss": 0.3}
        >>> run = Results(metrics=metrics, curvature=curvature, images=500, directory=Path("here"))
        >>> print(comparison_table({"this run": run}))
        <BLANKLINE>
                            this run
        test accuracy       0.9000
        test loss           0.3000
        Hessian trace       4 +- 0.5
        largest eigenvalue  2
        files               here
    """
    rows = [["", *runs]]
    for name, key in _USUAL.items():
        if not any(key in one.metrics for one in runs.values()):
            continue
        rows.append([name, *(f"{one.metrics.get(key, math.nan):.4f}" for one in runs.values())])
    traces = [one.curvature.trace for one in runs.values()]
    rows.append(["Hessian trace", *(f"{trace.estimate:.4g} +- {trace.standard_error:.2g}" for trace in traces)])
    rows.append(["largest eigenvalue", *(f"{one.curvature.largest[0][0]:.4g}" for one in runs.values())])
    rows.append(["files", *(str(one.directory) for one in runs.values())])
    widths = [max(len(row[i]) for row in rows[:-1]) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n" + "\n".join(lines)


def _main(curvature: Curvature) -> dict[str, float]:
    named = {
        "trace": curvature.trace.estimate,
        "trace_standard_error": curvature.trace.standard_error,
        "largest_eigenvalue": curvature.largest[0][0],
        "smallest_eigenvalue": curvature.smallest[0][0],
    }
    if curvature.stability is not None:
        named["stability"] = curvature.stability
    if curvature.relative_trace is not None and curvature.relative_largest is not None:
        named["relative_trace"] = curvature.relative_trace.estimate
        named["relative_largest_eigenvalue"] = curvature.relative_largest[0]
    return named


_USUAL = {
    "test accuracy": "test/accuracy",
    "test loss": "test/loss",
    "test perplexity": "test/perplexity",
    "calibration error": "test/calibration_error",
}

# The executable of this environment, which may not be on the PATH.
_TENSORBOARD = shutil.which("tensorboard") or Path(sys.executable).with_name("tensorboard")
