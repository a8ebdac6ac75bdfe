"""One share of the gradient on every model of the command line, against one strength on every model.

    python benchmarks/share_study.py run                          # every setting; runs in the file are skipped
    python benchmarks/share_study.py run --models mlp cnn --seeds 0 --settings jacobian
    python benchmarks/share_study.py report                       # the table of docs/methods.md

Trains on digits as `lightning-hessian` does, with the penalty and each strength, and without a penalty. (The trace
penalty has a warm-up of 40 steps, because training has 190 to 380.) The report compares each run with the run without a
penalty of the same model and seed, by the test accuracy and by what the penalty measures, at the end of training: the
trace of the mean loss over training images, or a mean over the test images.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import math
import statistics
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

import hydra  # noqa: E402
import torch  # noqa: E402
from auto_strengths import MODELS, TWO_POINTS  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

import lightning_hessian as lh  # noqa: E402
from lightning_hessian.cli.parts import make_data, make_module  # noqa: E402
from lightning_hessian.cli.run import LAST, train  # noqa: E402

NONE = "none"
_TRACE = ["regularizer=hessian_trace", "regularizer.warmup_steps=40"]
SETTINGS: dict[str, tuple[list[str], str, tuple[str, ...]]] = {
    "trace, scaled": ([*_TRACE, "regularizer.penalty.scale=parameter"], "trace", ("3e-3", "3e-2", "3e-1")),
    "trace": ([*_TRACE, "regularizer.penalty.scale=none"], "trace", ("1e-4", "1e-3", "1e-2", "1e-1")),
    "input gradient": (["regularizer=input_gradient"], "input gradient", ("1e-2", "1e-1", "1")),
    "Jacobian": (["regularizer=jacobian"], "Jacobian", ("1e-5", "1e-4", "1e-3")),
}
"""For each penalty its settings, what it measures, and the strengths beside the share."""
SHARE = "share:0.1"
SEEDS = {"resnet18": 3}
"""Number of seeds of the slow model; five of the others."""


def settings_of(model: str, penalty: str, strength: str, seed: int) -> list[str]:
    settings = [f"model={model}", f"seed={seed}", "logger=none", *MODELS[model]]
    settings += ["trainer.enable_progress_bar=false", "trainer.enable_model_summary=false"]
    if model == "resnet18":
        settings += ["trace.samples=64", "trace.probes=5"]
    if strength == NONE:
        return [*settings, "regularizer=none"]
    return [*settings, *SETTINGS[penalty][0], f"regularizer.strength={strength}"]


def run(settings: Sequence[str]) -> dict[str, float]:
    """Test accuracy and loss, and what the penalties measure at the end; NaN where training diverged."""
    config = hydra.compose("config", list(settings))
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
        outcome = train(config, Path(directory))
        inputs = on_inputs(config, Path(directory))
    trace = outcome.curvature.trace.estimate
    return {"accuracy": outcome.test_accuracy, "loss": outcome.test_loss, "trace": trace, **inputs}


def on_inputs(config: DictConfig, directory: Path) -> dict[str, float]:
    """The penalties on the inputs, of the last weights and the test images."""
    data = make_data(config.data)
    module: Any = make_module(config, data)
    module.load_state_dict(torch.load(directory / LAST, weights_only=False)["state_dict"])
    module.eval()
    batches = [data.on_after_batch_transfer(batch, 0) for batch in data.test_dataloader()]
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    context = lh.StepContext.evaluate(lambda x: module.loss((x, labels)), images, dict(module.named_parameters()))
    penalties = {"input gradient": lh.InputGradientNorm(), "Jacobian": lh.JacobianNorm(-1)}
    return {name: penalty(context).item() for name, penalty in penalties.items()}


def study(arguments: argparse.Namespace) -> None:
    done = {key_of(row) for row in rows_in(arguments.file)}
    pairs = [(name, x) for name in arguments.settings for x in (SHARE, *SETTINGS[name][2])]
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for seed in arguments.seeds:
            for model in arguments.models:
                for penalty, strength in [(NONE, NONE), *pairs]:
                    row: dict[str, Any] = {"model": model, "penalty": penalty, "strength": strength, "seed": seed}
                    if key_of(row) in done or seed >= SEEDS.get(model, seed + 1):
                        continue
                    row |= run(settings_of(model, penalty, strength, seed))
                    with arguments.file.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    print(json.dumps(row), flush=True)


def rows_in(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def key_of(row: dict[str, Any]) -> tuple[str, str, str, int]:
    return row["model"], row["penalty"], row["strength"], row["seed"]


def report(file: Path) -> None:
    rows = rows_in(file)
    models = [model for model in MODELS if any(row["model"] == model for row in rows)]
    print(f"| penalty | strength | {' | '.join(models)} |\n|" + " --- |" * (len(models) + 2))
    for penalty, (_, measure, _) in SETTINGS.items():
        own = [row for row in rows if row["penalty"] == penalty]
        for strength in dict.fromkeys(row["strength"] for row in own):
            cells = [cell_of(rows, model, penalty, strength, measure) for model in models]
            print(f"| {penalty} | `{strength}` | {' | '.join(cells)} |")


def cell_of(rows: Sequence[dict[str, Any]], model: str, penalty: str, strength: str, measure: str) -> str:
    """Change of the mean accuracy, in points, and the measure's mean ratio, against the runs without a penalty."""
    here = [row for row in rows if row["model"] == model]
    plain = {row["seed"]: row for row in here if row["strength"] == NONE and measure in row}
    own = [row for row in here if (row["penalty"], row["strength"]) == (penalty, strength) and row["seed"] in plain]
    if not own:
        return ""
    change = mean_of([row["accuracy"] - plain[row["seed"]]["accuracy"] for row in own])
    ratio = math.exp(mean_of([logarithm(row[measure]) - logarithm(plain[row["seed"]][measure]) for row in own]))
    trains = change >= -TWO_POINTS
    cell = f"{100 * change:+.1f}, x {ratio:.2f}"
    return cell if trains and ratio < 1 else f"{cell} (worse)" if not trains else f"{cell} (not lower)"


def logarithm(value: float) -> float:
    return math.log(value) if value > 0 else math.nan


def mean_of(values: Sequence[float]) -> float:
    return statistics.mean(values) if all(map(math.isfinite, values)) else math.nan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--seeds", nargs="+", type=int, default=range(5))
    parser.add_argument("--file", type=Path, default=ROOT / "docs" / "methods" / "share.jsonl")
    arguments = parser.parse_args()
    if arguments.command == "report":
        return report(arguments.file)
    arguments.file.parent.mkdir(exist_ok=True)
    study(arguments)


if __name__ == "__main__":
    main()
