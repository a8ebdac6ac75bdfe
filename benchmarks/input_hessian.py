"""Accuracy of the input Hessian norm's estimate, and cost of a training step with this penalty.

    python benchmarks/input_hessian.py quality      # on softplus_cnn and cnn trained on Fashion-MNIST
    python benchmarks/input_hessian.py cost [--rounds 9]

The error is the mean over samples of 1 - ||Hv|| / ||H||, with ||H|| from 60 steps of Lanczos in float64. A product is a
Hessian-vector product, including the penalty's own. method="finite_difference" uses |v'Hv| in place of ||Hv||.

The cost is the median over interleaved rounds, relative to a plain step (forward, backward). "hand-written" is the
usual recipe on PyTorch's fused operators: 4 power iterations from a random start without a graph, then one product with
a graph. Both models are trained and in training mode. cnn has batch norm, so our penalty needs a second forward pass.
The recipe fails with batch norm in training mode, so it runs in evaluation mode.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
warnings.filterwarnings("ignore")

from step_cost import timed  # noqa: E402

import lightning_hessian as lh  # noqa: E402
from lightning_hessian.cli import data, models  # noqa: E402
from lightning_hessian.curvature import ProbeSource, SampleHessians, lanczos, power_iteration  # noqa: E402
from lightning_hessian.regularization.input_runs import PenaltyRuns, step_for  # noqa: E402

MODELS = {"softplus_cnn": {"width": 16}, "cnn": {"width": 32}}
PRODUCTS = (1, 2, 3, 5)


def trained(name: str, epochs: int = 2, samples: int = 10000) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A model trained on Fashion-MNIST, and 64 validation images with their labels."""
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    source = data.FashionMNIST(validation=5000, normalize=False)
    source.prepare_data()
    source.setup("fit")
    images, labels = (torch.cat(parts) for parts in zip(*source.training_samples(samples), strict=True))
    net = getattr(models, name)(source.shape, source.classes, **MODELS[name])
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(samples).split(100):
            optimizer.zero_grad()
            F.cross_entropy(net(images[rows]), labels[rows]).backward()
            optimizer.step()
    unseen = next(iter(source.val_dataloader()))
    images, labels = source.on_after_batch_transfer(unseen, 0)
    return net, images[:64], labels[:64]


def quality() -> None:
    print("| model | start | search | " + " | ".join(f"{k} product{'s'[: k > 1]}" for k in PRODUCTS) + " |")
    print("| --- | --- | --- |" + " --- |" * len(PRODUCTS))
    for name in MODELS:
        net, images, labels = trained(name)
        net = net.eval().double()
        x = images.double().requires_grad_()
        with lh.higher_order(net):
            loss = F.cross_entropy(net(x), labels, reduction="sum")
        hessians = SampleHessians(loss, [x])
        gradient = hessians.gradient.detach()
        random = ProbeSource().draw(gradient.numel(), 0, dtype=torch.float64).view_as(gradient)

        def norm(v: torch.Tensor, hessians: SampleHessians = hessians) -> torch.Tensor:
            return hessians.matvec(v).norm(dim=1)

        exact = torch.stack([norm(lanczos(hessians.matvec, start, 60)) for start in (gradient, random)]).amax(0)
        for label, start in (("gradient", gradient), ("random", random)):
            for search in (power_iteration, lanczos):
                errors = [(1 - norm(search(hessians.matvec, start, k - 1)) / exact).mean().item() for k in PRODUCTS]
                cells = " | ".join(f"{error:.1%}" for error in errors)
                print(f"| {name} | {label} | {search.__name__.removesuffix('_iteration')} | {cells} |", flush=True)
        directions = [power_iteration(hessians.matvec, gradient, k - 1) for k in PRODUCTS]
        quotients = [(v * hessians.matvec(v)).sum(dim=1).abs() for v in directions]
        cells = " | ".join(f"{(1 - quotient / exact).mean().item():.1%}" for quotient in quotients)
        print(f"| {name} | gradient | power, finite_difference | {cells} |", flush=True)


class Case:
    """A model, a batch, and the steps to compare."""

    def __init__(self, name: str, batch: int = 128) -> None:
        self.net, images, labels = trained(name, epochs=1)
        self.x, self.y = images.repeat(2, 1, 1, 1)[:batch], labels.repeat(2)[:batch]
        self.step = 0
        self.methods = {
            "plain": self.plain,
            "hand-written": self.hand_written,
            "InputHessianNorm()": lambda: self.penalized(lh.InputHessianNorm()),
            "iterations=0": lambda: self.penalized(lh.InputHessianNorm(0)),
            "iterations=2, lanczos": lambda: self.penalized(lh.InputHessianNorm(2, "lanczos")),
            "finite_difference": lambda: self.penalized(lh.InputHessianNorm(method="finite_difference")),
            "finite_difference, iterations=0": lambda: self.penalized(
                lh.InputHessianNorm(0, method="finite_difference")
            ),
            "InputGradientNorm()": lambda: self.penalized(lh.InputGradientNorm()),
            "JacobianNorm()": lambda: self.penalized(lh.JacobianNorm()),
        }

    def plain(self) -> None:
        self.net.zero_grad()
        F.cross_entropy(self.net(self.x), self.y).backward()

    def hand_written(self, iterations: int = 4) -> None:
        self.net.zero_grad()
        self.net.eval()
        x = self.x.clone().requires_grad_()
        loss = F.cross_entropy(self.net(x), self.y)
        (gradient,) = torch.autograd.grad(loss * len(x), x, create_graph=True)
        v = torch.randn_like(x)
        for _ in range(iterations):
            v = v / v.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            (v,) = torch.autograd.grad(gradient, x, v, retain_graph=True)
        v = v / v.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        (product,) = torch.autograd.grad(gradient, x, v, create_graph=True)
        (loss + 1e-3 * product.flatten(1).norm(dim=1).mean()).backward()
        self.net.train()

    def penalized(self, penalty: lh.Penalty) -> None:
        self.net.zero_grad()
        self.step += 1

        def step(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        runs = PenaltyRuns(
            step_for([penalty], self.net, step, (self.x, self.y)), [penalty], [ProbeSource(step=self.step)]
        )
        loss = runs.run().loss
        (loss + 1e-3 * penalty(runs.context(penalty))).backward()


def cost(rounds: int) -> None:
    torch.set_flush_denormal(True)
    print(
        f"{os.cpu_count()} CPU cores, torch {torch.__version__}, Python {platform.python_version()}, {rounds} rounds\n"
    )
    print("| model | step | time / plain | time / hand-written |\n| --- | --- | --- | --- |")
    for name in MODELS:
        case = Case(name)
        times: dict[str, list[float]] = {label: [] for label in case.methods}
        for turn in range(rounds + 1):
            for label, method in case.methods.items():
                seconds = timed(method)
                if turn:  # the first round is a warm-up
                    times[label].append(seconds)
        median = {label: statistics.median(values) for label, values in times.items()}
        for label, seconds in median.items():
            ratios = f"{seconds / median['plain']:.2f} | {seconds / median['hand-written']:.2f}"
            print(f"| {name} | {label} | {ratios} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["quality", "cost"])
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    quality() if arguments.what == "quality" else cost(arguments.rounds)


if __name__ == "__main__":
    main()
