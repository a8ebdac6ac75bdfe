"""A zoo of layers: the penalty's value and gradient against differences of first-order gradients, in float64."""

import copy

import pytest
import torch
from nets import Checkpointed, OnceDifferentiable, context_of
from oracles import Differences, gradient_of, hessian_by_differences, relative_error
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import lightning_hessian as lh
from lightning_hessian.curvature import HessianOperator, ProbeSource

pytestmark = pytest.mark.usefixtures("float64")


class First(nn.Module):
    """Take the first output of a layer that has several."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


class SelfAttention(nn.Module):
    def __init__(self, dropout=0.0, weights=False):
        super().__init__()
        self.weights = weights
        self.attention = nn.MultiheadAttention(4, 2, dropout=dropout, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=self.weights)[0]


class FusedAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, 2)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)


class LowLevelNorms(nn.Module):
    """The norms by torch's own names, which take their arguments in another order."""

    def forward(self, x):
        x = torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False)
        x = torch.instance_norm(x.tanh(), None, None, None, None, True, 0.1, 1e-5, False)
        return torch.layer_norm(x.tanh(), x.shape[-1:])


def checkpointed(use_reentrant):
    return Checkpointed(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh()), use_reentrant)


def evaluated(layer):
    """The layer in evaluation mode, with running statistics that are not the initial ones."""
    layer(torch.randn(16, 4, 3) if isinstance(layer, nn.BatchNorm1d) else torch.randn(16, 4))
    layer.eval()
    layer.train = lambda mode=True: layer  # stays in evaluation when the network around it trains
    return layer


# Every layer maps (batch, 4, 4) to (batch, 4, ...); what stands before and after it is curved.
ZOO = {
    "batch norm": lambda: nn.BatchNorm1d(4),
    "batch norm without affine": lambda: nn.BatchNorm1d(4, affine=False),
    "batch norm, cumulative average": lambda: nn.BatchNorm1d(4, momentum=None),
    "batch norm in evaluation": lambda: evaluated(nn.BatchNorm1d(4)),
    "instance norm": lambda: nn.InstanceNorm1d(4, affine=True),
    "instance norm with running statistics": lambda: nn.InstanceNorm1d(4, track_running_stats=True),
    "layer norm": lambda: nn.LayerNorm(4),
    "layer norm over two dimensions": lambda: nn.LayerNorm((4, 4), bias=False),
    "layer norm without affine": lambda: nn.LayerNorm(4, elementwise_affine=False),
    "rms norm": lambda: nn.RMSNorm(4),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "local response norm": lambda: nn.LocalResponseNorm(2),
    "norms by torch's names": LowLevelNorms,
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
    "weight norm over all dimensions": lambda: parametrizations.weight_norm(nn.Conv1d(4, 4, 2), dim=None),
    "spectral norm in evaluation": lambda: evaluated(parametrizations.spectral_norm(nn.Linear(4, 4))),
    "attention": SelfAttention,
    "attention with dropout": lambda: SelfAttention(0.2),
    "attention with weights": lambda: SelfAttention(weights=True),
    "fused attention": FusedAttention,
    "transformer encoder, dropout 0": lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0, "gelu", batch_first=True),
    "transformer encoder, norm first": lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.1, "gelu", norm_first=True),
    "transformer decoder": lambda: Decoder(),
    "lstm": lambda: First(nn.LSTM(4, 3)),
    "lstm, two layers, both ways, dropout": lambda: First(nn.LSTM(4, 3, 2, bidirectional=True, dropout=0.3)),
    "gru": lambda: First(nn.GRU(4, 3)),
    "rnn": lambda: First(nn.RNN(4, 3)),
    "conv": lambda: nn.Conv1d(4, 3, 2, padding=1, groups=1),
    "conv 2d, strided": lambda: nn.Sequential(nn.Unflatten(2, (2, 2)), nn.Conv2d(4, 4, 2, stride=1, groups=2)),
    "conv 3d": lambda: nn.Sequential(nn.Unflatten(2, (2, 2, 1)), nn.Conv3d(4, 3, (2, 2, 1))),
    "transposed conv": lambda: nn.ConvTranspose1d(4, 3, 3, stride=2),
    "max pool": lambda: nn.MaxPool1d(2),
    "average pool": lambda: nn.AvgPool1d(2),
    "adaptive pool": lambda: nn.AdaptiveAvgPool1d(3),
    "dropout": lambda: nn.Dropout(0.3),
    "checkpoint": lambda: checkpointed(use_reentrant=False),
}  # fmt: skip
ACTIVATIONS = [
    nn.Sigmoid(), nn.Tanh(), nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.Softplus(), nn.Mish(), nn.ELU(), nn.CELU(),
    nn.SELU(), nn.Hardswish(), nn.LogSigmoid(), nn.Softsign(), nn.Tanhshrink(), nn.Softmax(-1), nn.GLU(), nn.ReLU(),
    nn.LeakyReLU(), nn.PReLU(), nn.Hardtanh(), nn.ReLU6(), nn.LogSoftmax(-1), nn.Hardsigmoid(), nn.RReLU(),
    nn.Softmin(-1),
]  # fmt: skip
ZOO.update({str(activation): (lambda activation=activation: activation) for activation in ACTIVATIONS})


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(4, 2, 8, 0.0, "gelu", batch_first=True)

    def forward(self, x):
        return self.layer(x, x.flip(0))


class Surrounded(nn.Module):
    """A linear layer and a curved one before the layer in question, a linear one after it."""

    def __init__(self, layer):
        super().__init__()
        self.before = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.layer = layer
        self.after = nn.LazyLinear(3)

    def forward(self, x):
        return self.after(self.layer(self.before(x)).flatten(1))


def surrounded(layer):
    torch.manual_seed(3)
    net = Surrounded(layer).double()
    x = torch.randn(5, 4, 4)
    net.eval()(x)  # so that the lazy layer has its size, without moving a statistic
    net.train()
    return net, lambda net: F.cross_entropy(net(x), torch.arange(5) % 3)


def penalty_and_gradient(net, loss, source):
    torch.manual_seed(0)
    value = lh.HessianTrace()(context_of(net, loss, probes=source))
    return value.item(), gradient_of(value, net.parameters())


def check(net, loss, step=3e-4):
    source = ProbeSource(seed=1)
    reference = Differences(copy.deepcopy(net), loss, step)
    value, gradient = penalty_and_gradient(net, loss, source)
    v = source.draw(gradient.numel(), 0, dtype=torch.float64)
    assert relative_error(value, reference.quadratic_form(v)) < 1e-5
    assert relative_error(gradient, reference.gradient_of_quadratic_form(v)) < 1e-5


@pytest.mark.parametrize("name", ZOO)
def test_zoo(name):
    check(*surrounded(ZOO[name]()))


@pytest.mark.parametrize(
    "loss",
    [
        lambda y: F.cross_entropy(y, torch.arange(5) % 3, label_smoothing=0.1),
        lambda y: F.binary_cross_entropy_with_logits(y, (torch.arange(15) % 2).view(5, 3).double()),
        lambda y: F.mse_loss(y, torch.linspace(-1, 1, 15).view(5, 3)),
        lambda y: F.nll_loss(y.log_softmax(1), torch.arange(5) % 3),
        lambda y: F.huber_loss(y, torch.zeros(5, 3)),
        lambda y: F.kl_div(y.log_softmax(1), torch.full((5, 3), 1 / 3), reduction="batchmean"),
        lambda y: 1 - F.cosine_similarity(y, torch.ones(5, 3)).mean(),
    ],
)
def test_losses(loss):
    net, _ = surrounded(nn.LayerNorm(4))
    x = torch.randn(5, 4, 4)
    check(net, lambda net: loss(net(x)))


def test_resnet18_with_batch_norm_in_training():
    torchvision = pytest.importorskip("torchvision")
    net = torchvision.models.resnet18(num_classes=10).double()
    for module in net.modules():  # a smooth network: across a kink, differences and derivatives differ
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.SiLU())
    net.maxpool = nn.Identity()
    x = torch.randn(4, 3, 16, 16)
    check(net, lambda net: F.cross_entropy(net(x), torch.arange(4)), step=1e-6)


def test_transformer_encoder_with_dropout_0():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="gelu", batch_first=True)
    net = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(40, 3)).double()
    x = torch.randn(4, 5, 8)
    check(net, lambda net: F.cross_entropy(net(x), torch.arange(4) % 3))


def test_embedding_and_lstm():
    net = nn.Sequential(nn.Embedding(11, 4), First(nn.LSTM(4, 6, 2, batch_first=True)), nn.Flatten(), nn.Linear(30, 3))
    x = torch.arange(20).view(4, 5) % 11
    check(net.double(), lambda net: F.cross_entropy(net(x), torch.arange(4) % 3))


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(3),
        nn.BatchNorm2d(3, momentum=None),
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
        nn.LayerNorm(5),
        nn.RMSNorm(5),
        nn.BatchNorm2d(3).eval(),
        nn.InstanceNorm2d(3, track_running_stats=True).eval(),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norms_return_and_move_what_the_fused_operator_does(norm, dtype):
    fused, ours = copy.deepcopy(norm).to(dtype), copy.deepcopy(norm).to(dtype)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    for _ in range(3):
        x = (3 * torch.randn(4, 3, 6, 5) + 1).to(dtype)
        expected = fused(x)
        with lh.higher_order():
            actual = ours(x)
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    for name, buffer in fused.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(4), nn.LayerNorm(5), nn.InstanceNorm1d(4)], ids=str)
def test_norms_refuse_what_the_fused_operator_refuses(norm):
    x = torch.randn(1, 4) if isinstance(norm, nn.BatchNorm1d) else torch.randn(1, 4, 1)
    with pytest.raises((ValueError, RuntimeError)) as expected:
        norm(x)
    with lh.higher_order(), pytest.raises(expected.type):
        norm(x)


def test_a_fused_layer_norm_stays_where_two_derivatives_are_taken_and_they_are_right():
    net, loss = surrounded(nn.LayerNorm(4))
    with lh.higher_order(net, derivatives=2) as context:
        task = loss(net)
    assert context.replaced == {}
    hessian = HessianOperator(task, net.parameters())
    products = torch.stack([hessian.matvec(e) for e in torch.eye(hessian.size, dtype=torch.float64)])
    assert relative_error(products, hessian_by_differences(net, loss)) < 1e-7
    with pytest.raises(lh.HigherOrderError, match="NativeLayerNormBackward"):
        HessianOperator(task, net.parameters(), differentiable=True)


def test_compiled_modules_run_eagerly():
    net, loss = surrounded(nn.LayerNorm(4))
    compiled = copy.deepcopy(net)
    compiled.layer.compile(backend="aot_eager")
    loss(compiled)  # compile outside first, so that there is something to bypass
    source = ProbeSource()
    value, gradient = penalty_and_gradient(net, loss, source)
    value_compiled, gradient_compiled = penalty_and_gradient(compiled, loss, source)
    assert value == value_compiled
    assert torch.equal(gradient, gradient_compiled)


def test_reentrant_checkpoint_is_refused_by_name():
    net, loss = surrounded(checkpointed(use_reentrant=True))
    with pytest.raises(lh.HigherOrderError, match=r"layer uses a reentrant checkpoint.*use_reentrant=False"):
        penalty_and_gradient(net, loss, ProbeSource())


class Margins(nn.Module):
    def forward(self, x):
        return x * F.multi_margin_loss(x.flatten(1), torch.arange(len(x)))


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return x.sum(1) * F.embedding_bag(torch.arange(4).view(4, 1), self.bag)


@pytest.mark.parametrize(
    ("net", "x", "message"),
    [
        (nn.Sequential(nn.Linear(4, 4), Margins()), torch.randn(4, 4).double(), r"multi_margin_loss.* in 1\)"),
        (nn.Sequential(nn.EmbeddingBag(9, 4)), torch.arange(8).view(4, 2), r"embedding_bag.* in 0\)"),
        (nn.Sequential(nn.Embedding(9, 4), Bag()), torch.arange(8).view(4, 2), r"embedding_bag.* in 1\)"),
    ],
)
def test_an_operator_without_double_backward_is_named(net, x, message):
    context = lh.higher_order(net.double())
    with context:
        task = net(x).square().mean()
    message += " cannot be differentiated three times"
    with pytest.raises(lh.HigherOrderError, match=message), context.explained():
        lh.HessianTrace()(lh.StepContext(task, dict(net.named_parameters())))


@pytest.mark.parametrize("settings", [{}, {"parameters": "before.*"}, {"keep": 0.3}], ids=str)
def test_a_function_marked_once_differentiable_is_not_left_out_in_silence(settings):
    net, loss = surrounded(OnceDifferentiable())
    context = context_of(net, loss)
    with pytest.raises(lh.HigherOrderError, match=r"OnceDifferentiable\.Function.*@once_differentiable"):
        lh.HessianTrace(**settings)(context)


@torch.jit.script
def scripted_layer_norm(x):
    return torch.layer_norm(x, [4])


@pytest.mark.parametrize(
    "norm",
    [scripted_layer_norm, lambda x: torch.ops.aten.layer_norm(x, [4]), lambda x: F.layer_norm(x, [4])],
    ids=["torchscript", "torch.ops", "outside of higher_order()"],
)
def test_a_fused_norm_is_found_however_it_got_into_the_graph(norm):
    x = torch.randn(3, 4, requires_grad=True)
    if norm is scripted_layer_norm:
        with lh.higher_order():
            task = norm(x.tanh()).pow(3).sum()
    else:
        task = norm(x.tanh()).pow(3).sum()
    with pytest.raises(lh.HigherOrderError, match="fused kernel of NativeLayerNorm"):
        lh.HessianTrace()(lh.StepContext(task, {"x": x}))


def test_spectral_norm_in_training_and_sparse_embeddings_are_refused_by_name():
    for layer, message in [
        (parametrizations.spectral_norm(nn.Linear(2, 2)), "'0.parametrizations.weight.0' is a spectral norm"),
        (torch.nn.utils.spectral_norm(nn.Linear(2, 2)), "'0' is a spectral norm in training mode"),
        (nn.Embedding(3, 2, sparse=True), "'0' has sparse gradients"),
    ]:
        with pytest.raises(lh.HigherOrderError, match=message), lh.higher_order(nn.Sequential(layer)):
            pass


def test_checkpointed_batch_norm_counts_a_batch_once():
    net, loss = surrounded(Checkpointed(nn.BatchNorm1d(4), use_reentrant=False))
    fused = copy.deepcopy(net)
    fused.layer.forward = fused.layer.block
    loss(fused)
    penalty_and_gradient(net, loss, ProbeSource())
    for name, buffer in fused.named_buffers():
        torch.testing.assert_close(net.get_buffer(name), buffer, rtol=1e-12, atol=1e-12)


def test_parameters_of_several_types():
    net = nn.Sequential(nn.Linear(4, 4).double(), nn.Tanh())
    scale = torch.tensor(1.0, dtype=torch.float32, requires_grad=True)
    with lh.higher_order():
        task = (net(torch.randn(3, 4)) * scale**2).square().mean()
    exact = lh.HessianTrace(probes=-1)(lh.StepContext(task, {**dict(net.named_parameters()), "scale": scale}))
    assert exact.isfinite()
    assert lh.HessianTrace()(lh.StepContext(task, {**dict(net.named_parameters()), "scale": scale})).isfinite()


def test_fused_kernels_by_their_native_names_are_refused():
    class Native(nn.Module):
        def forward(self, x):
            return torch.native_layer_norm(x, x.shape[-1:], None, None, 1e-5)[0]

    net, loss = surrounded(Native())
    with pytest.raises(lh.HigherOrderError, match=r"layer calls torch\.native_layer_norm"), lh.higher_order(net):
        loss(net)


def test_torchscript_is_refused_by_name():
    net = nn.Sequential(nn.Linear(2, 2), torch.jit.script(nn.Tanh()))
    with pytest.raises(lh.HigherOrderError, match="'1' is TorchScript"), lh.higher_order(net):
        pass


def test_nothing_stays_changed_after_an_exception():
    before = torch.utils.checkpoint.CheckpointFunction
    flash = torch.backends.cuda.flash_sdp_enabled()
    with pytest.raises(ZeroDivisionError), lh.higher_order():
        1 / 0  # noqa: B018
    assert torch.utils.checkpoint.CheckpointFunction is before
    assert torch.backends.cuda.flash_sdp_enabled() == flash
    assert torch.overrides._get_current_function_mode() is None
