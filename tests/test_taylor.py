"""Taylor mode: values and gradients against reverse over reverse over reverse, and what is refused by name."""

import copy
import math

import pytest
import torch
from agreement import assert_equal, by_taylor_mode, directions
from nets import Checkpointed, Classifier, context_of, data, fit, smooth, task_loss, weights
from oracles import gradient_of, relative_error
from recorders import LiveTensors, Recorder
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.nn import functional as F

import lightning_hessian as lh
from lightning_hessian.cli import models
from lightning_hessian.curvature.taylor import rules, taylor_mode

pytestmark = pytest.mark.usefixtures("float64")


IMAGES, CLASSES = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1)).double(), torch.arange(4)


def image_loss(net):
    return F.cross_entropy(net(IMAGES.to(torch.get_default_dtype())), CLASSES)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", ["mlp", "cnn", "softplus_cnn", "vit", "resnet18"])
def test_the_models_of_the_command_line(name, count):
    torch.manual_seed(0)
    net = getattr(models, name)((1, 8, 8), 4, **({"width": 8} if name in ("mlp", "cnn", "softplus_cnn") else {}))
    assert_equal(net.double(), image_loss, count=count)


def test_large_convolutions_which_go_one_by_one(monkeypatch):
    monkeypatch.setattr(rules, "STACKED_BYTES", 0)
    torch.manual_seed(0)
    assert_equal(models.cnn((1, 8, 8), 4, width=8).double(), image_loss, count=2)


class Language(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.embedding = nn.Embedding(9, 6, padding_idx=2)
        self.cell, self.head = cell, nn.Linear(8, 9)

    def forward(self, x):
        return self.head(self.cell(self.embedding(x))[0])


TOKENS = torch.arange(12).view(3, 4) % 9
LAYERS = {
    "group norm": nn.GroupNorm(2, 6), "instance norm": nn.InstanceNorm1d(6, affine=True), "RMS norm": nn.RMSNorm(6),
    "batch norm, evaluation": nn.BatchNorm1d(6).eval(), "local response norm": nn.LocalResponseNorm(2),
    "weight norm": nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)),
    "GLU": nn.Sequential(nn.Linear(6, 12), nn.GLU()),
    "dropout": nn.Dropout(0.4), "GELU": nn.GELU(), "GELU, tanh": nn.GELU("tanh"), "Mish": nn.Mish(), "ELU": nn.ELU(),
    "SELU": nn.SELU(), "CELU": nn.CELU(0.5),
    "ELU in place": nn.ELU(0.7, inplace=True), "LogSigmoid": nn.LogSigmoid(),
    "Hardswish": nn.Hardswish(), "Hardsigmoid": nn.Hardsigmoid(),
    "Hardsigmoid in place": nn.Hardsigmoid(inplace=True), "LeakyReLU": nn.LeakyReLU(), "PReLU": nn.PReLU(),
    "ReLU6": nn.ReLU6(),
    "SiLU in place": nn.SiLU(inplace=True), "ReLU in place": nn.ReLU(inplace=True), "log-softmax": nn.LogSoftmax(1),
    "softmax": nn.Softmax(1), "softsign": nn.Softsign(), "tanh": nn.Tanh(),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    torch.manual_seed(0)
    layer = copy.deepcopy(LAYERS[name])
    x = torch.randn(5, 4)
    if name in ("instance norm", "local response norm"):
        net = nn.Sequential(nn.Linear(4, 12), nn.Unflatten(1, (6, 2)), layer, nn.Flatten(), nn.Linear(12, 3))
    else:
        net = nn.Sequential(nn.Linear(4, 6), layer, nn.Linear(6, 3))
    assert_equal(net.double(), lambda net: net(x.to(torch.get_default_dtype())).square().mean().exp())


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_and_embeddings(cell):
    torch.manual_seed(0)
    net = Language(cell(6, 8, 2, batch_first=True, dropout=0.2)).double()
    assert_equal(net, lambda net: F.cross_entropy(net(TOKENS).transpose(1, 2), TOKENS))


RECURRENT = {
    "two layers, both ways": (nn.LSTM, {"num_layers": 2, "bidirectional": True, "dropout": 0.3, "batch_first": True}),
    "projection": (nn.LSTM, {"num_layers": 2, "proj_size": 3}), "no biases": (nn.LSTM, {"bias": False}),
    "GRU, two layers, both ways": (nn.GRU, {"num_layers": 2, "bidirectional": True}),
    "GRU, no biases": (nn.GRU, {"bias": False}),
    "RNN, relu, both ways": (nn.RNN, {"nonlinearity": "relu", "bidirectional": True}),
}  # fmt: skip


@pytest.mark.parametrize("packs", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", RECURRENT)
def test_all_of_a_recurrent_layer(name, packs):
    kind, options = RECURRENT[name]
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), kind(5, 4, **options)).double()
    x = torch.randn(3, 6, 4, dtype=torch.float64)

    def loss(net):
        inputs, cell = net[1](net[0](x)), net[2]
        if packs:
            inputs = nn.utils.rnn.pack_padded_sequence(inputs, [4, 6, 1], batch_first=True, enforce_sorted=False)
        output, states = cell(inputs)
        states = states if isinstance(states, tuple) else (states,)
        output = output.data if packs else output
        return output.square().mean() + sum((i + 1) * part.exp().mean() for i, part in enumerate(states))

    assert_equal(net, loss, count=2)


@pytest.mark.parametrize("options", [{}, {"norm_first": True, "activation": "gelu"}, {"dropout": 0.3}], ids=str)
def test_transformer_layers(options):
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **{"dropout": 0.0, **options}).double()
    x = torch.randn(2, 5, 8)
    assert_equal(net, lambda net: net(x).square().mean())


ATTENTION = {
    "plain": {}, "causal": {"is_causal": True}, "scale": {"scale": 0.3}, "dropout": {"dropout_p": 0.3},
    "boolean mask": {"attn_mask": torch.rand(5, 5) > 0.3}, "float mask": {"attn_mask": torch.randn(5, 5).double()},
    "grouped queries": {"enable_gqa": True},
}  # fmt: skip


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name):
    torch.manual_seed(0)
    heads = 2 if name == "grouped queries" else 4

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.kv = nn.Linear(6, 12), nn.Linear(6, 2 * 3 * heads)

        def forward(self, x):
            q = self.q(x).unflatten(-1, (4, 3)).transpose(1, 2)
            k, v = (part.unflatten(-1, (heads, 3)).transpose(1, 2) for part in self.kv(x).chunk(2, -1))
            return F.scaled_dot_product_attention(q, k, v, **ATTENTION[name])

    x = torch.randn(2, 5, 6)
    assert_equal(Attention().double(), lambda net: net(x).square().sum())


SOFT = torch.rand(6, 4, generator=torch.Generator().manual_seed(0)).double().softmax(1)
HARD, WEIGHT = torch.tensor([0, 3, 1, -100, 2, 2]), torch.tensor([1.0, 2.0, 0.5, 1.5]).double()
SIGNS = torch.tensor([1.0, -1.0]).double().repeat(12).view(6, 4)
LOSSES = {
    **{f"cross entropy {options}": (lambda z, o=options: F.cross_entropy(z, HARD, **o)) for options in [
        {}, {"reduction": "sum"}, {"weight": WEIGHT}, {"label_smoothing": 0.2},
        {"weight": WEIGHT, "label_smoothing": 0.1}, {"weight": WEIGHT, "reduction": "sum", "label_smoothing": 0.3},
    ]},
    "soft targets": lambda z: F.cross_entropy(z, SOFT), "K dimensions": lambda z: F.cross_entropy(
        z.view(3, 4, 2), torch.arange(6).view(3, 2) % 4),
    "soft targets, weighted": lambda z: F.cross_entropy(z, SOFT, weight=WEIGHT, label_smoothing=0.1),
    "unreduced": lambda z: (F.cross_entropy(z, HARD, reduction="none") ** 2).mean(),
    "NLL": lambda z: F.nll_loss(F.log_softmax(z, 1), HARD), "KL": lambda z: F.kl_div(F.log_softmax(z, 1), SOFT),
    "BCE with logits": lambda z: F.binary_cross_entropy_with_logits(z, SOFT, pos_weight=WEIGHT),
    "BCE": lambda z: F.binary_cross_entropy(z.sigmoid(), SOFT), "MSE": lambda z: F.mse_loss(z, SOFT),
    "Huber": lambda z: F.huber_loss(z, SOFT, delta=0.7), "smooth L1": lambda z: F.smooth_l1_loss(z, SOFT, beta=0.3),
    "L1": lambda z: F.l1_loss(z.exp(), SOFT), "soft margin": lambda z: F.soft_margin_loss(z, SIGNS),
    "Gaussian NLL": lambda z: F.gaussian_nll_loss(z, SOFT, z.exp()),
    "Poisson NLL": lambda z: F.poisson_nll_loss(z, SOFT),
    "cosine": lambda z: F.cosine_similarity(z, SOFT).mean(),
    "norm": lambda z: z.norm(dim=1).sum() + z.std() + z.var(0).sum(),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    x = torch.randn(6, 3)
    assert_equal(net, lambda net: LOSSES[name](net(x)))


SATURATED = torch.tensor([1.0, 1.0, 1e3, -1e3])
SPECIAL = {
    "BCE": lambda z: F.binary_cross_entropy((z * SATURATED).sigmoid(), torch.tensor([1.0, 0.0, 1.0, 0.0])),
    "BCE, wrong": lambda z: F.binary_cross_entropy((z * SATURATED).sigmoid(), torch.tensor([1.0, 0.0, 0.0, 1.0])),
    "BCE at 0 and 1": lambda z: F.binary_cross_entropy((10 * z).clamp(0, 1), torch.tensor([1.0, 0.0, 0.0, 1.0])),
    "std of constants": lambda z: (0 * z).std() + z.std() + torch.std_mean(z - 9, 0)[0],
    "std of a dead unit": lambda z: (z - 9).relu().std(),
    "root": lambda z: (z - 9).relu().sqrt().sum() + (z - 9).relu().pow(0.5).sum(),
    "power": lambda z: (z - 9).relu().pow(1.5).sum() + (z - 9).relu().pow(2.5).sum(),
    "logarithm": lambda z: torch.xlogy((z - 9).relu(), (z - 9).relu()).sum() + torch.xlogy(z.exp(), z.exp()).sum(),
}  # fmt: skip


@pytest.mark.parametrize("name", SPECIAL)
def test_where_derivatives_are_infinite_it_has_what_autograd_has(name):
    torch.manual_seed(0)
    net = nn.Linear(3, 4)

    def loss(net):
        z = net(torch.ones(3)) + 1
        return SPECIAL[name](z) + z.exp().sum()

    plain = gradient_of(loss(net), net.parameters())
    found, _ = by_taylor_mode(net, loss, list(net.parameters()), directions(list(net.parameters()), 1))
    torch.testing.assert_close(gradient_of(found, net.parameters()), plain)
    assert_equal(net, loss, count=2)


def packed(z):
    together = nn.utils.rnn.pack_padded_sequence(z, torch.tensor([3, 2]), batch_first=True)
    return nn.utils.rnn.pad_packed_sequence(together, batch_first=True, padding_value=0.5)[0]


TABLE, ADJACENT = torch.tensor([0, 2, 1]), torch.eye(6).double().roll(1, 0)
CALLS = {
    "cast to integers": lambda z: (z * (3 * z).to(torch.long) + z * (3 * z).type(torch.long) + z * (2 * z).int()).exp(),
    "cast to truth values": lambda z: z.square() * z.to(torch.bool) + z.long().bool() * z,
    "rsub with alpha": lambda z: torch.rsub(z, 3, alpha=2).exp(),
    "Huber, weighted": lambda z: F.huber_loss(z, SOFT, delta=0.7, weight=WEIGHT.expand(6, 4)),
    "smoothed targets that move": lambda z: F.cross_entropy(z, z.square().softmax(1), label_smoothing=0.2),
    "smoothed targets alone": lambda z: F.cross_entropy(SOFT, z.softmax(1), label_smoothing=0.2).exp(),
    "weights that move": lambda z: F.cross_entropy(z, SOFT, weight=z[0].exp(), label_smoothing=0.1),
    "random fills": lambda z: z * z.clone().normal_() + z.exp() * z.clone().bernoulli_(0.5) + z * z.clone().zero_(),
    "torch.embedding": lambda z: torch.embedding(z, TABLE, 2).exp().sum() + torch.embedding(z, TABLE).square().sum(),
    "aten.embedding": lambda z: torch.ops.aten.embedding(z, TABLE, 2).exp(),
    "complex": lambda z: (torch.complex(z, 2 * z).exp() + torch.polar(z.exp(), z) ** 2).abs(),
    "STFT": lambda z: torch.stft(z.flatten(), 8, return_complex=True, window=torch.ones(8)).abs(),
    "sums by name": lambda z: torch.add(input=z, other=z) * torch.sub(input=z, other=z.exp(), alpha=2),
    "quotients by name": lambda z: torch.div(input=z, other=z + 5) * torch.pow(input=z, exponent=3),
    "bounds by name": lambda z: torch.clamp_min(input=z, min=0.1) * torch.clamp_max(input=z, max=0.2),
    "maxima by name": lambda z: torch.amax(input=z, dim=1).exp() + torch.max(input=z, dim=1)[0].square(),
    "maxima of two by name": lambda z: torch.maximum(input=z, other=z * z).exp(),
    "masks by name": lambda z: torch.masked_fill(input=z, mask=z > 0, value=0.3).exp(),
    "choice by name": lambda z: torch.where(condition=z > 0, input=z, other=z * z).exp(),
    "p-norms": lambda z: z.norm(1) * z.norm(math.inf) * z.norm(3, dim=1) + torch.linalg.norm(z[0], 1),
    "p-norms of zeros": lambda z: F.normalize(z, p=1).exp() + z.sub(9).relu().norm(3) + z.exp(),
    "distances": lambda z: F.pairwise_distance(z, z.exp(), p=1) * F.pairwise_distance(z, z.exp(), keepdim=True),
    "triplets": lambda z: F.triplet_margin_loss(z[:2], z[2:4], z[4:], swap=True, reduction="none").square(),
    "triplets, p = 1": lambda z: F.triplet_margin_loss(z[:2], z[2:4], z[4:], p=1, margin=2.0).square(),
    "cosine embedding": lambda z: F.cosine_embedding_loss(z, SOFT, SIGNS[0].repeat(3)[:6], margin=-0.9),
    "packed sequences": lambda z: packed(z.view(2, 3, 4)).exp(),
    "gradients as constants": lambda z: z * torch.autograd.grad(z.exp().sum(), z, retain_graph=True)[0],
    "sparse matrices": lambda z: (ADJACENT.to_sparse() @ z) * torch.mm(ADJACENT.to_sparse_csr(), z.exp()),
    "sparse.mm": lambda z: torch.sparse.mm(ADJACENT.to_sparse(), z).exp(),
    "sparse input": lambda z: F.linear(ADJACENT.to_sparse(), z.T @ z.new_ones(6, 6), z.sum(1)[:4]).exp(),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_calls(name):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))
    x = torch.randn(6, 3)
    assert_equal(net, lambda net: CALLS[name](net(x)).mean(), count=2)


def test_some_parameters_only_shared_ones_and_checkpoints():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 4), nn.Dropout(0.2)).double()
    net[3].weight = net[0].weight
    x = torch.randn(6, 4)

    def loss(net):
        return net(x).square().mean().exp()

    assert_equal(net, loss, tensors=[net[0].weight, net[1].bias])
    assert_equal(Checkpointed(net, use_reentrant=False), loss)


def test_properties_are_views_with_coefficients():
    net = nn.Linear(4, 4).double()
    x = torch.randn(3, 4).double()

    def loss(net):
        y = net(x)
        return (y.T @ y).mT.square().sum() + torch.view_as_complex(y.view(3, 2, 2)).real.exp().sum() + y.H.sum()

    assert_equal(net, loss)
    assert_equal(net, lambda net: net(x).square().sum() + net(x).data.exp().sum() + net(x).detach().exp().sum())


def writes(name):
    def loss(net):
        y = net(torch.ones(3, 4))
        if name == "out":
            return torch.add(y, y, out=torch.zeros(3, 4)).sum()
        if name == "view first":
            z = torch.zeros(3, 4)
            row = z[0]
            z[0] = y[0]
            return row.square().sum()
        if name == "elsewhere":
            z = y.clone()
            row = z[0]
            row += 1
            z[1] = row
            return z.square().sum()
        if name == "under no_grad":
            z = y.clone()
            z[0].mul_(y[1])
            with torch.no_grad():
                z.mean()
            return z.square().sum()
        if name == "through a view":
            z = y.clone()
            z[0].mul_(2)
            return z.square().sum()
        z = torch.zeros(3, 4)
        z[1:] = y[1:]
        z += y
        z.mul_(y).clamp_(min=-5)
        z[0].sum()
        z[0] += y[0]
        z[:, :2] *= y[:, 2:]
        with torch.no_grad():
            z[1].zero_()
        w = y.exp().detach_()
        return (w * z.square()).sum()

    return loss


def test_writes_in_place_are_right_or_refused():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    assert_equal(net, writes("right"))
    for name, match in {
        "out": "writes into `out`",
        "view first": r"\(used in .*\) was written in place through another",
        "through a view": r"\(used in .*\) was written in place through another",
        "elsewhere": "was written in place through another",
        "under no_grad": "was written in place through another",
    }.items():
        with pytest.raises(lh.HigherOrderError, match=match):
            by_taylor_mode(net, writes(name), list(net.parameters()), directions(list(net.parameters()), 1))


class Exponential(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.exp(), x > 0

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, gradient, _):
        return gradient * ctx.saved_tensors[0].exp()

    @staticmethod
    def jvp(ctx, tangent):  # is not used: nested, it would be a constant
        return tangent * ctx.saved_tensors[0].exp(), None


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, power):
        ctx.power = power
        ctx.save_for_backward(a, b)
        return a * b**power

    @staticmethod
    def backward(ctx, gradient):
        a, b = ctx.saved_tensors
        return gradient * b**ctx.power, gradient * ctx.power * a * b ** (ctx.power - 1), None


class Once(Exponential):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient, _):
        return gradient


class Opaque(Exponential):
    @staticmethod
    def backward(ctx, gradient, _):
        return gradient.detach()


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def test_custom_functions_are_carried_by_their_backward():
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    net[1].register_full_backward_hook(lambda module, inputs, outputs: None)
    x = torch.ones(2, 3)

    def loss(net):
        y, positive = Exponential.apply(net(x))
        return (Product.apply(y, y * y, 3) * positive).mean()

    assert_equal(net, loss, count=2)


def test_what_cannot_be_carried_is_refused_by_name():
    net = nn.Linear(3, 3).double()
    x = torch.ones(2, 3)
    tensors = list(net.parameters())
    for function, match in {
        lambda y: Once.apply(y)[0]: "passes through Once, whose backward is marked @once_differentiable",
        lambda y: Opaque.apply(y)[0]: r"function Opaque \(called in .*\) has a backward that cannot be differentiated",
        lambda y: Doubling.apply(y * 1): "Doubling .* writes into its arguments",
        lambda y: torch.cdist(y, y): "cdist.* has no Taylor rule",
        lambda y: torch.autograd.grad(y.sum(), y, create_graph=True)[0]: "A gradient is taken inside the step",
        lambda y: (y * 1).t_(): r"t_ \(called in .*\) writes in place",
        lambda y: F.embedding(torch.arange(2), y, scale_grad_by_freq=True): "scale_grad_by_freq=True",
        lambda y: F.embedding(torch.arange(2), y, max_norm=1.0): "max_norm=1",
        lambda y: torch.native_layer_norm(y, [3], None, None, 1e-5)[0]: "native_layer_norm",
    }.items():
        with pytest.raises(lh.HigherOrderError, match=match):
            by_taylor_mode(net, lambda net, f=function: f(net(x)).sum(), tensors, directions(tensors, 1))
    assert not any(hasattr(t, "_taylor_coefficients") for t in tensors)


def test_an_operation_that_is_not_seen_does_not_go_unnoticed():
    @torch.jit.script
    def scripted(x):
        return x * x

    class Scripted(Classifier):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(scripted(self.net(batch[0])), batch[1])

    with pytest.raises(lh.HigherOrderError, match="the first Taylor coefficient is not the slope of the loss"):
        fit(Scripted(), [lh.HessianRegularizer(lh.HessianTrace(method="taylor"), 1e-3)], max_steps=1)


SETTINGS = [
    {}, {"probes": 3}, {"keep": 0.5}, {"keep": 0.5, "drop": "element", "probes": 2}, {"scale": "parameter"},
    {"clamp": 0.0}, {"parameters": "*.weight"}, {"probes": -1}, {"distribution": "gaussian"},
]  # fmt: skip


def trained(penalties, module=Classifier, **settings):
    net = module()
    recorder = Recorder()
    settings = {"max_steps": 3, "max_epochs": 2, **settings}
    fit(net, [lh.HessianRegularizer(penalties, 0.05), recorder], **settings)
    return weights(net), recorder.rows


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_callback_trains_as_with_autograd(settings):
    (ours, rows), (expected, other_rows) = (
        trained(lh.HessianTrace(method=method, **settings)) for method in ("taylor", "autograd")
    )
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10)
    for row, other in zip(rows, other_rows, strict=True):
        assert row == pytest.approx(other, rel=1e-9)


OTHERS = [lh.InputGradientNorm(), lh.HessianTrace(method="two_pass"), lh.HessianTrace(method="gauss_newton"), "taylor"]


@pytest.mark.parametrize("other", OTHERS, ids=str)
@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}], ids=str)
def test_beside_other_penalties(other, settings):
    def both(method):
        second = lh.HessianTrace(method=method, probes=2) if other == "taylor" else copy.deepcopy(other)
        return [lh.HessianTrace(method=method), second]

    (ours, _), (expected, _) = (trained(both(method), **settings) for method in ("taylor", "autograd"))
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10)


def test_in_bfloat16_it_is_near_float32():
    def values(precision):
        module, recorder = smooth(dtype=torch.float32), Recorder()
        callback = lh.HessianRegularizer(lh.HessianTrace(method="taylor", probes=4), 1e-3)
        fit(module, [callback, recorder], data(dtype=torch.float32), max_steps=3, precision=precision)
        return [row["curvature/hessian_trace"] for row in recorder.rows]

    for a, b in zip(values("bf16-mixed"), values("32-true"), strict=True):
        assert a == pytest.approx(b, rel=0.1, abs=0.1)


class OwnAutocast(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(x).float()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_may_have_an_autocast_of_its_own(compiled):
    module = smooth(dtype=torch.float32)
    module.net = OwnAutocast(module.net)
    if compiled:
        module.net.compile(backend="aot_eager")
    penalty = lh.HessianTrace(method="taylor", probes=32)
    fit(module, [lh.HessianRegularizer(penalty, 1e-3)], data(dtype=torch.float32), max_steps=1)


WEIGHTS = torch.randn(8, 8, generator=torch.Generator().manual_seed(2)).requires_grad_()
MAPS = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(3))
ROWS = MAPS[0, :, :4, 0].T
UNDER_AUTOCAST = {
    "unbatched linear": (nn.Linear(8, 8), ROWS[0]), "convolution": (nn.Conv2d(8, 8, 3), MAPS),
    "transposed convolution": (nn.ConvTranspose2d(8, 8, 3), MAPS),
    **{type(norm).__name__: (nn.Sequential(nn.Conv2d(8, 8, 3), norm), MAPS) for norm in [
        nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True)
    ]},
    "attention": (nn.MultiheadAttention(8, 2), ROWS), "LSTM": (nn.LSTM(8, 4), ROWS), "GRU": (nn.GRU(8, 4), ROWS),
    "LSTM, cell": (nn.LSTM(8, 4), lambda net: net(ROWS)[1][1]),
    "LSTM, projection": (nn.LSTM(8, 4, proj_size=2), ROWS),
    "LSTM, projection, cell": (nn.LSTM(8, 4, proj_size=2), lambda net: net(ROWS)[1][1]),
    "LSTM, packed": (nn.LSTM(8, 4), lambda net: net(nn.utils.rnn.pack_sequence([ROWS, ROWS[:2]]))[0].data),
    "addmm": (nn.ParameterList([WEIGHTS]), lambda net: torch.addmm(ROWS[0], ROWS, net[0], beta=0.5)),
    "baddbmm": (nn.ParameterList([WEIGHTS]), lambda net: torch.baddbmm(ROWS, ROWS[None], net[0][None])),
}  # fmt: skip


@pytest.mark.parametrize("name", UNDER_AUTOCAST)
def test_under_autocast_dtypes_are_those_of_a_plain_step(name):
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    net, x = copy.deepcopy(UNDER_AUTOCAST[name])
    parameters = list(net.parameters())
    for parameter in parameters:
        nn.init.normal_(parameter, std=0.3)
    v = directions(parameters, 1)

    def output():
        if callable(x):
            return x(net)
        y = net(x, x, x) if name == "attention" else net(x)
        return y[0] if isinstance(y, tuple) else y

    def with_coefficients():
        with taylor_mode(parameters, v, net) as mode:
            y = output()
            second = mode.second(y.float().sigmoid().square().sum())
        return y, second

    exact = with_coefficients()[1]
    with torch.autocast("cpu", torch.bfloat16):
        plain, (y, second) = output(), with_coefficients()
    assert y.dtype == plain.dtype
    torch.testing.assert_close(y, plain, rtol=0.05, atol=0.05)
    assert second.item() == pytest.approx(exact.item(), rel=0.1, abs=0.2)


EMPTY = {
    "layer norm": lambda z: F.layer_norm(z, (4,)), "RMS norm": lambda z: F.rms_norm(z, (4,)),
    "group norm": lambda z: F.group_norm(z, 2), "attention": lambda z: F.scaled_dot_product_attention(z, z, z),
    "product": lambda z: z.T @ z, "softmax": lambda z: z.softmax(1), "linear": lambda z: F.linear(z, z),
}  # fmt: skip


@pytest.mark.parametrize("name", EMPTY)
def test_a_part_without_samples(name):
    net, x = nn.Linear(4, 4), torch.ones(6, 4)
    assert_equal(net, lambda net: EMPTY[name](net(x[:0])).sum() + net(x).exp().sum())


def test_memory_is_flat():
    alive = LiveTensors((50, 150), collect=True)
    callback = lh.HessianRegularizer(lh.HessianTrace(method="taylor"), 1e-6)
    fit(smooth(), [callback, alive], max_steps=150, max_epochs=-1)
    assert alive.counts[1] <= alive.counts[0] + 2


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Written(nn.Module):
    def __init__(self, write):
        super().__init__()
        self.first, self.write, self.last = nn.Linear(64, 6), write, nn.Linear(6, 4)

    def forward(self, x):
        y = self.first(x.flatten(1)).tanh()
        return self.last(self.write(y.clone(), y))


def items(z, y):
    z[1:, 2] = 3.0
    z[:, 0] = y[:, 1] * y[:, 3]
    return z


def by_mask(z, y):
    z[y > 0] = 0
    return z * y


def added(z, y):
    z = torch.zeros_like(y)
    z += y
    z[1:] = y[:-1]
    z *= y
    return z


def all_of_it(z, y):
    z = torch.empty_like(y)
    z.copy_(y)
    z.index_add_(0, torch.arange(2), y[2:])
    z.fill_(1.0)
    return z * y


def frozen_rows(z, y):
    with torch.no_grad():
        z[0] = 0.5
    return z


compiles = pytest.mark.skipif(torch.__version__ < (2, 11), reason="refused before PyTorch 2.11, by name")
stays_compiled = pytest.mark.skipif(
    torch.__version__ < (2, 15),
    reason="PyTorch 2.11 runs compiled networks eagerly in this mode (2.12 to 2.14 unknown)",
)

COMPILED = {
    "mlp": lambda: models.mlp((1, 8, 8), 4, width=8),
    "cnn": lambda: models.cnn((1, 8, 8), 4, width=8),
    "vit": lambda: models.vit((1, 8, 8), 4),
    "in place": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.LayerNorm(6), nn.ReLU(inplace=True)),
    "weight norm": lambda: nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(64, 4))),
    **{write.__name__: lambda write=write: Written(write) for write in (items, by_mask, added, all_of_it, frozen_rows)},
    **{name: lambda layer=layer: nn.Sequential(nn.Flatten(), nn.Linear(64, 6), layer) for name, layer in {
        "F.tanh": Calls(F.tanh), "F.sigmoid": Calls(F.sigmoid), "Hardsigmoid": nn.Hardsigmoid(),
        "std": Calls(lambda x: x / x.std(1, keepdim=True)), "softsign": nn.Softsign(), "logsumexp": Calls(
            lambda x: x - x.logsumexp(1, keepdim=True)), "erf": Calls(torch.erf), "PReLU": nn.PReLU(6),
        "SELU": nn.SELU(), "CELU": nn.CELU(0.5), "ELU": nn.ELU(0.7), "Mish": nn.Mish(),
        "Hardswish": nn.Hardswish(), "LogSigmoid": nn.LogSigmoid(), "ReLU6": nn.ReLU6(),
    }.items()},
}  # fmt: skip


@stays_compiled
@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_network_is_one_graph_and_is_not_compiled_again(name):
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = COMPILED[name]()
    compiled, graphs, runs = copy.deepcopy(net), [], []

    def counts(graph, inputs):
        graphs.append(graph)

        def run(*args):
            runs.append(1)
            return graph(*args)

        return make_boxed_func(run)

    compiled.compile(backend=aot_autograd(fw_compiler=counts), fullgraph=True)
    for step in range(4):
        v = [[part * (step + 1) for part in directions(list(net.parameters()), 1)[0]]]
        found, gradient = [], []
        for one in (net, compiled):
            _, second = by_taylor_mode(one, image_loss, list(one.parameters()), v)
            found.append(second.item())
            gradient.append(gradient_of(second, one.parameters()))
            with torch.no_grad():
                torch._foreach_mul_(list(one.parameters()), 0.99)
        assert found[0] == pytest.approx(found[1], rel=1e-10)
        assert relative_error(*gradient) < 1e-10
    assert len(graphs) == 2  # forward and backward
    assert len(runs) == 8


@stays_compiled
def test_dropped_parts_of_a_probe_are_not_compiled_in():
    torch._dynamo.reset()
    torch.manual_seed(0)
    net, graphs = models.mlp((1, 8, 8), 4, width=8).double(), []
    compiled = copy.deepcopy(net)

    def counts(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    compiled.compile(backend=aot_autograd(fw_compiler=counts))
    for dropped in range(4):
        v = directions(list(net.parameters()), 2)
        v = [[None if i % 4 == dropped else part for i, part in enumerate(each)] for each in v]
        expected, found = (by_taylor_mode(one, image_loss, list(one.parameters()), v)[1] for one in (net, compiled))
        assert found.item() == pytest.approx(expected.item(), rel=1e-10)
        gradients = [gradient_of(expected, net.parameters()), gradient_of(found, compiled.parameters())]
        assert relative_error(*gradients) < 1e-10
    assert len(graphs) == 2


class Broken(nn.Module):
    def __init__(self, middle):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(8, 6), middle, nn.Linear(6, 4)
        self.calls = 0

    def forward(self, x):
        return self.last(self.middle(self, self.first(x)))


def by_item(net, y):
    return y.tanh() * y.detach().max().item()


def by_nonzero(net, y):
    return F.silu(y) * len((y.detach() > 0).nonzero()) / 100


def by_print(net, y):
    print(end="")
    return y.sigmoid()


def by_branch(net, y):
    return y.exp() if y.sum() > 0 else y.tanh()


def by_selection(net, y):
    return F.gelu(y) * y.detach()[y.detach() > 0].mean()


def at_the_limit(net, y):
    net.calls += 1
    return y.tanh() * net.calls + (y.detach().max().item() if net.calls % 2 else y.sin())


class Masked(nn.Module):
    def __init__(self, inner, **settings):
        super().__init__()
        self.inner, self.settings = inner, settings

    def forward(self, x):
        y = self.inner(*[x] * (3 if isinstance(self.inner, nn.MultiheadAttention) else 1), **self.settings)
        return y[0] if isinstance(y, tuple) else y


PADDING = torch.tensor([[False] * 7 + [True], [False] * 8, [False] * 8, [True] + [False] * 7])
BREAKS = {
    **{
        part.__name__: lambda part=part: Broken(part)
        for part in (by_item, by_nonzero, by_print, by_branch, by_selection)
    },
    "recompile limit": lambda: Broken(at_the_limit),
    "attention": lambda: Masked(nn.MultiheadAttention(8, 2, batch_first=True), key_padding_mask=PADDING),
    "attention, no weights": lambda: Masked(
        nn.MultiheadAttention(8, 2, batch_first=True), key_padding_mask=PADDING, need_weights=False
    ),
    "encoder": lambda: Masked(
        nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True), src_key_padding_mask=PADDING
    ),
}


@compiles
@pytest.mark.parametrize("name", BREAKS)
def test_what_a_compiled_network_leaves_to_python(name):
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = BREAKS[name]().double()
    compiled = copy.deepcopy(net)
    compiled.compile(backend="aot_eager")

    def loss(one):
        return one(IMAGES.double()[:, 0]).square().mean().exp()

    for step in range(20 if name == "recompile limit" else 3):
        v, found, gradient = directions(list(net.parameters()), 2), [], []
        for one in (net, compiled):
            task, second = by_taylor_mode(one, loss, list(one.parameters()), v)
            found.append([task.item(), second.item()])
            gradient.append(gradient_of(second, one.parameters()))
            with torch.no_grad():
                torch._foreach_mul_(list(one.parameters()), 0.99)
        assert found[0] == pytest.approx(found[1], rel=1e-10), step
        assert relative_error(*gradient) < 1e-10


def through_a_view(z, y):
    z[0] += y[1]
    return z


def under_a_view(z, y):
    part = z[1:]
    z[0] = 1.0
    return z + part.sum()


def into_a_part(z, y):
    z = torch.zeros_like(y)
    z[1:].copy_(y[1:])
    return z


def after_a_break(z, y):
    part = z[1:]
    print(end="")
    part.mul_(y[1:])
    return z


@compiles
@pytest.mark.parametrize("write", [through_a_view, under_a_view, into_a_part, after_a_break])
def test_a_write_that_another_view_would_miss_is_refused_in_a_compiled_network(write):
    torch._dynamo.reset()
    net = Written(write).double()
    if write is not through_a_view:  # Python's `z[0] += y` is carried, the compiler's is not
        with pytest.raises(lh.HigherOrderError, match="was written in place"):
            by_taylor_mode(net, image_loss, list(net.parameters()), directions(list(net.parameters()), 1))
    net.compile(backend="aot_eager")
    with pytest.raises(lh.HigherOrderError, match="was written in place"):
        by_taylor_mode(net, image_loss, list(net.parameters()), directions(list(net.parameters()), 1))


def test_manual_optimization_and_a_gradient_penalty():
    class Manual(lh.HessianRegularizationMixin, Classifier):
        def __init__(self, method):
            super().__init__()
            self.automatic_optimization = False
            self.regularizer = lh.HessianRegularizer(lh.HessianTrace(method=method), 0.05)

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.regularized(lambda: task_loss(self, batch)))
            optimizer.step()

    modules = [Manual(method) for method in ("taylor", "autograd")]
    for module in modules:
        fit(module, max_steps=-1, max_epochs=1, limit_train_batches=3)
    torch.testing.assert_close(*map(weights, modules), rtol=1e-9, atol=1e-10)


def test_without_lightning():
    net = smooth()
    batch = next(iter(data()))
    penalty = lh.HessianTrace(method="taylor")
    with penalty.forward_mode(lh.ForwardContext(dict(net.named_parameters()), lh.ProbeSource(3), net)) as mode:
        loss = task_loss(net, batch)
    value = penalty(lh.StepContext(loss, dict(net.named_parameters()), taylor=mode))
    # A loss that was computed already has the same penalty, by autograd.
    expected = penalty(context_of(net, task_loss, batch, probes=lh.ProbeSource(3)))
    assert value.item() == pytest.approx(expected.item(), rel=1e-10)


def test_verify_names_a_layer_whose_rule_is_wrong():
    def wrong(call):
        found = original(call)
        return found._replace(second=None if found.second is None else 1.01 * found.second)

    number = rules.rule_number(F.layer_norm)
    original, rules.RULE_LIST[number] = rules.RULE_LIST[number], wrong
    try:
        net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1))
        penalty = lh.HessianTrace(method="taylor")
        report = lh.verify(net, torch.ones(5, 3), penalty, loss=lambda net, x: net(x).exp().mean())
    finally:
        rules.RULE_LIST[number] = original
    assert report.faults == ("1",)


def test_resumed_equals_uninterrupted(tmp_path):
    def regularizer():
        return lh.HessianRegularizer(lh.HessianTrace(method="taylor"), 0.05)

    whole, part, resumed = smooth(), smooth(), smooth()
    fit(whole, [regularizer()], max_epochs=2)
    trainer = fit(part, [regularizer()], max_epochs=1)
    trainer.save_checkpoint(tmp_path / "part.ckpt")
    fit(resumed, [regularizer()], max_epochs=2, ckpt_path=tmp_path / "part.ckpt")
    assert torch.equal(weights(whole), weights(resumed))
