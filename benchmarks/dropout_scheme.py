"""Is the dropout scheme worth it? The error of the trace's estimate at equal time, over the probability q of keeping.

    OMP_NUM_THREADS=1 python benchmarks/dropout_scheme.py

One batch of 100 images of Fashion-MNIST, networks after five epochs of plain training. Each cell has the standard
deviation of one step's estimate over 100 probes, relative to tr(H), and the time of a penalized step (loss, penalty and
gradient) in plain steps: the mean of 15 rounds, because it depends on what is dropped, over the median plain step. The
last column is what counts at equal time,

    error = deviation * sqrt(time),

in units of one whole probe with the same method: above 1 the scheme loses. Writes docs/trace/dropout.png.
"""

from __future__ import annotations

import logging
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")
warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

import lightning as L  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
from matplotlib.ticker import FixedLocator, NullLocator  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import lightning_hessian as lh  # noqa: E402
from lightning_hessian.cli import data, models  # noqa: E402
from lightning_hessian.cli.classifier import Classifier  # noqa: E402
from lightning_hessian.curvature.taylor import taylor_mode  # noqa: E402

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "mlp": lambda shape, classes: models.mlp(shape, classes, 64, 3),
    "cnn": lambda shape, classes: models.cnn(shape, classes, 16),
    "vit": lambda shape, classes: models.vit(shape, classes, 7, 48, 2),
}
SCHEMES = [("autograd", "tensor"), ("autograd", "element"), ("taylor", "tensor"), ("taylor", "element")]
KEEP = (1.0, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05)
PROBES, ROUNDS = 100, 15


def trained(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    L.seed_everything(0, verbose=False)
    source = data.FashionMNIST(batch_size=100, validation=5000, train_samples=5000, root=str(ROOT / "data"))
    source.prepare_data()
    net = NETWORKS[name](source.shape, source.classes)
    module = Classifier(net, source.classes, optimizer=lambda p: torch.optim.AdamW(p, 1e-3))
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    L.Trainer(max_epochs=5, accelerator="cpu", logger=False, limit_val_batches=0, **quiet).fit(module, source)
    (batch,) = source.training_samples(100)
    return net.train(), *batch


def step(net: nn.Module, x: Tensor, y: Tensor, penalty: lh.HessianTrace | None, seed: int) -> float:
    """Loss, penalty and gradient; the penalty's value."""
    parameters = dict(net.named_parameters())
    if penalty is None:
        torch.autograd.grad(F.cross_entropy(net(x), y), [*parameters.values()])
        return 0.0
    probes = lh.ProbeSource(seed=seed, step=0)
    if penalty.method == "taylor":
        _, draw = penalty.estimator.probes.draw(probes, [*parameters.values()], None, 0)
        kept = draw()
        names = _kept_tensors(penalty, parameters, probes)
        with taylor_mode([parameters[name] for name in names], [kept], net) as mode:
            loss = F.cross_entropy(net(x), y)
        value = mode.second(loss)
    else:
        with lh.higher_order(net):
            loss = F.cross_entropy(net(x), y)
        value = penalty(lh.StepContext(loss, parameters, probes))
    torch.autograd.grad(loss + 1e-3 * value, [*parameters.values()], allow_unused=True)
    return value.item()


def _kept_tensors(penalty: lh.HessianTrace, parameters: dict[str, nn.Parameter], probes: lh.ProbeSource) -> list[str]:
    kept, _ = penalty.estimator.probes.draw(probes, [*parameters.values()], None, 0)
    return [name for i, name in enumerate(parameters) if i in kept]


def measured(name: str) -> list[tuple[str, str, float, float, float, float]]:
    net, x, y = trained(name)
    cases = {(m, d, q): lh.HessianTrace(method=m, drop=d, keep=q) for m, d in SCHEMES for q in KEEP}
    values = {key: [step(net, x, y, penalty, seed) for seed in range(PROBES)] for key, penalty in cases.items()}
    times: dict[object, list[float]] = {None: [], **{key: [] for key in cases}}
    for round_ in range(ROUNDS):
        for key, penalty in [(None, None), *cases.items()]:
            start = time.perf_counter()
            step(net, x, y, penalty, seed=1000 + round_)
            times[key].append(time.perf_counter() - start)
    plain = statistics.median(times[None])
    trace = statistics.mean(values["taylor", "element", 1.0])
    rows = []
    for (m, d, q), found in values.items():
        deviation, cost = statistics.stdev(found) / trace, statistics.mean(times[m, d, q]) / plain
        rows.append((m, d, q, deviation, cost, deviation * math.sqrt(cost)))
    whole = {m: error for m, d, q, _, _, error in rows if q == 1 and d == "element"}
    return [(m, d, q, deviation, cost, error / whole[m]) for m, d, q, deviation, cost, error in rows]


def draw(found: dict[str, list[tuple[str, str, float, float, float, float]]]) -> None:
    figure, axes = plt.subplots(1, len(found), figsize=(10, 3.4), layout="constrained", sharey=True)
    for axis, (name, rows) in zip(axes, found.items(), strict=True):
        for m, d in SCHEMES:
            points = [(q, error) for a, b, q, _, _, error in rows if (a, b) == (m, d)]
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=f"{m}, {d}")
        axis.axhline(1, color="gray", linewidth=0.8)
        axis.set(title=name, xlabel="q", xscale="log", yscale="log")
        for one, ticks in ((axis.xaxis, (0.05, 0.1, 0.2, 0.5, 1)), (axis.yaxis, (1, 2, 4, 8))):
            one.set_major_locator(FixedLocator(ticks))
            one.set_major_formatter("{x:g}")
            one.set_minor_locator(NullLocator())
    axes[0].set_ylabel("error at equal time\n(one whole probe = 1)")
    axes[0].legend(fontsize="small", frameon=False)
    figure.savefig(ROOT / "docs" / "trace" / "dropout.png", dpi=110)


def main() -> None:
    print("| network | method | parts | q | deviation / tr(H) | step (plain = 1) | error at equal time |")
    print("| --- |" + " --- |" * 6)
    found = {}
    for name in NETWORKS:
        found[name] = measured(name)
        for m, d, q, deviation, cost, error in found[name]:
            if q < 1 or d == "element":
                what = d if q < 1 else "whole"
                print(f"| {name} | {m} | {what} | {q:g} | {deviation:.2f} | {cost:.1f} | {error:.2f} |", flush=True)
    draw(found)


if __name__ == "__main__":
    main()
