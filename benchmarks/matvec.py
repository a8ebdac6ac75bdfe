"""Cost of a Hessian-vector product here and in other libraries, with the same models and batches in one run.

    python benchmarks/matvec.py [--models mlp cnn resnet18 vit] [--rounds 15]

Each number is the median time of one product over interleaved rounds, divided by the median time of a plain forward and
backward pass over the same batches. Models are in evaluation mode, with 32 images per batch, and ReLU instead of SiLU,
because curvlinops needs forward-mode second derivatives, which SiLU lacks. The last column is the largest relative
difference between our product and another library's. Needs the extra `test`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
warnings.filterwarnings("ignore")

import curvlinops  # noqa: E402
import hessian_eigenthings  # noqa: E402

import lightning_hessian as lh  # noqa: E402
from lightning_hessian.cli import models  # noqa: E402
from lightning_hessian.curvature import BatchedHessianOperator  # noqa: E402

SHAPE, CLASSES, BATCH = (3, 32, 32), 10, 32
MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "mlp": lambda: models.mlp(SHAPE, CLASSES, width=256, depth=2),
    "cnn": lambda: models.cnn(SHAPE, CLASSES, width=32),
    "resnet18": lambda: models.resnet18(SHAPE, CLASSES),
    "vit": lambda: models.vit(SHAPE, CLASSES, patch=4, width=64, depth=4, heads=4),
}


def products(net: torch.nn.Module, batches: list) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    parameters = list(net.parameters())

    def loss(batch) -> torch.Tensor:
        with lh.higher_order(net, derivatives=2):
            return F.cross_entropy(net(batch[0]), batch[1])

    def plain(v: torch.Tensor) -> torch.Tensor:
        for x, y in batches:
            torch.autograd.grad(F.cross_entropy(net(x), y), parameters)
        return v

    ours = BatchedHessianOperator(loss, parameters, batches, lambda batch: len(batch[1]))
    theirs = curvlinops.HessianLinearOperator(
        net, torch.nn.CrossEntropyLoss(), parameters, batches, check_deterministic=False
    )
    eigenthings = hessian_eigenthings.HessianOperator(
        net, batches, lambda net, batch: F.cross_entropy(net(batch[0]), batch[1])
    )
    return {
        "plain": plain,
        "lightning_hessian": ours.matvec,
        "curvlinops": lambda v: theirs @ v,
        "hessian_eigenthings": eigenthings.matvec,
    }


def measure(name: str, count: int, rounds: int) -> str:
    torch.manual_seed(0)
    net = MODELS[name]().eval()
    for layer in list(net.modules()):
        for child, module in layer.named_children():
            if isinstance(module, torch.nn.SiLU):
                setattr(layer, child, torch.nn.ReLU())
    batches = [(torch.randn(BATCH, *SHAPE), torch.randint(CLASSES, (BATCH,))) for _ in range(count)]
    v = torch.randn(sum(p.numel() for p in net.parameters()))
    v /= v.norm()
    times: dict[str, list[float]] = {}
    found: dict[str, torch.Tensor] = {}
    failed: set[str] = set()
    libraries = products(net, batches)
    for _ in range(rounds + 1):  # the first round is a warm-up
        for library, product in libraries.items():
            if library in failed:
                continue
            start = time.perf_counter()
            try:
                found[library] = product(v)
            except RuntimeError:
                failed.add(library)
                continue
            times.setdefault(library, []).append(time.perf_counter() - start)
    plain = statistics.median(times["plain"][1:])
    cells = [
        "fails" if library in failed else f"{statistics.median(times[library][1:]) / plain:.2f}"
        for library in list(libraries)[1:]
    ]
    mine = found["lightning_hessian"]
    difference = max((found[one] - mine).norm().item() / mine.norm().item() for one in found if one != "plain")
    return f"| {name} | {count} | " + " | ".join(cells) + f" | {difference:.0e} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    print("| model | batches | lightning_hessian | curvlinops | hessian-eigenthings | difference |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in arguments.models:
        for count in arguments.batches:
            print(measure(name, count, arguments.rounds), flush=True)


if __name__ == "__main__":
    main()
