"""Why does the exact trace hurt where the Gauss-Newton trace helps? The two parts of v'Hv, along training.

    python benchmarks/trace_anatomy.py run      # goes on where it was stopped
    python benchmarks/trace_anatomy.py report   # the tables and the figure of docs/trace.md

With the logits z along theta + t v, z = z_0 + t z_1 + t^2/2 z_2, the cross entropy L and its derivatives in z,

    v'Hv = z_1' L'' z_1 + L' z_2 = v'Gv + rest.

Both parts are from the same probe, by Taylor mode. The variants penalize: `exact` v'Hv; `part G` v'Gv; `rest` the rest;
`absolute` |v'Hv|; `clamped` max(v'Hv, 0); `positive` v'Gv + max(rest, 0). `gauss_newton` is the package's method, with
probes over the outputs.

`digits`: the small CNN (width 32) for 10 epochs, where the exact trace at strength 1e-3 does harm. `fashion`: 2,000
images of Fashion-MNIST, the small CNN of width 16, 20 epochs. Otherwise the defaults of the command, with scale "none".
At the end the traces of H and G are measured on 500 training images with 20 probes, in evaluation and in training mode.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import logging
import os
import statistics
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")
warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

import lightning as L  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import lightning_hessian as lh  # noqa: E402
from lightning_hessian.cli import data, models  # noqa: E402
from lightning_hessian.cli.classifier import Classifier  # noqa: E402
from lightning_hessian.curvature.taylor import taylor_mode  # noqa: E402
from lightning_hessian.penalties.base import Needs  # noqa: E402

RESULTS = ROOT / "docs" / "trace" / "anatomy.jsonl"
DIGITS = [
    # variant, strength, warm-up steps, probes
    ("none", 0.0, 0, 1),
    ("exact", 1e-4, 0, 1),
    ("exact", 3e-4, 0, 1),
    ("exact", 1e-3, 0, 1),
    ("exact", 1e-3, 0, 4),
    ("exact", 1e-3, 200, 1),
    ("exact", 1e-3, 200, 4),
    ("absolute", 1e-3, 0, 1),
    ("clamped", 1e-3, 0, 1),
    ("positive", 1e-3, 0, 1),
    ("part G", 1e-3, 0, 1),
    ("rest", 1e-3, 0, 1),
    ("gauss_newton", 1e-3, 0, 1),
    ("gauss_newton", 1e-2, 0, 1),
    ("gauss_newton", 1e-2, 200, 1),
]
FASHION = [
    ("none", 0.0, 0, 1),
    *(
        (variant, strength, 80, 1)
        for strength in (1e-3, 1e-2)
        for variant in ("exact", "part G", "gauss_newton", "rest", "absolute", "clamped", "positive")
    ),
]
SEEDS = {"digits": (0, 1, 2, 3, 4), "fashion": (0, 1, 2)}


def parts(mode: taylor_mode, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """v'Gv and the rest of v'Hv for the mean cross entropy, summed over the mode's directions."""
    p = logits.softmax(1)
    first = torch.stack([z for z in mode.first(logits) if z is not None])
    g = ((p * first**2).sum(2) - (p * first).sum(2) ** 2).mean(1).sum()
    rest = ((p - F.one_hot(labels, logits.shape[1])) * mode.second(logits)).sum(1).mean()
    return g, rest


class SplitTrace(lh.HessianTrace):
    """Penalizes a function of the two parts of v'Hv, and keeps both for each step."""

    def __init__(self, variant: str, probes: int) -> None:
        super().__init__(probes)
        self.variant = variant
        self.seen: list[tuple[float, float]] = []

    @property
    def needs(self) -> Needs:
        return replace(super().needs, losses=True)

    def value(self, context: lh.StepContext) -> Tensor:
        (call,) = context.losses.calls_in(context.loss)
        assert context.taylor is not None
        g, rest = (part / self.probes for part in parts(context.taylor, call.outputs, call.arguments["target"]))
        self.seen.append((g.item(), rest.item()))
        of = {
            "none": 0 * g,
            "exact": g + rest,
            "part G": g,
            "rest": rest,
            "absolute": (g + rest).abs(),
            "clamped": (g + rest).clamp(min=0),
            "positive": g + rest.clamp(min=0),
        }
        return of[self.variant]


class Watch(L.Callback):
    """Measures both parts on the batch of a step with `gauss_newton`, which does not compute them."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.seen: list[tuple[float, float]] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, index: int) -> None:
        if trainer.global_step % self.every == 0:
            self.seen.append(traces(module.net, [batch], probes=4, training=True, seed=trainer.global_step))


def traces(net: nn.Module, batches: Sequence[Any], probes: int, training: bool, seed: int = 0) -> tuple[float, float]:
    """tr(G) and tr(H) - tr(G) of the mean loss over batches of equal size."""
    twin = copy.deepcopy(net).train(training)  # batch norm's statistics stay as they are
    parameters = [*twin.parameters()]
    generator = torch.Generator().manual_seed(seed)
    found = []
    for x, y in batches:
        signs = [
            [torch.randint(0, 2, p.shape, generator=generator) * 2.0 - 1 for p in parameters] for _ in range(probes)
        ]
        with taylor_mode(parameters, signs) as mode:
            logits = twin(x)
            g, rest = parts(mode, logits, y)
        found.append((g.item() / probes, rest.item() / probes))
    return statistics.mean(g for g, _ in found), statistics.mean(rest for _, rest in found)


def train(task: str, variant: str, strength: float, warmup: int, probes: int, seed: int) -> dict:
    torch.set_flush_denormal(True)
    L.seed_everything(seed, verbose=False)
    if task == "digits":
        source: data.ImageData = data.Digits(batch_size=32, seed=seed)
        net, epochs = models.cnn(source.shape, source.classes), 10
    else:
        source = data.FashionMNIST(
            batch_size=100, validation=5000, train_samples=2000, seed=seed, root=str(ROOT / "data")
        )
        net, epochs = models.cnn(source.shape, source.classes, 16), 20
    module = Classifier(net, source.classes)
    every = 10  # steps in a point of the curve
    watch = Watch(every)
    if variant == "gauss_newton":
        penalty: lh.HessianTrace = lh.HessianTrace(probes, "gauss_newton")
        callbacks: list[Any] = [watch]
    else:
        penalty, callbacks = SplitTrace(variant, probes), []
    strength_used = strength or 1e-9  # of a value that is zero: it is computed all the same
    callbacks.append(lh.HessianRegularizer(penalty, strength_used, warmup_steps=warmup, seed=seed))
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(module, source)
    trainer.test(module, source, verbose=False)
    batches = source.training_samples(500)[: 15 if task == "digits" else 5]
    found: dict[str, Any] = {
        "test/accuracy": float(trainer.callback_metrics["test/accuracy"]),
        "test/loss": float(trainer.callback_metrics["test/loss"]),
    }
    with torch.no_grad():
        net.eval()
        found["training loss"] = statistics.mean(F.cross_entropy(net(x), y).item() for x, y in batches)
    for mode, training in {"evaluation": False, "training": True}.items():
        g, rest = traces(net, batches, probes=20, training=training)
        found |= {f"G, {mode}": g, f"rest, {mode}": rest}
    curve = [list(pair) for pair in watch.seen]
    if isinstance(penalty, SplitTrace):
        parts_of = (penalty.seen[i : i + every] for i in range(0, len(penalty.seen), every))
        curve = [[statistics.mean(part) for part in zip(*some, strict=True)] for some in parts_of]
    row = {"task": task, "variant": variant, "strength": strength, "warmup": warmup, "probes": probes, "seed": seed}
    numbers = {name: float(f"{value:.5g}") for name, value in found.items()}
    return row | numbers | {"steps": every, "curve": [[float(f"{x:.4g}") for x in pair] for pair in curve]}


def read() -> list[dict]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def run() -> None:
    data.FashionMNIST(root=str(ROOT / "data")).prepare_data()
    keys = ("task", "variant", "strength", "warmup", "probes", "seed")
    done = {tuple(row[key] for key in keys) for row in read()}
    for task, settings in {"digits": DIGITS, "fashion": FASHION}.items():
        for seed, setting in itertools.product(SEEDS[task], settings):
            if (task, *setting, seed) not in done:
                row = train(task, *setting, seed)
                with RESULTS.open("a") as file:
                    file.write(json.dumps(row) + "\n")


def groups(task: str) -> dict[tuple, list[dict]]:
    found: dict[tuple, list[dict]] = {}
    for row in read():
        if row["task"] == task:
            found.setdefault((row["variant"], row["strength"], row["warmup"], row["probes"]), []).append(row)
    return found


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard error."""
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{error}"


def report() -> None:
    for task in SEEDS:
        of = groups(task)
        if not of:
            continue
        print(f"\n{task}: means ± standard errors over {max(map(len, of.values()))} seeds\n")
        columns = ("penalized", "strength", "warm-up", "probes", "test accuracy (%)", "test loss", "training loss")
        print(f"| {' | '.join((*columns, 'tr(H)', 'tr(G)', 'tr(H), training mode', 'tr(G), training mode'))} |")
        print("|" + " --- |" * 11)
        for (variant, strength, warmup, probes), rows in of.items():
            cells = [variant, f"{strength:g}", f"{warmup}", f"{probes}"]
            cells.append(spread([100 * row["test/accuracy"] for row in rows], 2))
            cells += [spread([row[name] for row in rows], 3) for name in ("test/loss", "training loss")]
            for mode in ("evaluation", "training"):
                cells.append(spread([row[f"G, {mode}"] + row[f"rest, {mode}"] for row in rows], 1))
                cells.append(spread([row[f"G, {mode}"] for row in rows], 1))
            print(f"| {' | '.join(cells)} |")
    draw()


def draw() -> None:
    """Both parts along training on Fashion-MNIST, at strength 1e-3."""
    of = groups("fashion")
    shown = {
        "none": ("none", 0.0, 0, 1),
        **{one: (one, 1e-3, 80, 1) for one in ("exact", "clamped", "gauss_newton", "rest")},
    }
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for part, (axis, name) in enumerate(zip(axes, ("v'Gv", "v'Hv - v'Gv"), strict=True)):
        for label, key in shown.items():
            curves = [row["curve"] for row in of.get(key, [])]
            if not curves:
                continue
            means = [statistics.mean(point[part] for point in points) for points in zip(*curves, strict=False)]
            axis.plot([(i + 0.5) * of[key][0]["steps"] for i in range(len(means))], means, label=label, linewidth=1.2)
        axis.set(xlabel="step", title=name, yscale="symlog" if part else "log")
        if not part:
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("")
    axes[1].axhline(0, color="gray", linewidth=0.6)
    axes[0].legend(fontsize="small", frameon=False)
    figure.savefig(RESULTS.parent / "split.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "report"])
    run() if parser.parse_args().what == "run" else report()


if __name__ == "__main__":
    main()
