"""Taylor mode against reverse over reverse over reverse: the same value, gradient and buffers."""

import copy

import pytest
import torch
from oracles import gradient_of, relative_error

import lightning_hessian as lh
from lightning_hessian.curvature import HessianOperator
from lightning_hessian.curvature.taylor import taylor_mode
from lightning_hessian.curvature.vectors import pack


def directions(tensors, count):
    generator = torch.Generator().manual_seed(5)
    return [[torch.randn(t.shape, generator=generator).to(t) for t in tensors] for _ in range(count)]


def by_autograd(net, loss, tensors, v):
    torch.manual_seed(0)
    with lh.higher_order(net):
        value = loss(net)
    hessian = HessianOperator(value, tensors, differentiable=True)
    return value, torch.stack([hessian.quadratic_form(pack(one)) for one in v]).sum()


def by_taylor_mode(net, loss, tensors, v):
    torch.manual_seed(0)
    with taylor_mode(tensors, v, net) as mode:
        value = loss(net)
    return value, mode.second(value)


def assert_equal(net, loss, tensors=None, count=1, tolerance=1e-9):
    tensors = list(net.parameters()) if tensors is None else tensors
    v = directions(tensors, count)
    twin = copy.deepcopy(net)
    twins = [dict(twin.named_parameters())[name] for name, p in net.named_parameters() if any(p is t for t in tensors)]
    value, found = by_taylor_mode(net, loss, tensors, v)
    expected_value, expected = by_autograd(twin, loss, twins, v)
    torch.testing.assert_close(value, expected_value, rtol=1e-10, atol=1e-12)
    assert found.item() == pytest.approx(expected.item(), rel=tolerance, abs=1e-12)
    error = relative_error(gradient_of(found, tensors), gradient_of(expected, twins))
    assert error < tolerance, f"the gradients differ by {error:.1e}"
    for ours, theirs in zip(net.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not any(hasattr(t, "_taylor_coefficients") for t in tensors)
