"""What autograd gets wrong or does not have, outside of the zoo of layers: right, or refused by name."""

import functools
from contextlib import nullcontext

import pytest
import torch
from oracles import gradient_of, relative_error
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import lightning_hessian as lh
from lightning_hessian.curvature import HessianOperator, SampleHessians

pytestmark = pytest.mark.usefixtures("float64")


def leaf(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def inputs():
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.arange(5) % 3


def context(loss, *leaves, derivatives=3):
    with lh.higher_order(derivatives=derivatives), lh.watch_losses() as seen:
        value = loss()
    return lh.StepContext(value, dict(zip("abcd", leaves, strict=False)), losses=seen)


def trace(loss, *leaves, derivatives=3, **settings):
    return lh.HessianTrace(**{"probes": -1, **settings})(context(loss, *leaves, derivatives=derivatives))


SPARSE = {
    "coo": lambda i, v: torch.sparse_coo_tensor(i, v, (3, 3)),
    "coo, coalesced": lambda i, v: torch.sparse_coo_tensor(i, v, (3, 3)).coalesce(),
    "csr": lambda i, v: torch.sparse_csr_tensor(torch.arange(4), i[1], v, (3, 3)),
    "coo of computed values": lambda i, v: torch.sparse_coo_tensor(i, v.tanh(), (3, 3)),
}


@pytest.mark.parametrize("kind", SPARSE)
@pytest.mark.parametrize("use", [lambda s, x: s @ x, torch.sparse.mm, lambda s, x: s.to_dense() @ x])
def test_sparse_tensors_of_learned_values_are_refused(kind, use):
    (x, _), v, i = inputs(), leaf(3), torch.tensor([[0, 1, 2], [1, 2, 0]])
    with pytest.raises(lh.HigherOrderError, match="sparse tensor of learned values"):
        trace(lambda: use(SPARSE[kind](i, v), x[:3]).pow(4).sum(), v)


def test_constant_sparse_matrices_are_right():
    """As in graph networks: adjacency times features."""
    (x, _), w = inputs(), leaf(3, 3)
    a = torch.sparse_coo_tensor(torch.tensor([[0, 1, 2], [1, 2, 0]]), torch.ones(3), (3, 3)).coalesce()
    losses = [lambda m=m: ((m @ w).tanh() @ x[:3]).pow(4).sum() for m in (a, a.to_sparse_csr(), a.to_dense())]
    losses.append(lambda: (torch.sparse.mm(a, w).tanh() @ x[:3]).pow(4).sum())
    traces = torch.stack([trace(loss, w) for loss in losses])
    torch.testing.assert_close(traces, traces[2].expand(4))


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyOptions"), reason="torch has no fused linear_cross_entropy")
def test_the_fused_linear_cross_entropy_is_the_plain_one():
    (x, y), w, b = inputs(), leaf(3, 3), leaf(3)
    fused = functools.partial(F.linear_cross_entropy, options=nn.LinearCrossEntropyOptions())
    expected = trace(lambda: F.cross_entropy(F.linear(x, w, b), y, label_smoothing=0.1), w, b)
    found = trace(lambda: fused(x, w, y, linear_bias=b, label_smoothing=0.1), w, b)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient_of(found, [w, b]), gradient_of(expected, [w, b]))
    with pytest.raises(lh.HigherOrderError, match="linear_cross_entropy"):  # a graph from outside of the context
        HessianOperator(fused(x, w, y), [w])


@pytest.mark.parametrize("derivatives", [2, 3])
@pytest.mark.parametrize("how", ["autograd.grad", "vmap of grad", "jvp"])
def test_layer_norm_with_a_derivative_taken_in_the_forward_pass(how, derivatives):
    (x, _), w = inputs(), leaf(3, 4)

    def energy(z):
        return F.layer_norm(z @ w, (4,)).tanh().square().sum()

    def exact(z):
        y = z @ w
        y = (y - y.mean(-1, keepdim=True)) * torch.rsqrt(y.var(-1, unbiased=False, keepdim=True) + 1e-5)
        return y.tanh().square().sum()

    def loss(energy):
        if how == "vmap of grad":
            return torch.func.vmap(torch.func.grad(energy))(x).square().sum()
        if how == "jvp":
            return torch.func.jvp(energy, (x,), (x.cos(),))[1].square()
        z = x.clone().requires_grad_()
        return torch.autograd.grad(energy(z), z, create_graph=True)[0].square().sum()

    v = torch.randn(12, generator=torch.Generator().manual_seed(2))
    expected = HessianOperator(loss(exact), [w]).matvec(v)
    twice = lh.higher_order(derivatives=derivatives)
    with twice:
        task = loss(energy)
    if (how, derivatives) == ("autograd.grad", 2):
        with pytest.raises(lh.HigherOrderError, match="derivatives=3"):
            HessianOperator(task, [w])
        with twice:  # the context has learned of the gradient
            task = loss(energy)
    torch.testing.assert_close(HessianOperator(task, [w]).matvec(v), expected)


def uncertainty(x, y, w, s):
    return (-s).exp() * F.cross_entropy(x @ w, y) + s


FACTORS = {
    "uncertainty weighting": uncertainty,
    "learned sample weights": lambda x, y, w, s: (
        s * x[:, 0].exp() * F.cross_entropy(x @ w, y, reduction="none")
    ).mean(),
    "predicted variance": lambda x, y, w, s: (F.mse_loss(x @ w, x, reduction="none") * (x * s).exp()).mean(),
    "product of losses": lambda x, y, w, s: F.cross_entropy(x @ w, y) * F.mse_loss(x * s, x @ x.T @ x),
    "learned class weights": lambda x, y, w, s: F.cross_entropy(x @ w, x.softmax(1), weight=s.exp().expand(3)),
    "learned targets": lambda x, y, w, s: F.binary_cross_entropy_with_logits(x @ w, (x * s).sigmoid()),
}  # fmt: skip


@pytest.mark.parametrize("kind", FACTORS)
def test_gauss_newton_refuses_learned_factors_weights_and_targets(kind):
    (x, y), w, s = inputs(), leaf(3, 3), torch.tensor(0.3, requires_grad=True)
    with pytest.raises(ValueError, match=r"depends? on parameters"):
        trace(lambda: FACTORS[kind](x, y, w, s), w, s, derivatives=2, method="gauss_newton", probes=3)
    # The way out that the error names, for a factor that is meant to be constant.
    trace(lambda: FACTORS[kind](x, y, w, s.detach()), w, derivatives=2, method="gauss_newton", probes=3)


def test_gauss_newton_outside_of_lightning_says_how_loss_functions_are_seen():
    (x, y), w = inputs(), leaf(3, 3)
    with lh.higher_order():
        loss = F.cross_entropy(x @ w, y)
    with pytest.raises(ValueError, match=r"with watch_losses\(\) as seen.*losses=seen"):
        lh.HessianTrace(method="gauss_newton")(lh.StepContext(loss, {"w": w}))


once = torch.autograd.function.once_differentiable


def cubed(ctx, g):
    (x,) = ctx.saved_tensors
    return 3 * x**2 * g


def without_wraps(function):
    return lambda ctx, g: function(ctx, g)


class Callable:
    def __init__(self, function):
        self.function = function

    def __call__(self, ctx, g):
        return self.function(ctx, g)


marked = once(cubed)


def under_no_grad(ctx, g):
    with torch.no_grad():
        return cubed(ctx, g)


def where_it_matters(ctx, g):
    """Marked, but only where nobody differentiates."""
    return cubed(ctx, g) if torch.is_grad_enabled() else marked(ctx, g)


class Inner(torch.autograd.Function):
    """The backward of another function, and marked."""

    @staticmethod
    def forward(ctx, x, g):
        ctx.save_for_backward(x, g)
        return 3 * x**2 * g

    @staticmethod
    @once
    def backward(ctx, h):
        x, g = ctx.saved_tensors
        return 6 * x * g * h, 3 * x**2 * h


BACKWARDS = {
    "the mark itself": marked,
    "under custom_bwd": torch.amp.custom_bwd(marked, device_type="cpu"),
    "under a wrapper": functools.wraps(marked)(lambda ctx, g: marked(ctx, g)),
    "under a wrapper without wraps": without_wraps(marked),
    "under a partial": functools.partial(marked),
    "in an object": Callable(marked),
    "called by name": lambda ctx, g: marked(ctx, g),
    "under no_grad": under_no_grad,
    "decorated with no_grad": torch.no_grad()(cubed),
    "detached": lambda ctx, g: cubed(ctx, g).detach(),
    "another function's": lambda ctx, g: Inner.apply(ctx.saved_tensors[0], g),
}


def function_with(backward, way="backward"):
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx._fwd_used_autocast, ctx._dtype = False, None
        return x**3

    return type("Cubed", (torch.autograd.Function,), {"forward": staticmethod(forward), way: staticmethod(backward)})


@pytest.mark.parametrize("way", ["backward", "vjp"])
@pytest.mark.parametrize("kind", BACKWARDS)
@pytest.mark.parametrize("head", [lambda y: y.sum(), lambda y: y.square().sum()], ids=["linear", "square"])
def test_the_mark_of_once_differentiable_is_found_wherever_it_is(kind, way, head):
    w, function = leaf(3), function_with(BACKWARDS[kind], way)
    with pytest.raises(lh.HigherOrderError, match="@once_differentiable"):
        trace(lambda: head(function.apply(w)), w).backward()
    # Measuring takes one derivative less, of which Inner has one.
    measured = kind != "another function's"
    loss = head(function.apply(w.tanh()))
    refused = functools.partial(pytest.raises, lh.HigherOrderError, match="@once_differentiable")
    with refused() if measured else nullcontext():
        HessianOperator(loss, [w]).matvec(torch.ones(3))
    with refused() if measured else nullcontext():
        SampleHessians(head(function.apply(w.tanh())), [w]).matvec(torch.ones(3, 1))


@pytest.mark.parametrize("kind", [kind for kind in BACKWARDS if kind != "another function's"])
def test_gauss_newton_finds_the_mark_too(kind):
    w, function = leaf(3), function_with(BACKWARDS[kind])
    with pytest.raises(lh.HigherOrderError, match="@once_differentiable"):
        trace(lambda: F.mse_loss(function.apply(w), torch.ones(3)), w, method="gauss_newton", probes=1).backward()


def test_a_custom_function_with_a_differentiable_backward_is_right():
    w, function = leaf(3), function_with(where_it_matters)
    found, expected = (trace(lambda f=f: f(w).square().sum(), w) for f in (function.apply, lambda w: w**3))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient_of(found, [w]), gradient_of(expected, [w]))


class Vmapped(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    backward = staticmethod(marked)


def test_the_mark_is_found_under_vmap():
    w = leaf(3)
    with pytest.raises(lh.HigherOrderError, match="@once_differentiable"):
        trace(lambda: torch.vmap(Vmapped.apply)(w).square().sum(), w).backward()


def test_layer_norm_in_forward_mode():
    (x, _), w = inputs(), leaf(3, 4)

    def loss():
        with forward_ad.dual_level():
            z = forward_ad.make_dual(x, x.cos())
            return forward_ad.unpack_dual(F.layer_norm(z @ w, (4,)).tanh().square().sum()).tangent.square()

    v = torch.randn(12, generator=torch.Generator().manual_seed(2))
    products = []
    for derivatives in (2, 3):
        with lh.higher_order(derivatives=derivatives):
            task = loss()
        products.append(HessianOperator(task, [w]).matvec(v))
    torch.testing.assert_close(*products)


def test_transposed_convolutions_keep_the_type_of_autocast():
    layer = nn.ConvTranspose1d(3, 3, 2, stride=2, output_padding=1).float()
    x = torch.randn(2, 3, 5).float()
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
        with lh.higher_order():
            found = layer(x)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    with lh.higher_order(), pytest.raises(RuntimeError, match="output padding must be smaller"):
        F.conv_transpose1d(x, layer.weight, stride=2, output_padding=2)


def test_complex_parameters_are_refused_and_the_way_out_is_right():
    c = torch.randn(3, dtype=torch.complex128, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with pytest.raises(ValueError, match=r"'a' is complex.*torch\.view_as_complex"):
        trace(lambda: c.abs().pow(4).sum(), c)
    with pytest.raises(ValueError, match="is complex"):
        HessianOperator(c.abs().pow(4).sum(), [c])
    r = torch.view_as_real(c.detach()).requires_grad_()
    found = trace(lambda: torch.view_as_complex(r).abs().pow(4).sum(), r)
    torch.testing.assert_close(found, 16 * r.square().sum())
    # It may stay out of what is chosen.
    trace(lambda: (c.abs() * r.square().sum(1)).sum(), c, r, parameters="b")


@pytest.mark.parametrize("inplace", [False, True])
def test_silu_of_complex_numbers(inplace):
    a, b = leaf(3), leaf(3, seed=2)

    def loss(silu):
        z = silu(torch.complex(a, b).clone())
        return (z.real * torch.arange(3)).sum() + z.imag.square().sum()

    found = trace(lambda: loss(lambda z: F.silu(z, inplace=inplace)), a, b)
    torch.testing.assert_close(found, trace(lambda: loss(lambda z: z * torch.sigmoid(z)), a, b))


@pytest.mark.parametrize("call", [lambda z: F.hardsigmoid(z, inplace=True), nn.Hardsigmoid(inplace=True)])
def test_hardsigmoid_in_place_changes_its_argument(call):
    w = leaf(4)

    def loss():
        z = w * 1.5
        call(z)
        return z.pow(3).sum()

    expected = trace(lambda: ((w * 1.5 + 3).clamp(0, 6) / 6).pow(3).sum(), w)
    assert context(loss, w).loss.item() == pytest.approx(loss().item())
    torch.testing.assert_close(trace(loss, w), expected)


def control_flow():
    from torch._higher_order_ops import scan, while_loop

    return {
        "cond": lambda w: torch.cond(w.sum() > 0, lambda a: a.sin().sum(), lambda a: a.cos().sum(), (w,)),
        "scan": lambda w: scan(lambda c, z: (c * z, c * z), torch.ones(3), w)[0].pow(2).sum(),
        "while_loop": lambda w: while_loop(lambda i, a: i < 2, lambda i, a: (i + 1, a.sin()), (torch.tensor(0), w))[
            1
        ].sum(),
    }


OLD = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10),
    reason="scan and while_loop have no gradient in this version",
)


@pytest.mark.parametrize("name", ["cond", pytest.param("scan", marks=OLD), pytest.param("while_loop", marks=OLD)])
@pytest.mark.parametrize("inside", [True, False])
def test_control_flow_operators_are_refused_by_name(name, inside):
    w, call = leaf(3, 3), control_flow()[name]
    measure = (lambda: trace(lambda: call(w), w)) if inside else (lambda: HessianOperator(call(w), [w]))
    with pytest.raises(lh.HigherOrderError, match=rf"control-flow operator.*{name}.*Python"):
        measure()


@pytest.mark.parametrize("settings", [{"max_norm": 0.5}, {"scale_grad_by_freq": True}], ids=lambda s: next(iter(s)))
def test_embeddings_whose_gradient_is_not_the_losss_are_refused(settings):
    net, tokens = nn.Sequential(nn.Embedding(5, 3, **settings)), torch.tensor([0, 0, 2])
    with pytest.raises(lh.HigherOrderError, match=rf"'0' has {next(iter(settings))}"), lh.higher_order(net):
        pass
    w = leaf(5, 3)
    with pytest.raises(lh.HigherOrderError, match=next(iter(settings))):
        trace(lambda: F.embedding(tokens, w, **settings).pow(4).sum(), w)
    net[0].weight.requires_grad_(False)  # a constant is looked up as it is
    head = leaf(3)
    trace(lambda: (net(tokens) @ head).pow(4).sum(), head)


TRANSPOSED = {
    1: ({"stride": 2, "padding": 1, "output_padding": 1}, (2, 3, 5)),
    2: ({"stride": (2, 3), "padding": (1, 0), "output_padding": (1, 2), "groups": 3}, (2, 3, 4, 3)),
    3: ({"stride": 2, "padding": 1, "output_padding": 1, "dilation": 2}, (1, 3, 2, 3, 2)),
}


@pytest.mark.parametrize("dimensions", TRANSPOSED)
@pytest.mark.parametrize("bias", [True, False])
def test_transposed_convolutions_with_output_padding(dimensions, bias):
    settings, shape = TRANSPOSED[dimensions]
    layer = getattr(nn, f"ConvTranspose{dimensions}d")(3, 3, 2, bias=bias, **settings)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with lh.higher_order(layer) as inside:
        y = layer(x)
    torch.testing.assert_close(y, layer(x), rtol=1e-12, atol=1e-12)
    assert list(inside.replaced.values()) == [f"conv_transpose{dimensions}d"]
    report = lh.verify(layer, x, lh.HessianTrace(), loss=lambda layer, x: layer(x).tanh().square().mean())
    assert report.ok, str(report)
    with pytest.raises(lh.HigherOrderError, match="output_padding"):  # from outside of the context
        HessianOperator(layer(x).pow(3).sum(), list(layer.parameters()))


def test_norms_by_torchs_names_take_keywords():
    x, ones = leaf(4, 3, 5), torch.ones(3)
    calls = [
        (torch.batch_norm, {"weight": ones, "bias": ones, "running_mean": None, "running_var": None, "training": True,
                            "momentum": 0.1, "eps": 1e-5, "cudnn_enabled": False}),
        (torch.instance_norm, {"weight": ones, "bias": ones, "running_mean": None, "running_var": None,
                               "use_input_stats": True, "momentum": 0.1, "eps": 1e-5, "cudnn_enabled": False}),
        (torch.layer_norm, {"normalized_shape": (5,), "weight": None, "bias": None, "eps": 1e-5}),
        (torch.rms_norm, {"normalized_shape": (5,), "weight": None, "eps": 1e-5}),
    ]  # fmt: skip
    for norm, settings in calls:
        with lh.higher_order():
            torch.testing.assert_close(norm(input=x, **settings), norm(x, **settings))


def test_selective_checkpoints_are_right():
    (x, _), w = inputs(), leaf(3, 3)

    def keep_products(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op == torch.ops.aten.mm.default else CheckpointPolicy.PREFER_RECOMPUTE

    def region(z):
        return (z @ w).tanh() @ w

    contexts = functools.partial(create_selective_checkpoint_contexts, keep_products)
    found = trace(lambda: checkpoint(region, x, use_reentrant=False, context_fn=contexts).pow(4).sum(), w)
    expected = trace(lambda: region(x).pow(4).sum(), w)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient_of(found, [w]), gradient_of(expected, [w]))


def test_vmap_beside_an_unbatched_activation():
    (x, _), w = inputs(), leaf(3, 3)
    for activation in (F.silu, F.softplus):
        found = trace(lambda a=activation: torch.vmap(lambda z: z * a(w).sum())(x).pow(2).sum(), w)
        expected = trace(lambda a=activation: (x * a(w).sum()).pow(2).sum(), w)
        torch.testing.assert_close(found, expected)


def test_torchvisions_operators_without_double_backward_are_named():
    ops = pytest.importorskip("torchvision").ops
    w, box = leaf(1, 1, 3, 3), torch.tensor([[0.0, 0, 0, 2, 2]])
    with pytest.raises(lh.HigherOrderError, match="operator roi_align"):
        trace(lambda: ops.roi_align(w, box, 2).pow(4).sum(), w)
    with pytest.raises(lh.HigherOrderError, match="operator deform_conv2d"):
        trace(lambda: ops.deform_conv2d(w, torch.zeros(1, 18, 3, 3), w, padding=1).pow(4).sum(), w)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors_are_right_or_refused(layout):
    parts = [torch.randn(2, 3), torch.randn(3, 3)]
    nested = torch.nested.nested_tensor(parts, layout=layout)
    layer = nn.Linear(3, 3)
    for call in (lambda z: layer(z), lambda z: F.silu(layer(z)), lambda z: F.layer_norm(layer(z), (3,))):
        expected = trace(lambda call=call: torch.cat([call(part) for part in parts]).pow(4).sum(), layer.weight)
        try:
            found = trace(lambda call=call: torch.nested.to_padded_tensor(call(nested), 0.0).pow(4).sum(), layer.weight)
        except lh.HigherOrderError as error:
            assert "nested" in str(error)  # noqa: PT017
        else:
            assert relative_error(found, expected) < 1e-9


def test_unpooling_into_one_place_twice_is_refused():
    w = leaf(1, 1, 6)
    pool = functools.partial(F.max_pool1d, return_indices=True)
    trace(lambda: F.max_unpool1d(*pool(w, 2), 2).pow(4).sum(), w)
    with pytest.raises(lh.HigherOrderError, match="unpools several maxima into one place"):
        trace(lambda: F.max_unpool1d(*pool(w, 3, 1), 3, 1).pow(4).sum(), w)


def test_probes_are_fresh_outside_of_lightning_and_reproducible_by_a_source():
    w = leaf(40)

    def loss():
        return (w.sum() ** 2 + w.pow(4).sum()) / 2

    penalty = lh.HessianTrace()
    with lh.higher_order():
        fresh = [penalty(lh.StepContext(loss(), {"w": w})).item() for _ in range(8)]
        same = [penalty(lh.StepContext(loss(), {"w": w}, lh.ProbeSource(3))).item() for _ in range(2)]
    assert len(set(fresh)) > 2
    assert same[0] == same[1]
