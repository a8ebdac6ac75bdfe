"""Cost of one measurement of CurvatureMonitor relative to a training epoch, for the small CNN on Fashion-MNIST.

    python benchmarks/monitor_cost.py [--images 55000] [--width 32]

Trains one epoch (batch 128), then measures twice with each of several settings. Prints the faster time as a share of
the epoch's time.
"""

from __future__ import annotations

import argparse
import logging
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

SETTINGS: dict[str, dict] = {
    "CurvatureMonitor()": {},
    "probes=2, iterations=10": {"probes": 2, "iterations": 10},
    "n_batches=4": {"n_batches": 4},
    "density_runs=4": {"density_runs": 4},
}


class Clock(L.Callback):
    """Times the epoch and then the measurements."""

    def __init__(self) -> None:
        self.epoch = 0.0
        self.measurements: dict[str, tuple[float, int]] = {}

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.epoch = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.epoch = time.perf_counter() - self.epoch
        for name, settings in SETTINGS.items():
            monitor = lh.CurvatureMonitor(figures=False, **settings)
            for _ in range(2):
                start = time.perf_counter()
                monitor.on_train_start(trainer, pl_module)  # draws its batches
                monitor.on_train_batch_start(trainer, pl_module, None, 0)  # measures
                seconds = time.perf_counter() - start
                before, _ = self.measurements.get(name, (seconds, 0))
                self.measurements[name] = min(seconds, before), monitor.history[-1].matvecs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=55_000)
    parser.add_argument("--width", type=int, default=32)
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    L.seed_everything(0, verbose=False)
    source = data.FashionMNIST(batch_size=128, validation=5000, train_samples=arguments.images, root=str(ROOT / "data"))
    clock = Clock()
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(Classifier(models.cnn(source.shape, source.classes, arguments.width), source.classes), source)
    steps = trainer.global_step
    print(f"one epoch: {steps} steps, 1.0\n")
    print("| settings | Hessian-vector products | of the epoch (%) | in training steps |")
    print("| --- | --- | --- | --- |")
    for name, (seconds, matvecs) in clock.measurements.items():
        share = seconds / clock.epoch
        print(f"| `{name}` | {matvecs} | {100 * share:.1f} | {share * steps:.0f} |")


if __name__ == "__main__":
    main()
