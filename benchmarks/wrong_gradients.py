"""Errors of the usual recipe: relative errors of v'Hv and of its gradient, in float64.

    python benchmarks/wrong_gradients.py

The usual recipe calls `torch.autograd.grad` twice with `create_graph=True` on unmodified layers. The reference is
five-point differences of ordinary first-order gradients, which are correct for every layer here. Models are a linear
layer, tanh, the tested layer and a linear layer, on eight samples. The probe is one random vector of signs.
"""

from __future__ import annotations

import copy
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

from oracles import Differences, flat, relative_error  # noqa: E402

import lightning_hessian as lh  # noqa: E402


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


LAYERS = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(4),
    "LayerNorm": lambda: nn.LayerNorm(4),
    "InstanceNorm1d": lambda: nn.InstanceNorm1d(4),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "RMSNorm": lambda: nn.RMSNorm(4),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
    "attention, dropout 0": SelfAttention,
}


def errors(context, net, x, y) -> str:
    """Relative errors of the value and of the gradient, or the exception's message."""

    def loss(net):
        return F.cross_entropy(net(x), y)

    parameters = list(net.parameters())
    reference = Differences(copy.deepcopy(net), loss)
    torch.manual_seed(0)
    v = [torch.randn_like(p).sign() for p in parameters]
    try:
        with context:
            task = loss(net)
        gradients = torch.autograd.grad(task, parameters, create_graph=True)
        curved = [(g, u) for g, u in zip(gradients, v, strict=True) if g.requires_grad]
        hv = torch.autograd.grad(
            [g for g, _ in curved],
            parameters,
            [u for _, u in curved],
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        value = sum((h * u).sum() for h, u in zip(hv, v, strict=True))
        gradient = flat(torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True))
    except RuntimeError as error:
        return f"raises: {str(error).splitlines()[0]}"
    value_error = relative_error(value.detach(), reference.quadratic_form(flat(v)))
    gradient_error = relative_error(gradient, reference.gradient_of_quadratic_form(flat(v)))
    return f"{value_error:.0e} | {gradient_error:.0e}"


def main() -> None:
    torch.set_default_dtype(torch.float64)
    print(f"torch {torch.__version__}; relative errors of the penalty's value and of its gradient\n")
    print("| layer | usual recipe: value | gradient | higher_order(): value | gradient |")
    print("| --- | --- | --- | --- | --- |")
    for name, layer in LAYERS.items():
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), layer(), nn.Flatten(), nn.Linear(16, 3))
        x, y = torch.randn(8, 4, 4), torch.arange(8) % 3
        usual = errors(nullcontext(), net, x, y)
        if usual.startswith("raises"):
            usual += " |"
        print(f"| {name} | {usual} | {errors(lh.higher_order(net), net, x, y)} |")


if __name__ == "__main__":
    main()
