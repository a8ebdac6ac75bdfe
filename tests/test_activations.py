"""The activations of ``higher_order()`` against PyTorch's own, four derivatives deep."""

import pytest
import torch
from torch.nn import functional as F

import lightning_hessian as lh

FUNCTIONS = {
    "softplus": lambda x: F.softplus(x, threshold=40),
    "softplus, beta": lambda x: F.softplus(x, 3.0, 120),
    "silu": F.silu,
    "silu, in place": lambda x: F.silu(x.clone(), inplace=True),
}


def derivatives(function, x, count=4):
    y = function(x)
    found = [y]
    for _ in range(count):
        (y,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        found.append(y)
    return torch.stack(found)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_derivative_agrees(name):
    x = torch.cat([3 * torch.randn(50), torch.tensor([-300.0, -30, 0, 30, 300])]).double().requires_grad_()
    with lh.higher_order():
        ours = derivatives(FUNCTIONS[name], x)
    torch.testing.assert_close(ours, derivatives(FUNCTIONS[name], x), rtol=1e-12, atol=1e-13)


def test_the_type_is_kept():
    for dtype in (torch.float32, torch.bfloat16):
        with lh.higher_order():
            assert F.silu(torch.ones(2, dtype=dtype)).dtype == F.softplus(torch.ones(2, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("function", [F.softplus, F.silu])
def test_transforms_of_functions_work_inside(function):
    x = torch.randn(5, dtype=torch.float64)
    for transform in (torch.func.vmap, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))[1], torch.func.jacrev):
        with lh.higher_order():
            ours = transform(function)(x)
        torch.testing.assert_close(ours, transform(function)(x))


def test_settings_that_change_the_formula_are_respected():
    x = torch.linspace(-2, 2, 9)
    with lh.higher_order():
        torch.testing.assert_close(F.softplus(x, threshold=1), torch.where(x > 1, x, F.softplus(x)))
        changed = x.clone()
        F.silu(changed, inplace=True)
    torch.testing.assert_close(changed, F.silu(x))
