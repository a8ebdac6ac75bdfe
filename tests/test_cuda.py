"""On a GPU: the values and gradients of the CPU, side effects, precisions, compiled networks."""

import copy

import pytest
import torch
from agreement import assert_equal
from nets import POINTS, Classifier, context_of, data, fit, smooth, weights
from oracles import gradient_of, relative_error
from recorders import Recorder
from torch import nn
from torch.nn import functional as F

import lightning_hessian as lh
from lightning_hessian.cli import models, sequence_models
from lightning_hessian.curvature import HessianOperator, ProbeSource, extreme_eigenvalues

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

GPU = {"accelerator": "gpu", "devices": 1}
IMAGES, CLASSES = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1)).double(), torch.arange(6) % 4
TOKENS = torch.arange(48).view(4, 12) * 7 % 31


class FromTheCPU(ProbeSource):
    """The same probes on every device."""

    def draw(self, size, index, device="cpu", *args, **settings):
        return super().draw(size, index, "cpu", *args, **settings).to(device)


class Model(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net.double()


NETS = {
    "batch norm": (lambda: models.cnn((1, 8, 8), 4, width=8), IMAGES, CLASSES),
    "softplus": (lambda: models.softplus_cnn((1, 8, 8), 4, width=8), IMAGES, CLASSES),
    "resnet18": (lambda: models.resnet18((1, 8, 8), 4), IMAGES, CLASSES),
    "attention": (lambda: models.vit((1, 8, 8), 4), IMAGES, CLASSES),
    "batch norm without weights": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8, affine=False), nn.SiLU(), nn.Flatten(), nn.Linear(288, 4)
        ),
        IMAGES,
        CLASSES,
    ),
    "LSTM": (lambda: LastDimension(sequence_models.LSTM(31, width=8)), TOKENS, TOKENS.roll(-1, 1)),
    "norms": (
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.GELU(), nn.InstanceNorm2d(8, affine=True), nn.AvgPool2d(2)),
            *(nn.Flatten(), nn.LayerNorm(72), nn.SiLU(), nn.RMSNorm(72), nn.Linear(72, 4)),
        ),
        IMAGES,
        CLASSES,
    ),
}


class LastDimension(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, ids):
        return self.net(ids).transpose(1, 2)


def made(name, device):
    build, x, y = NETS[name]
    torch.manual_seed(0)
    return Model(build()).to(device), x.to(device), y.to(device)


def task(module, x, y):
    return F.cross_entropy(module.net(x), y)


PENALTIES = {
    "autograd": lh.HessianTrace(method="autograd"),
    "gauss_newton": lh.HessianTrace(method="gauss_newton"),
    "relative": lh.HessianTrace(scale="parameter"),
    "dropout": lh.HessianTrace(keep=0.5, drop="element"),
}


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("net", NETS)
def test_values_and_gradients_are_those_of_the_cpu(net, penalty):
    def found(device):
        module, x, y = made(net, device)
        with torch.backends.cudnn.flags(enabled=net != "LSTM"):  # the callback does this
            context = context_of(module, task, x, y, probes=FromTheCPU())
            value = PENALTIES[penalty](context)
            return value.cpu(), gradient_of(value, module.parameters()).cpu()

    (value, gradient), (expected, expected_gradient) = found("cuda"), found("cpu")
    assert value.item() == pytest.approx(expected.item(), rel=1e-8)
    assert relative_error(gradient, expected_gradient) < 1e-7


@pytest.mark.parametrize("net", NETS)
def test_taylor_mode_agrees_with_autograd(net):
    module, x, y = made(net, "cuda")
    assert_equal(module, lambda module: task(module, x, y), count=2)


METHODS = ["taylor", "autograd", "gauss_newton", "two_pass", "central_difference"]
REGULARIZERS = {
    **{method: lh.HessianTrace(method=method) for method in METHODS},
    "norm": lh.HessianNorm(),
    "SAM": lh.SharpnessAware(),
    "confidence": lh.ConfidencePenalty(),
    "input gradient": lh.InputGradientNorm(),
    "Jacobian": lh.JacobianNorm(),
    "input Hessian": lh.InputHessianNorm(),
}


class WithDropout(Classifier):
    def __init__(self, **settings):
        super().__init__(middle=nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.3)), **settings)


@pytest.mark.parametrize("name", REGULARIZERS)
def test_a_fit_is_reproducible_and_leaves_the_random_numbers_alone(name):
    def trained(strength):
        module, recorder = WithDropout(), Recorder()
        callback = lh.HessianRegularizer(copy.deepcopy(REGULARIZERS[name]), strength)
        torch.manual_seed(3)
        fit(module, [callback, recorder], max_steps=4, **GPU)
        return weights(module).cpu(), torch.cuda.get_rng_state()

    (first, state), (again, _) = trained(1e-2), trained(1e-2)
    torch.testing.assert_close(first, again, rtol=1e-9, atol=1e-12)
    plain, plain_state = trained(0.0)
    assert torch.equal(state, plain_state)
    assert not torch.allclose(first, plain)


IN_LOW_PRECISION = [
    *((name, "32-true") for name in METHODS),
    *((name, "bf16-mixed") for name in METHODS if name != "central_difference"),
    *((name, "16-mixed") for name in ("taylor", "two_pass")),
]


@pytest.mark.parametrize(("name", "precision"), IN_LOW_PRECISION)
def test_in_low_precision_the_value_is_near_that_of_float64(name, precision):
    def values(precision):
        dtype = torch.float64 if precision == "64-true" else torch.float32
        module, recorder = smooth(dtype=dtype), Recorder()
        callback = lh.HessianRegularizer(lh.HessianTrace(probes=4, method=name), 1e-2)
        fit(module, [callback, recorder], data(dtype=dtype), max_steps=3, precision=precision, **GPU)
        key = "curvature/gauss_newton_trace" if name == "gauss_newton" else "curvature/hessian_trace"
        return [row[key] for row in recorder.rows]

    found, expected = values(precision), values("64-true")
    assert len(found) == 3
    assert found == pytest.approx(expected, rel=0.15, abs=0.15)


@pytest.mark.parametrize("method", ["taylor", "gauss_newton", "two_pass"])
def test_a_compiled_network_has_the_gradient_of_an_eager_one(method):
    def trained(compiled):
        module = smooth(dtype=torch.float32)
        if compiled:
            module.net.compile()
        fit(module, [lh.HessianRegularizer(lh.HessianTrace(method=method), 1e-2)], data(dtype=torch.float32),
            max_steps=2, **GPU)  # fmt: skip
        return weights(module)

    assert relative_error(trained(True), trained(False)) < 1e-3


def test_the_largest_eigenvalues_are_those_of_the_cpu():
    def found(device):
        module, x, y = made("softplus", device)
        loss = context_of(module, task, x, y).loss
        return extreme_eigenvalues(HessianOperator(loss, list(module.parameters())), iterations=60)

    ours, expected = found("cuda"), found("cpu")
    torch.testing.assert_close(ours.largest.values.cpu(), expected.largest.values, rtol=1e-6, atol=0)
    assert ours.largest.residuals.item() < 1e-3 * ours.largest.values.item()


@pytest.mark.parametrize("attack", [lh.FGSM, lh.PGD])
def test_an_attack_stays_on_the_device(attack):
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double().cuda()
    x, y = POINTS.sigmoid().cuda(), (torch.arange(12) % 2).cuda()
    moved = attack(0.1)(net, x, y)
    assert moved.device == x.device
    assert 0 < (moved - x).abs().max() <= 0.1 + 1e-9
