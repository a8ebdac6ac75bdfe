"""The trace of the Gauss-Newton matrix against dense matrices."""

import pytest
import torch
from nets import Classifier, context_of, fit, smooth
from oracles import dense_hessian, gradient_by_differences, gradient_of, relative_error
from torch import nn
from torch.nn import functional as F

import lightning_hessian as lh
from lightning_hessian.curvature import ProbeSource

SAMPLES, CLASSES, PROBES = 6, 3, 4000


def net(activation=nn.Tanh, outputs=CLASSES, middle=nn.Identity):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), middle(), activation(), nn.Linear(5, outputs)).double()


@pytest.fixture
def x():
    return torch.randn(SAMPLES, 4, dtype=torch.float64)


def draws(module, loss, count=PROBES, **settings):
    """Values of single probes, which the gradient of the loss is taken for once."""
    context = context_of(module, loss)
    penalty = lh.HessianTrace(method="gauss_newton", **settings)
    values = []
    for step in range(count):
        own = lh.StepContext(context.loss, context.parameters, ProbeSource(0, step), losses=context.losses)
        values.append(penalty.value(own).item())
    return torch.tensor(values, dtype=torch.float64)


def dense_gauss_newton(module, loss_of_outputs, x):
    """J'(d^2 L / dz^2) J by torch.func, over all outputs of all samples."""
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def outputs(parameters):
        return torch.func.functional_call(module, parameters, (x,))

    jacobian = torch.func.jacrev(outputs)(parameters)
    z = outputs(parameters).detach()
    rows = torch.cat([jacobian[name].reshape(z.numel(), -1) for name in parameters], dim=1)
    curvature = torch.func.hessian(lambda flat: loss_of_outputs(flat.view_as(z)))(z.reshape(-1))
    return rows.T @ curvature @ rows


Y = torch.arange(SAMPLES) % CLASSES
SOFT = torch.softmax(torch.arange(SAMPLES * CLASSES, dtype=torch.float64).view(SAMPLES, CLASSES).sin(), dim=1)
WEIGHTS = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
BINARY = (torch.arange(SAMPLES * CLASSES).view(SAMPLES, CLASSES) % 2).double()

LOSSES = {
    "cross entropy": lambda z: F.cross_entropy(z, Y),
    "sum": lambda z: F.cross_entropy(z, Y, reduction="sum"),
    "none, then a factor": lambda z: 0.3 * F.cross_entropy(z, Y, reduction="none").sum(),
    "class weights": lambda z: F.cross_entropy(z, Y, weight=WEIGHTS),
    "ignored": lambda z: F.cross_entropy(z, Y, ignore_index=1),
    "smoothing": lambda z: F.cross_entropy(z, Y, weight=WEIGHTS, label_smoothing=0.2),
    "soft targets": lambda z: F.cross_entropy(z, SOFT, weight=WEIGHTS),
    "pixels": lambda z: F.cross_entropy(z.view(2, CLASSES, 3), Y.view(2, 3)),
    "binary": lambda z: F.binary_cross_entropy_with_logits(z, BINARY),
    "binary, weights": lambda z: F.binary_cross_entropy_with_logits(z, BINARY, WEIGHTS, pos_weight=2 * WEIGHTS),
    "squares": lambda z: F.mse_loss(z, SOFT),
    "squares, the other way round": lambda z: F.mse_loss(SOFT, z),
    "both arguments": lambda z: F.mse_loss(z, 0.5 * z.roll(1, 0)),
    "two losses": lambda z: F.cross_entropy(z, Y) + 0.1 * F.mse_loss(z, SOFT),
}


@pytest.mark.parametrize("name", LOSSES)
def test_mean_over_probes_is_the_dense_trace(name, x):
    module = net()
    exact = dense_gauss_newton(module, LOSSES[name], x).trace().item()
    values = draws(module, lambda module: LOSSES[name](module(x)), count=1000)
    assert (values >= 0).all()
    assert abs(values.mean() - exact) < 4 * values.std() / len(values) ** 0.5


def test_half_precision_with_class_weights(x):
    module = net().bfloat16()
    exact = dense_gauss_newton(net(), LOSSES["class weights"], x).trace().item()

    def loss(module):
        return F.cross_entropy(module(x.bfloat16()), Y, weight=WEIGHTS.bfloat16())

    values = draws(module, loss, count=1000)
    assert abs(values.mean() - exact) < 4 * values.std() / len(values) ** 0.5 + 0.02 * exact


def test_equals_the_hessians_trace_on_a_relu_net_without_batch_norm(x):
    module = net(nn.ReLU)

    def loss(module):
        return F.cross_entropy(module(x), Y)

    values = draws(module, loss, count=1000)
    exact = lh.HessianTrace(probes=-1).value(context_of(module, loss)).item()
    assert abs(values.mean() - exact) < 4 * values.std() / len(values) ** 0.5


def test_batch_norm_in_training(x):
    module = net(middle=lambda: nn.BatchNorm1d(5, track_running_stats=False))
    exact = dense_gauss_newton(module, LOSSES["cross entropy"], x).trace().item()
    values = draws(module, lambda module: F.cross_entropy(module(x), Y), count=1000)
    assert abs(values.mean() - exact) < 4 * values.std() / len(values) ** 0.5


def test_the_gradient_is_that_of_the_dense_trace(x):
    """All unit vectors u at once, so that there is no noise: E over +-1 is the sum over them."""
    module = net()
    context = context_of(module, lambda module: F.cross_entropy(module(x), Y))
    count = 3000
    penalty = lh.HessianTrace(probes=count, method="gauss_newton")
    gradient = gradient_of(penalty.value(context), module.parameters())
    expected = gradient_by_differences(lambda: dense_gauss_newton(module, LOSSES["cross entropy"], x).trace(), module)
    assert relative_error(gradient, expected) < 0.1  # the noise of the probes


@pytest.mark.parametrize("settings", [{}, {"scale": "parameter"}], ids=str)
def test_the_gradient_is_exact_for_its_probe(settings, x):
    batch = (x, Y)
    report = lh.verify(smooth(), batch, lh.HessianTrace(method="gauss_newton", **settings))
    assert report.ok, report


def test_the_callback_sees_the_outputs_where_the_step_calls_its_loss():
    module = Classifier()
    trainer = fit(module, [lh.HessianRegularizer(lh.HessianTrace(method="gauss_newton"), strength=0.1)], max_steps=3)
    assert trainer.logged_metrics["curvature/gauss_newton_trace"] > 0


def test_losses_without_a_formula_are_refused(x):
    module = net()
    penalty = lh.HessianTrace(method="gauss_newton")
    with pytest.raises(ValueError, match=r"no loss function was seen.*method='two_pass'"):
        penalty.value(context_of(module, lambda module: module(x).square().mean()))
    with pytest.raises(ValueError, match=r"huber_loss, whose Gauss-Newton matrix is not known"):
        penalty.value(context_of(module, lambda module: F.huber_loss(module(x), SOFT)))
    with pytest.raises(ValueError, match="not linear in what mse_loss returns"):
        penalty.value(context_of(module, lambda module: F.mse_loss(module(x), SOFT).sqrt()))
    with pytest.raises(ValueError, match="The targets of cross_entropy depend on parameters"):
        penalty.value(context_of(module, lambda module: F.cross_entropy(module(x), module(2 * x).softmax(1))))
    with pytest.raises(ValueError, match="negative factor"):
        penalty.value(context_of(module, lambda module: -F.mse_loss(module(x), SOFT)))


@pytest.mark.parametrize("method", ["autograd", "gauss_newton"])
def test_scaled_by_parameter_the_trace_does_not_see_the_scale_of_a_normalized_layer(method, x):
    values = []
    for factor in (1, 10):
        module = net(middle=lambda: nn.BatchNorm1d(5, track_running_stats=False, eps=0))
        with torch.no_grad():
            module[0].weight *= factor
            module[0].bias *= factor
        context = context_of(module, lambda module: F.cross_entropy(module(x), Y))
        values.append(lh.HessianTrace(method=method, scale="parameter").value(context).item())
    assert values[0] == pytest.approx(values[1], rel=1e-9)


def test_scaled_by_parameter_it_is_the_trace_of_dhd(x):
    module = net()

    def loss(call):
        return F.cross_entropy(call(x), Y)

    sizes = [
        (p.square().mean(dim=1, keepdim=True).sqrt() if p.dim() > 1 else p.abs()).expand_as(p).reshape(-1)
        for p in module.parameters()
    ]
    expected = (dense_hessian(module, loss).diagonal() * torch.cat(sizes).square()).sum().item()
    value = lh.HessianTrace(probes=-1, scale="parameter").value(context_of(module, loss)).item()
    assert value == pytest.approx(expected, rel=1e-9)
