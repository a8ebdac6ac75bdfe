"""Layers that ``higher_order(derivatives=2)`` makes faster, against PyTorch's own, in three derivatives."""

import pytest
import torch
from oracles import gradient_of, relative_error
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

import lightning_hessian as lh
from lightning_hessian.curvature import ProbeSource, fused_norms, twice, watch_losses

D = {"dtype": torch.float64}


def parts(*shapes):
    return tuple(torch.randn(shape, **D, requires_grad=True) for shape in shapes)


def batch_norm(x, w, b):
    return fused_norms.batch_norm(x, None, None, w, b, training=True)


def convolution(name, **settings):
    return lambda x, w, b: twice.FASTER[getattr(F, name)](x, w, b, **settings)


CASES = {
    "batch norm, images": (batch_norm, ((4, 3, 2, 2), (3,), (3,))),
    "batch norm, rows": (batch_norm, ((5, 2), (2,), (2,))),
    "conv1d": (convolution("conv1d", padding=1), ((2, 2, 5), (3, 2, 3), (3,))),
    "conv2d, stride": (convolution("conv2d", stride=2, padding=1), ((2, 2, 5, 5), (2, 2, 3, 3), (2,))),
    "conv2d, groups": (
        convolution("conv2d", stride=(1, 2), groups=2, dilation=(2, 1)),
        ((1, 4, 4, 4), (4, 2, 2, 2), (4,)),
    ),
    "conv3d": (convolution("conv3d"), ((1, 2, 3, 3, 2), (2, 2, 2, 2, 2), (2,))),
    "silu": (twice.silu, ((9,),)),
}


@pytest.mark.parametrize("name", CASES)
def test_three_derivatives_are_right(name):
    function, shapes = CASES[name]
    tensors = parts(*shapes)

    def gradient(*tensors):
        # A gradient that depends on the layer's input, as in a network.
        return torch.autograd.grad(function(*tensors).sin().sum(), tensors, create_graph=True)

    assert gradcheck(function, tensors)
    assert gradgradcheck(function, tensors)
    assert gradgradcheck(gradient, tensors, gen_non_contig_grad_outputs=True)


@pytest.mark.parametrize("name", [name for name in CASES if name != "silu"])
@pytest.mark.parametrize("learned", [0, 1, 2], ids=["input", "weight", "bias"])
def test_only_one_of_the_tensors_may_need_a_gradient(name, learned):
    function, shapes = CASES[name]
    tensors = [t.detach().requires_grad_(i == learned) for i, t in enumerate(parts(*shapes))]

    def of_one(t):
        return function(*tensors[:learned], t, *tensors[learned + 1 :])

    assert gradcheck(of_one, (tensors[learned],))
    assert gradgradcheck(of_one, (tensors[learned],))


@pytest.mark.parametrize("name", ["batch norm, images", "conv2d, stride"])
def test_a_layer_may_have_no_bias_and_a_norm_no_weight(name):
    function, shapes = CASES[name]
    x, w, _ = parts(*shapes)
    assert gradgradcheck(lambda x, w: function(x, w, None), (x, w))
    if name.startswith("batch"):
        assert gradgradcheck(lambda x: function(x, None, None), (x,))


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding="same", bias=False), nn.BatchNorm2d(4), nn.SiLU(),
        nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2), nn.BatchNorm2d(4, affine=False), nn.SiLU(),
        nn.Conv2d(4, 4, 1, padding_mode="circular"), nn.Flatten(), nn.Linear(36, 3),
    ).double()  # fmt: skip


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_gauss_newton_penalty_is_that_of_the_plain_layers(channels_last):
    x, y = torch.randn(4, 2, 5, 5, **D), torch.tensor([0, 1, 2, 0])
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    found, statistics = [], []
    for derivatives in (2, 3):
        module = net()
        with lh.higher_order(module, derivatives), watch_losses() as seen:
            loss = F.cross_entropy(module(x), y)
        context = lh.StepContext(loss, dict(module.named_parameters()), ProbeSource(0, 0), losses=seen)
        value = lh.HessianTrace(method="gauss_newton").value(context)
        found.append(torch.cat([value.detach().view(1), gradient_of(value + loss, module.parameters())]))
        statistics.append(torch.cat([buffer.flatten().double() for buffer in module.buffers()]))
    assert relative_error(*found) < 1e-12
    torch.testing.assert_close(*statistics)


def test_a_third_derivative_of_a_step_made_for_two_is_right():
    x, y = torch.randn(4, 2, 5, 5, **D), torch.tensor([0, 1, 2, 0])
    found = []
    for derivatives in (2, 3):
        module = net()
        with lh.higher_order(module, derivatives):
            loss = F.cross_entropy(module(x), y)
        context = lh.StepContext(loss, dict(module.named_parameters()), ProbeSource(0, 0))
        value = lh.HessianTrace(method="autograd").value(context)
        found.append(torch.cat([value.detach().view(1), gradient_of(value, module.parameters())]))
    assert relative_error(*found) < 1e-11


def test_settings_and_types_are_respected():
    x, w, b = torch.randn(3, 2, 6), torch.randn(4, 2, 3), torch.randn(4)
    for settings in ({"padding": "same"}, {"padding": "valid", "stride": 2}, {"dilation": [2]}):
        with lh.higher_order(derivatives=2):
            ours = F.conv1d(x, w, b, **settings)
        torch.testing.assert_close(ours, F.conv1d(x, w, b, **settings))
    with lh.higher_order(derivatives=2):
        assert F.conv1d(x[0], w).shape == (4, 4)
        changed = x.clone()
        assert F.silu(changed, inplace=True) is changed
        for dtype in (torch.float32, torch.bfloat16):
            assert F.silu(x.to(dtype)).dtype == F.conv1d(x.to(dtype), w.to(dtype)).dtype == dtype
            assert F.batch_norm(x.to(dtype), None, None, training=True).dtype == dtype
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            F.batch_norm(torch.ones(1, 2), None, None, training=True)


@pytest.mark.parametrize("transform", ["vmap", "jvp", "jacrev"])
def test_transforms_of_functions_work_inside(transform):
    x = torch.randn(5, 2, 6, **D)

    def function(x):
        return F.silu(F.conv1d(F.batch_norm(x, None, None, training=True), torch.ones(3, 2, 2, **D)))

    make = {
        "vmap": lambda: torch.func.vmap(function)(torch.stack([x, 2 * x * x])),
        "jvp": lambda: torch.func.jvp(function, (x,), (x,))[1],
        "jacrev": lambda: torch.func.jacrev(function)(x),
    }[transform]
    with lh.higher_order(derivatives=2):
        ours = make()
    torch.testing.assert_close(ours, make())
