"""HessianTrace against the dense Hessian: value, gradient, statistics, and what it refuses."""

import pytest
import torch
from nets import context_of
from oracles import dense_hessian, flat, gradient_by_differences, gradient_of, relative_error
from torch import nn
from torch.nn import functional as F

import lightning_hessian as lh
from lightning_hessian.curvature import ProbeSource

X = torch.randn(10, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(10) % 2


@pytest.fixture
def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()


def written_out(parameters):
    """The network by hand: the oracle must not depend on any norm of torch's or of ours."""
    w0, b0, gamma, beta, w1, b1 = parameters
    h = X @ w0.T + b0
    h = (h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-5).sqrt() * gamma + beta
    return F.cross_entropy(h.tanh() @ w1.T + b1, Y)


def exact_trace(net, positions=None):
    """tr(H) as a function of the parameters, by torch.func.hessian, and its gradient."""
    leaves = [p.detach().clone().requires_grad_() for p in net.parameters()]
    positions = range(len(leaves)) if positions is None else positions
    total = 0
    for i in positions:

        def of_one(p, i=i):
            return written_out([*leaves[:i], p, *leaves[i + 1 :]])

        block = torch.func.hessian(of_one)(leaves[i])
        total = total + block.reshape(leaves[i].numel(), -1).trace()
    return total, flat(torch.autograd.grad(total, leaves))


def loss_of(net):
    return F.cross_entropy(net(X), Y)


def context(net, **key):
    return context_of(net, loss_of, probes=ProbeSource(**key))


def test_exact_value_and_gradient(net):
    expected, expected_gradient = exact_trace(net)
    value = lh.HessianTrace(probes=-1)(context(net))
    assert value.item() == pytest.approx(expected.item(), rel=1e-9)
    assert relative_error(gradient_of(value, net.parameters()), expected_gradient) < 1e-7


def test_exact_value_over_chosen_parameters(net):
    expected, expected_gradient = exact_trace(net, positions=[0, 4])
    value = lh.HessianTrace(probes=-1, parameters=["0.weight", "3.weight"])(context(net))
    assert value.item() == pytest.approx(expected.item(), rel=1e-9)
    assert relative_error(gradient_of(value, net.parameters()), expected_gradient) < 1e-7


def test_the_gradient_agrees_with_differences_of_the_dense_trace():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    def dense_trace():
        return dense_hessian(net, lambda call: F.cross_entropy(call(X), Y)).trace().item()

    value = lh.HessianTrace(probes=-1)(context(net))
    assert value.item() == pytest.approx(dense_trace(), rel=1e-10)
    gradient = gradient_of(value, net.parameters())
    assert relative_error(gradient, gradient_by_differences(dense_trace, net)) < 1e-7


def test_the_penalty_is_not_detached(net):
    value = lh.HessianTrace()(context(net))
    gradient = gradient_of(value, net.parameters())
    assert gradient.norm() > 0.1 * value.abs()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"probes": 3},
        {"keep": 0.5, "drop": "element"},
        {"keep": 0.4, "drop": "tensor"},
        {"keep": 0.05, "drop": "tensor", "probes": 2},
        {"parameters": "*.weight", "keep": 0.5},
    ],
    ids=str,
)
def test_unbiased_value_and_gradient_within_four_standard_errors(net, settings):
    positions = [0, 2, 4] if "parameters" in settings else None
    expected, expected_gradient = exact_trace(net, positions)
    penalty = lh.HessianTrace(**settings)
    values, gradients = [], []
    for step in range(800):
        value = penalty(context(net, step=step))
        values.append(value.detach())
        gradients.append(
            gradient_of(value, net.parameters()) if value.requires_grad else torch.zeros_like(expected_gradient)
        )
    values, gradients = torch.stack(values), torch.stack(gradients)
    assert abs(values.mean() - expected) < 4 * values.std() / len(values) ** 0.5
    # Along the exact gradient: one number, so four standard errors mean what they say.
    along = gradients @ (expected_gradient / expected_gradient.norm())
    assert abs(along.mean() - expected_gradient.norm()) < 4 * along.std() / len(along) ** 0.5


@pytest.mark.parametrize("drop", ["element", "tensor"])
def test_variance_formulas(drop):
    torch.manual_seed(2)
    a = torch.randn(6, 6, dtype=torch.float64)
    a = a + a.T
    w = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    penalty = lh.HessianTrace(keep=0.5, drop=drop)
    parameters = {"w": w}
    loss = w @ a @ w / 2
    values = torch.stack([penalty(lh.StepContext(loss, parameters, ProbeSource(step=s))) for s in range(4000)])
    off_diagonal = 2 * (a - a.diag().diag()).square().sum()
    # A single tensor is always kept.
    expected = off_diagonal + (a.diag().square().sum() if drop == "element" else 0)
    squares = (values - values.mean()).square()
    assert abs(squares.mean() - expected) < 4 * squares.std() / len(squares) ** 0.5


def test_a_quadratic_loss_has_a_trace_without_gradient():
    w = torch.ones(3, requires_grad=True)
    value = lh.HessianTrace()(lh.StepContext((w**2).sum(), {"w": w}))
    assert value.item() == 6
    gradient = torch.autograd.grad(value + 0 * w.sum(), w)[0]
    assert torch.equal(gradient, torch.zeros(3))


def test_a_loss_linear_in_the_chosen_parameters_has_trace_0():
    w = torch.ones(3, requires_grad=True)
    for probes in (1, -1):
        assert lh.HessianTrace(probes=probes)(lh.StepContext(w.sum(), {"w": w})).item() == 0


def test_clamp_bounds_the_term_and_leaves_the_value():
    w = torch.ones(3, requires_grad=True)
    penalty = lh.HessianTrace(clamp=0.0)
    at = lh.StepContext(-(w**4).sum(), {"w": w})
    assert penalty.value(at).item() == -36
    assert penalty(at).item() == 0
    assert torch.equal(torch.autograd.grad(penalty(at), w)[0], torch.zeros(3))


def test_the_probe_is_a_function_of_the_key(net):
    penalty = lh.HessianTrace()
    assert penalty(context(net, step=1)).item() == penalty(context(net, step=1)).item()
    assert penalty(context(net, step=1)).item() != penalty(context(net, step=2)).item()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"probes": 0}, "probes=0"),
        ({"probes": -2}, "probes=-2"),
        ({"probes": 1.5}, "probes=1.5"),
        ({"keep": 0.0}, "keep=0.0"),
        ({"keep": 1.5}, "keep=1.5"),
        ({"keep": float("nan")}, "keep=nan"),
        ({"drop": "layer"}, "drop='layer'.*tensor, element"),
        ({"method": "magic"}, "method='magic'.*autograd"),
        ({"clamp": float("nan")}, "clamp=nan"),
        ({"probes": -1, "keep": 0.5}, "choose one"),
    ],
)
def test_bad_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        lh.HessianTrace(**settings)


def test_the_exact_trace_of_a_large_model_is_refused_beforehand():
    with pytest.raises(ValueError, match="would take 65,792 Hessian-vector products"):
        lh.HessianTrace(probes=-1).check(dict(nn.Linear(256, 256).named_parameters()))
