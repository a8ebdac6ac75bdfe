"""Study of the command line's default penalties on digits, each compared with no penalty, paired by seed.

    python benchmarks/defaults_study.py run                               # every regularizer's defaults, the small CNN
    python benchmarks/defaults_study.py run --models mlp vit --regularizers none hessian_trace --seeds 0 1 2
    python benchmarks/defaults_study.py run regularizer=hessian_trace regularizer.strength=3e-4,3e-3    # other settings
    python benchmarks/defaults_study.py run --along regularizer=hessian_trace regularizer.penalty.method=autograd
    python benchmarks/defaults_study.py report                            # the tables of docs/headline.md
    python benchmarks/defaults_study.py report --all                      # every setting in the file
    python benchmarks/defaults_study.py along                             # measurements along training

A run is `lightning-hessian` with the given overrides, in this process: data, model, Classifier, Trainer and strength
come from conf/. Runs with a result in the file are skipped, so an interrupted study can be resumed. Resolved settings
identify a run, so it is repeated if a default changes.

Measurements: test accuracy and loss; training loss of the last epoch; trace and extreme eigenvalues (20 steps of
Lanczos) of the Hessian of the mean loss over 500 training images, in evaluation mode as in the command, but with 50
probes, and with batch norm in training mode as in the penalty (10 probes, batches of 32). On the test images, in
evaluation mode: the input penalties, exactly or nearly (the Jacobian over all outputs, 10 steps of Lanczos), and the
accuracy under PGD (40 steps, Linf) of radius 0.05 and 0.1 with pixels in [0, 1].
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

import hydra  # noqa: E402
import lightning as L  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402

import lightning_hessian as lh  # noqa: E402
from lightning_hessian.cli.classifier import Classifier  # noqa: E402
from lightning_hessian.cli.data import ImageData  # noqa: E402
from lightning_hessian.cli.final_curvature import LANCZOS  # noqa: E402
from lightning_hessian.cli.parts import make_data, make_module  # noqa: E402
from lightning_hessian.cli.settings import config_directory  # noqa: E402
from lightning_hessian.curvature import select_parameters  # noqa: E402
from lightning_hessian.monitoring.measurement import Measurement, MeasurementConfig  # noqa: E402
from lightning_hessian.step.lightning_loop import LightningLoop  # noqa: E402

REGULARIZERS = (
    "none",
    "hessian_trace",
    "hessian_norm",
    "input_gradient",
    "jacobian",
    "input_hessian",
    "input_gradient_hessian",
)
MODELS = ("cnn", "mlp", "vit", "softplus_cnn", "resnet18")
PROBES = 50
WATCHED = (1, 2, 4, 6, 8, 10)
RADII = (0.05, 0.1)
ON_INPUTS = {
    "input gradient": lambda: lh.InputGradientNorm(),
    "input Hessian": lambda: lh.InputHessianNorm(10, "lanczos"),
    "Jacobian": lambda: lh.JacobianNorm(-1),
}
QUIET = ("trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "trainer.enable_model_summary=false")


def composed(model: str, overrides: list[str], seed: int = 0) -> DictConfig:
    return hydra.compose("config", [*QUIET, "logger=none", f"model={model}", f"seed={seed}", *overrides])


def settings_of(config: DictConfig) -> dict[str, Any]:
    """Settings that identify a run: the regularizer's resolved settings that are not None, flattened, and the learning
    rate if it is not 0.1."""
    plain = OmegaConf.to_container(config.regularizer, resolve=True)
    parts = plain.pop("penalty", [])
    name = "+".join(part["_target_"].rpartition(".")[2] for part in (parts if isinstance(parts, list) else [parts]))
    found = {"penalty": name or "none"}
    if isinstance(parts, dict):
        found |= {key: value for key, value in parts.items() if key != "_target_" and value is not None}
    unseen = {"_target_", "seed", "on_nonfinite"} | ({"start"} if plain.get("start") == 0 else set())
    found |= {key: value for key, value in plain.items() if key not in unseen}
    return found | ({} if config.optimizer.lr == 0.1 else {"lr": config.optimizer.lr})


def key_of(row: dict) -> str:
    """Identifies a run, without its seed."""
    return json.dumps([row["model"], row["settings"]], sort_keys=True)


def train(config: DictConfig, along: bool) -> dict:
    """One run, like `lightning_hessian.cli.run.train`."""
    torch.set_flush_denormal(True)
    L.seed_everything(config.seed, workers=True, verbose=False)
    data = make_data(config.data)
    module = make_module(config, data)
    regularizer = hydra.utils.instantiate(config.regularizer) if config.regularizer else None
    callbacks = [] if regularizer is None else [regularizer]
    watch = Along(data, regularizer)
    trainer = hydra.utils.instantiate(
        config.trainer, callbacks=callbacks + [watch] * along, logger=False, enable_checkpointing=False
    )
    start = time.process_time()
    trainer.fit(module, data)
    row = {"seconds": round(time.process_time() - start, 1)}
    row["train loss"] = float(trainer.callback_metrics["train/loss"])
    row["skipped steps"] = regularizer.nonfinite_steps if regularizer else 0
    trainer.test(module, data, verbose=False)
    row |= {name: float(trainer.callback_metrics[f"test/{name}"]) for name in ("accuracy", "loss")}
    batches = data.training_samples(config.trace.samples)
    whole = [tuple(torch.cat(parts) for parts in zip(*batches, strict=True))]
    row |= curvature(trainer, module, whole, PROBES, training=False)
    found = curvature(trainer, module, batches, config.trace.probes, training=True)
    row |= {f"training-mode {name}": value for name, value in found.items()}
    return row | on_inputs(module, data) | {"along": watch.rows}


def curvature(
    trainer: L.Trainer, module: Classifier, batches: list, probes: int, training: bool, lanczos: int = LANCZOS
) -> dict:
    """Curvature with all layers in evaluation mode or in training mode."""
    config = MeasurementConfig(
        probes=probes, eigenvalues=1, iterations=lanczos, density_runs=0, layers={}, spaces={}, seed=0
    )
    parameters = select_parameters(dict(module.named_parameters()))
    was = module.training
    module.train(training)
    found, _ = Measurement(
        LightningLoop(trainer, module),
        module,
        batches=batches,
        parameters=parameters,
        config=config,
        training_mode=training,
        loss=lambda module, batch: module.loss(batch),
    ).measure(0, None)
    module.train(was)
    return {"trace": found.trace.estimate, "largest": found.largest[0][0], "smallest": found.smallest[0][0]}


def on_inputs(module: Classifier, data: ImageData) -> dict:
    """Input penalties and accuracy under attack, on the test images in evaluation mode."""
    module.eval()
    batches = [data.on_after_batch_transfer(batch, 0) for batch in data.test_dataloader()]
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    context = lh.StepContext.evaluate(lambda x: module.loss((x, labels)), images, dict(module.named_parameters()))
    row = {name: penalty()(context).item() for name, penalty in ON_INPUTS.items()}
    (mean,), (std,) = data.mean, data.std
    for radius in RADII:
        attack = lh.PGD(radius / std, bounds=(-mean / std, (1 - mean) / std))
        right = module(attack(module, images, labels)).argmax(1) == labels
        row[f"PGD {radius:g}"] = right.float().mean().item()
    return row


class Along(L.Callback):
    """Measures after some epochs: means over the steps, and the curvature on 128 training images in both modes.

    "share" is the norm of the penalty's gradient divided by that of the task loss; "weights" is the weights' norm.
    """

    def __init__(self, data: ImageData, regularizer: lh.HessianRegularizer | None) -> None:
        self.data = data
        self.regularizer = regularizer
        self.rows: list[dict] = []
        self._steps: list[tuple[float, float, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Classifier, outputs: Any, *_: Any) -> None:
        added = float(trainer.callback_metrics.get("train/penalty", 0.0))
        self._steps.append((outputs["loss"].item() - added, added, abs(added)))

    def on_train_epoch_end(self, trainer: L.Trainer, module: Classifier) -> None:
        if trainer.current_epoch + 1 not in WATCHED:
            self._steps.clear()
            return
        batches = self.data.training_samples(128)
        loss, added, size = map(statistics.mean, zip(*self._steps, strict=True))
        row = {"epoch": trainer.current_epoch + 1, "loss": loss, "penalty": added, "|penalty|": size}
        for mode, training in (("", False), ("training-mode ", True)):
            found = curvature(trainer, module, batches, 5, training, 15)
            row |= {mode + name: value for name, value in found.items()}
        row["weights"] = torch.cat([p.detach().flatten() for p in module.parameters()]).norm().item()
        if self.regularizer is not None and not self.regularizer.penalties[0].needs.differences:
            strength = self.regularizer.strengths_at(trainer.global_step)[0]
            penalty = self.regularizer.penalties[0]
            try:
                equal = lh.suggest_strength(module, batches, penalty, 1.0, lambda module, batch: module.loss(batch))
                row["share"] = strength / equal.strength
            except ValueError:  # a value below the clamp has no gradient
                row["share"] = 0.0
        self._steps.clear()
        self.rows.append(row)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def sweep(overrides: list[str]) -> list[list[str]]:
    """All combinations of comma-separated values. A value in brackets is not split."""
    split = [text.partition("=") for text in overrides]
    choices = [
        [f"{name}={one}" for one in ([values] if "[" in values else values.split(","))] for name, _, values in split
    ]
    return [list(chosen) for chosen in itertools.product(*choices)]


def run(arguments: argparse.Namespace) -> None:
    rows = read(arguments.results)
    done = {(key_of(row), row["seed"]) for row in rows if row["along"] or not arguments.along}
    wanted = (
        sweep(arguments.overrides) if arguments.overrides else [[f"regularizer={r}"] for r in arguments.regularizers]
    )
    for seed, model, overrides in itertools.product(arguments.seeds, arguments.models, wanted):
        config = composed(model, overrides, seed)
        row = {"model": model, "settings": settings_of(config), "seed": seed, "along": []}
        if (key_of(row), seed) not in done:
            row |= train(config, arguments.along)
            arguments.results.parent.mkdir(parents=True, exist_ok=True)
            with arguments.results.open("a") as file:
                file.write(json.dumps(rounded(row)) + "\n")
            print(f"{model} {' '.join(overrides)} seed={seed}: {row['accuracy']:.4f} {row['loss']:.4f}", end=" ")
            print(f"trace {row['trace']:.2f} largest {row['largest']:.2f} ({row['seconds']} s)", flush=True)


def label(settings: dict) -> str:
    """The penalty and its non-default settings."""
    usual = {"probes": 1, "keep": 1.0, "drop": "tensor", "scale": "none", "every_n_steps": 1, "warmup_steps": 0}
    usual |= {"iterations": 1, "search": "power", "squared": False, "step": 0.01, "projections": 1, "_convert_": "all"}
    left = {key: value for key, value in settings.items() if usual.get(key) != value and key != "penalty"}
    if left.get("method") == "autograd" and settings["penalty"] != "HessianTrace":
        del left["method"]
    return ", ".join([settings["penalty"], *(v if k == "method" else f"{k} {v}" for k, v in left.items())])


def mean_and_error(values: list[float], digits: int, sign: str = "") -> str:
    finite = all(map(math.isfinite, values))  # some runs have diverged
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 and finite else ""
    return f"{statistics.mean(values):{sign}.{digits}f}{error}"


COLUMNS = {
    "test accuracy (%)": ("accuracy", 100, 2),
    "test loss": ("loss", 1, 4),
    "trace": ("trace", 1, 2),
    "largest eigenvalue": ("largest", 1, 3),
    "trace, training mode": ("training-mode trace", 1, 2),
    "largest, training mode": ("training-mode largest", 1, 3),
}
INPUT_COLUMNS = {
    "test accuracy (%)": ("accuracy", 100, 2),
    "test loss": ("loss", 1, 4),
    "input gradient": ("input gradient", 1, 3),
    "Jacobian": ("Jacobian", 1, 1),
    "input Hessian": ("input Hessian", 1, 3),
    "PGD 0.05 (%)": ("PGD 0.05", 100, 1),
    "PGD 0.1 (%)": ("PGD 0.1", 100, 1),
}


def table(groups: list[list[dict]], none: dict[int, dict], columns: dict[str, tuple[str, float, int]]) -> None:
    """One row per group of runs: the mean, and below it the difference to no penalty, paired by seed."""
    print("| penalty | seeds | " + " | ".join(columns) + " |")
    print("| --- | --- |" + " --- |" * len(columns))
    for own in groups:
        cells = []
        for key, scale, digits in columns.values():
            cell = mean_and_error([scale * row[key] for row in own], digits)
            pairs = [scale * (row[key] - none[row["seed"]][key]) for row in own if row["seed"] in none]
            if pairs and own[0]["settings"]["penalty"] != "none":
                cell += f"<br>{mean_and_error(pairs, digits, '+')} ({sum(d < 0 for d in pairs)} lower)"
            cells.append(cell)
        print(f"| {label(own[0]['settings'])} | {len(own)} | " + " | ".join(cells) + " |")
    print()


def report(arguments: argparse.Namespace) -> None:
    groups: dict[str, dict[int, dict]] = {}
    for row in read(arguments.results):
        groups.setdefault(key_of(row), {})[row["seed"]] = row
    print(
        "Mean ± standard error over seeds; below, the paired difference to none, and in how many seeds it is lower.\n"
    )
    for model in MODELS:
        configs = [composed(model, [f"regularizer={name}"]) for name in REGULARIZERS]
        keys = [key_of({"model": model, "settings": settings_of(config)}) for config in configs]
        if arguments.all:
            keys = keys[:1] + sorted(key for key in groups if json.loads(key)[0] == model and key != keys[0])
        found = [list(groups[key].values()) for key in keys if key in groups]
        if not found:
            continue
        on_weights = [own for own in found if own[0]["settings"]["penalty"] in ("none", "HessianTrace", "HessianNorm")]
        on_inputs = [own for own in found if own not in on_weights[1:]]
        for part, columns in ((on_weights, COLUMNS), (on_inputs, INPUT_COLUMNS)):
            if len(part) > 1:
                print(f"**{model}**\n")
                table(part, groups.get(keys[0], {}), columns)


def along(arguments: argparse.Namespace) -> None:
    groups: dict[str, dict[int, dict]] = {}
    for row in read(arguments.results):
        exact = (row["settings"]["penalty"], row["settings"].get("method")) == ("HessianTrace", "autograd")
        if row["along"] or exact:
            groups.setdefault(key_of(row), {})[row["seed"]] = row
    ends = [
        {
            "setting": label(one["settings"]),
            "test accuracy (%)": 100 * one["accuracy"],
            "test loss": one["loss"],
            "weights after epoch 1": one["along"][0]["weights"] if one["along"] else None,
            "training loss": one["train loss"],
            "penalty at the end": one["along"][-1]["|penalty|"] if one["along"] else None,
            "trace": one["trace"],
            "trace, training mode": one["training-mode trace"],
            "smallest eigenvalue, training mode": one["training-mode smallest"],
        }
        for own in groups.values()
        for one in own.values()
    ]
    averaged(
        [[end for end in ends if end["setting"] == name] for name in dict.fromkeys(end["setting"] for end in ends)]
    )
    for own in groups.values():
        if all(row["along"] for row in own.values()):
            first = next(iter(own.values()))
            print(f"**{first['model']}, {label(first['settings'])}**\n")
            averaged(list(zip(*(row["along"] for row in own.values()), strict=True)))


def averaged(groups: Sequence[Sequence[dict]]) -> None:
    """A table with one row per group: the means of its numbers."""
    names = list(groups[0][-1]) + [name for name in groups[-1][0] if name not in groups[0][-1]]
    print("| " + " | ".join(names) + " |\n|" + " --- |" * len(names))
    for group in groups:
        cells = []
        for name in names:
            values = [one[name] for one in group if one.get(name) is not None]
            text = isinstance(group[0].get(name), str)
            cells.append(group[0][name] if text else f"{statistics.mean(values):.3g}" if values else "")
        print("| " + " | ".join(cells) + " |")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "report", "along"])
    parser.add_argument("overrides", nargs="*", help="overrides of the command line, instead of --regularizers")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "headline" / "results.jsonl")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["cnn"])
    parser.add_argument("--regularizers", nargs="+", choices=REGULARIZERS, default=REGULARIZERS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--all", action="store_true", help="report every setting in the file")
    parser.add_argument("--along", action="store_true", help="measure along training as well")
    arguments = parser.parse_intermixed_args()
    with hydra.initialize_config_dir(str(config_directory()), version_base="1.3"):
        globals()[arguments.what](arguments)


if __name__ == "__main__":
    main()
