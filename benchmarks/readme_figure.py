"""The figure at the top of the README: what a penalty on the Hessian's trace does to a training.

    OMP_NUM_THREADS=1 python benchmarks/readme_figure.py    # about eight minutes on one core; writes docs/penalty.png

5,000 images of Fashion-MNIST, the vision transformer of the study in docs/trace.md, with and without
`HessianTrace(method="gauss_newton")` at the strength 3e-4 that validation chose there. Left: the loss on validation
images along training. Right: the loss on training images around the last weights, along random directions with the
length of the weights (each filter by itself). Lines are the seeds 0 to 2.
"""

from __future__ import annotations

import copy
import logging
import os
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")
warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

import lightning as L  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402

import lightning_hessian as lh  # noqa: E402
from lightning_hessian.cli import data, models  # noqa: E402
from lightning_hessian.cli.classifier import Classifier  # noqa: E402
from lightning_hessian.cli.history import History  # noqa: E402
from lightning_hessian.penalties.trace_estimators import filter_sizes  # noqa: E402

SEEDS, EPOCHS, STRENGTH = (0, 1, 2), 30, 3e-4
DIRECTIONS, DISTANCES = 10, torch.linspace(-0.5, 0.5, 21)
KINDS = {"without a penalty": (0.0, "C1"), "with the penalty": (STRENGTH, "C0")}


def train(strength: float, seed: int) -> tuple[Classifier, data.FashionMNIST, History]:
    L.seed_everything(seed, verbose=False)
    source = data.FashionMNIST(batch_size=100, validation=5000, train_samples=5000, root=str(ROOT / "data"), seed=seed)
    net = models.vit(source.shape, source.classes, patch=7, width=48, depth=2)
    module = Classifier(net, source.classes, optimizer=torch.optim.AdamW)
    penalty = lh.HessianTrace(method="gauss_newton")
    regularizers = [lh.HessianRegularizer(penalty, strength, warmup_steps=200, seed=seed)] if strength else []
    history = History()
    L.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        callbacks=[*regularizers, history],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, source)
    return module.eval(), source, history


@torch.no_grad()
def around(module: Classifier, batches: list) -> list[float]:
    """The mean loss over the directions, at each distance."""
    moved = copy.deepcopy(module)
    losses = torch.zeros(len(DISTANCES))
    for direction in range(DIRECTIONS):
        generator = torch.Generator().manual_seed(direction)
        for i, distance in enumerate(DISTANCES.tolist()):
            generator.manual_seed(direction)
            for there, here in zip(moved.parameters(), module.parameters(), strict=True):
                v = torch.randn(here.shape, generator=generator)
                size, length = filter_sizes([here, v])
                there.copy_(here + distance * size / length * v)
            losses[i] += sum(moved.loss(batch) for batch in batches) / len(batches) / DIRECTIONS
    return losses.tolist()


def main() -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 2.9), layout="constrained")
    for name, (strength, color) in KINDS.items():
        for seed in SEEDS:
            module, source, history = train(strength, seed)
            style = {"color": color, "label": name if seed == SEEDS[0] else None, "linewidth": 1.2}
            left.plot([row["epoch"] for row in history.epochs], [row["val/loss"] for row in history.epochs], **style)
            right.plot(DISTANCES, around(module, source.training_samples(500)), **style)
            last = history.epochs[-1]
            print(f"{name}, seed {seed}: loss {last['val/loss']:.3f}, accuracy {last['val/accuracy']:.4f}", flush=True)
    left.set(xlabel="epoch", ylabel="validation loss", ylim=(0.4, 0.9))
    right.set(xlabel="distance from the last weights, relative", ylabel="training loss")
    left.legend(frameon=False)
    figure.savefig(ROOT / "docs" / "penalty.png", dpi=150)


if __name__ == "__main__":
    main()
