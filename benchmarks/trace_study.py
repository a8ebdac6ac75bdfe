"""Study on Fashion-MNIST: do penalties on the Hessian's trace improve generalization, and do cheap ones suffice?

    python benchmarks/trace_study.py run [--methods none SAM two_pass ...] [--seeds 0 1 2]
    python benchmarks/trace_study.py report    # the table of docs/trace.md

Each run trains the small CNN (width 8, batch norm, SiLU) on 1,000 training images for 60 epochs (SGD, momentum 0.9,
weight decay 5e-4, cosine decay from 0.1, batch 100), with one strength and one seed (for weights, order, and probes).
Runs with a result in the file are skipped, so an interrupted study can be resumed.

A method's chosen strength has the highest mean accuracy on 5,000 validation images; its test accuracy is from these
runs. The trace (10 probes) and the largest eigenvalue (12 steps of Lanczos) are of the mean loss over 200 training
images, in evaluation mode. SAM's strength is rho. Seconds are processor time of training in one thread
(OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

import lightning as L  # noqa: E402

import lightning_hessian as lh  # noqa: E402
from lightning_hessian.cli import data, models  # noqa: E402
from lightning_hessian.cli.classifier import Classifier  # noqa: E402
from lightning_hessian.curvature import BatchedHessianOperator, hutchinson_trace, lanczos  # noqa: E402
from lightning_hessian.curvature.modes import evaluation_mode  # noqa: E402

STRENGTHS: dict[str, list[float]] = {
    "none": [0.0],
    "SAM": [0.02, 0.05, 0.1, 0.2],
    "two_pass": [3e-5, 1e-4, 3e-4, 1e-3],
    "gauss_newton": [3e-5, 1e-4, 3e-4, 1e-3, 3e-3],
    "autograd": [3e-5, 1e-4, 3e-4, 1e-3],
}
EPOCHS, IMAGES, WIDTH = 60, 1000, 8


class SAM(torch.optim.SGD):
    """SGD with the gradient at weights displaced along the gradient (Foret et al. 2020)."""

    def __init__(self, parameters, rho: float, **settings) -> None:
        super().__init__(parameters, **settings)
        self.rho = rho

    @torch.no_grad()
    def step(self, closure):
        first = torch.enable_grad()(closure)
        loss = first()
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        scale = self.rho / torch.stack([p.grad.norm() for p in parameters]).norm()
        before = [p.clone() for p in parameters]
        for p in parameters:
            p.add_(scale * p.grad)
        first()
        for p, old in zip(parameters, before, strict=True):
            p.copy_(old)
        super().step()
        return loss


class SAMClassifier(Classifier):
    def __init__(self, *arguments, rho: float) -> None:
        super().__init__(*arguments)
        self.rho = rho

    def configure_optimizers(self):
        settings = super().configure_optimizers()
        plain = settings["optimizer"].defaults
        kept = {name: plain[name] for name in ("lr", "momentum", "weight_decay", "nesterov")}
        optimizer = SAM(self.parameters(), self.rho, **kept)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def train(method: str, strength: float, seed: int) -> dict:
    torch.set_flush_denormal(True)
    L.seed_everything(seed, verbose=False)
    source = data.FashionMNIST(
        batch_size=100, validation=5000, train_samples=IMAGES, seed=seed, root=str(ROOT / "data")
    )
    net = models.cnn(source.shape, source.classes, WIDTH)
    module = SAMClassifier(net, source.classes, rho=strength) if method == "SAM" else Classifier(net, source.classes)
    callbacks = []
    if method not in ("none", "SAM"):
        callbacks = [lh.HessianRegularizer(lh.HessianTrace(method=method), strength, seed=seed)]
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    start = time.process_time()
    trainer.fit(module, source)
    seconds = time.process_time() - start
    trainer.limit_val_batches = 1.0
    accuracy = {}
    for stage, measure in (("val", trainer.validate), ("test", trainer.test)):
        measure(module, source, verbose=False)
        accuracy[stage] = float(trainer.callback_metrics[f"{stage}/accuracy"])
        accuracy[f"{stage} loss"] = float(trainer.callback_metrics[f"{stage}/loss"])
    trace, largest = curvature(module, source)
    row = {"method": method, "strength": strength, "seed": seed, "seconds": round(seconds, 1), **accuracy}
    return row | {"trace": trace, "largest eigenvalue": largest}


def curvature(module: Classifier, source: data.ImageData) -> tuple[float, float]:
    """The trace and the largest absolute eigenvalue of the Hessian."""
    batches = source.training_samples(200)

    def loss(batch):
        with lh.higher_order(module, derivatives=2):
            return module.loss(batch)

    with evaluation_mode(module.modules()):
        operator = BatchedHessianOperator(loss, module.parameters(), batches, lambda batch: len(batch[1]))
        trace = hutchinson_trace(operator, 10).estimate
        start = torch.randn(1, operator.size, generator=torch.Generator().manual_seed(0))
        v = lanczos(lambda v: operator.matvec(v[0]).unsqueeze(0), start, 12)
        return trace, operator.matvec(v[0]).norm().item()


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(arguments: argparse.Namespace) -> None:
    done = {(row["method"], row["strength"], row["seed"]) for row in read(arguments.results)}
    data.FashionMNIST(root=str(ROOT / "data")).prepare_data()
    for seed, method in itertools.product(arguments.seeds, arguments.methods):
        for strength in STRENGTHS[method]:
            if (method, strength, seed) not in done:
                row = train(method, strength, seed)
                arguments.results.parent.mkdir(parents=True, exist_ok=True)
                with arguments.results.open("a") as file:
                    file.write(json.dumps(row) + "\n")


def spread(values: list[float], digits: int) -> str:
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def report(arguments: argparse.Namespace) -> None:
    rows = read(arguments.results)
    print(f"{len(rows)} runs, {len({row['seed'] for row in rows})} seeds; mean ± standard deviation over seeds.\n")
    print(
        "| method | strength | chosen | runs | validation accuracy (%) | test accuracy (%) | test loss | trace "
        "| largest eigenvalue | seconds |"
    )
    print("| --- |" + " --- |" * 9)
    for method, strengths in STRENGTHS.items():
        of = {s: [row for row in rows if (row["method"], row["strength"]) == (method, s)] for s in strengths}
        of = {strength: own for strength, own in of.items() if own}
        if not of:
            continue
        best = max(of, key=lambda strength: statistics.mean(row["val"] for row in of[strength]))
        for strength, own in of.items():
            cells = [spread([100 * row[key] for row in own], 2) for key in ("val", "test")]
            cells += [spread([row["test loss"] for row in own], 3)]
            cells += [spread([row[key] for row in own], 1) for key in ("trace", "largest eigenvalue")]
            cells += [f"{statistics.mean(row['seconds'] for row in own):.0f}"]
            chosen = "yes" if strength == best else ""
            print(f"| {method} | {strength:g} | {chosen} | {len(own)} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "report"])
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "trace" / "results.jsonl")
    parser.add_argument("--methods", nargs="+", choices=STRENGTHS, default=list(STRENGTHS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    run(arguments) if arguments.what == "run" else report(arguments)


if __name__ == "__main__":
    main()
