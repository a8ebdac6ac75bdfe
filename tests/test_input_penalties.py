"""Penalties on the inputs against dense float64 Hessians, sample by sample."""

import dataclasses

import pytest
import torch
from oracles import gradient_by_differences, gradient_of, relative_error
from torch import nn
from torch.nn import functional as F

import lightning_hessian as lh
from lightning_hessian.curvature import lanczos, power_iteration

SAMPLES, FEATURES, CLASSES = 5, 6, 3


def net(seed=1):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(FEATURES, 8), nn.Softplus(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, CLASSES)
    ).double()


@pytest.fixture
def x():
    return torch.randn(SAMPLES, FEATURES, dtype=torch.float64)


@pytest.fixture
def y():
    return torch.arange(SAMPLES) % CLASSES


def context(module, x, y, reduction="mean", loss=F.cross_entropy):
    return lh.StepContext.evaluate(
        lambda x: loss(module(x), y, reduction=reduction), x, dict(module.named_parameters())
    )


def dense_hessians(module, x, y, parameters=None):
    """Each sample's own, by torch.func."""
    parameters = dict(module.named_parameters()) if parameters is None else parameters

    def loss(one, label):
        return F.cross_entropy(torch.func.functional_call(module, parameters, (one,)), label)

    return torch.func.vmap(torch.func.hessian(loss))(x, y)


def dense_norm(module, x, y, parameters=None):
    return torch.linalg.eigvalsh(dense_hessians(module, x, y, parameters)).abs().amax(dim=1)


CONVERGED = {"power": 300, "lanczos": FEATURES}


@pytest.mark.parametrize("search", CONVERGED)
def test_converged_search_gives_the_exact_norm(search, x, y):
    module = net()
    value = lh.InputHessianNorm(CONVERGED[search], search).value(context(module, x, y))
    assert value.item() == pytest.approx(dense_norm(module, x, y).mean().item(), rel=1e-6)


@pytest.mark.parametrize("search", CONVERGED)
def test_gradient_is_that_of_the_dense_norm(search, x, y):
    module = net()
    value = lh.InputHessianNorm(CONVERGED[search], search).value(context(module, x, y))
    expected = gradient_by_differences(lambda: dense_norm(module, x, y).mean(), module)
    assert relative_error(gradient_of(value, module.parameters()), expected) < 1e-5


def test_squared_is_the_mean_of_the_squares(x, y):
    module = net()
    value = lh.InputHessianNorm(FEATURES, "lanczos", squared=True).value(context(module, x, y))
    assert value.item() == pytest.approx(dense_norm(module, x, y).square().mean().item(), rel=1e-6)
    expected = gradient_by_differences(lambda: dense_norm(module, x, y).square().mean(), module)
    assert relative_error(gradient_of(value, module.parameters()), expected) < 1e-5


@pytest.mark.parametrize("find", [power_iteration, lanczos])
def test_search_where_plus_and_minus_the_same_eigenvalue_tie(find):
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(4, 8, 8, generator=generator, dtype=torch.float64)).Q
    values = torch.tensor([3.0, -3.0, 2.0, -1.0, 0.5, 0.1, 0.0, -2.5], dtype=torch.float64)
    matrices = rotation @ torch.diag(values) @ rotation.mT

    def matvec(v):
        return torch.einsum("smn,sn->sm", matrices, v)

    v = find(matvec, torch.randn(4, 8, generator=generator, dtype=torch.float64), 200 if find is power_iteration else 8)
    torch.testing.assert_close(matvec(v).norm(dim=1), torch.full((4,), 3.0, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(v.norm(dim=1), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("search", CONVERGED)
def test_gradient_where_the_eigenvalues_of_a_network_tie(search):
    """f(p, q) = (A p)' (B q) has the Hessian [[0, M], [M', 0]], M = A'B: its eigenvalues are +-singular values of M."""

    class Products(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = (nn.Linear(FEATURES // 2, 4, bias=False).double() for _ in range(2))

        def forward(self, x):
            p, q = x.chunk(2, dim=1)
            return (self.a(p) * self.b(q)).sum(dim=1)

    module, x = Products(), torch.randn(SAMPLES, FEATURES, dtype=torch.float64)
    seen = lh.StepContext.evaluate(lambda x: module(x).mean(), x, dict(module.named_parameters()))
    value = lh.InputHessianNorm(CONVERGED[search], search).value(seen)
    norm = torch.linalg.svdvals(module.a.weight.mT @ module.b.weight)[0]
    assert value.item() == pytest.approx(norm.item(), rel=1e-6)
    assert relative_error(gradient_of(value, module.parameters()), gradient_of(norm, module.parameters())) < 1e-5


def test_lanczos_stops_where_the_krylov_space_ends():
    v = lanczos(lambda v: 2 * v, torch.tensor([[3.0, 4.0]]), 5)
    torch.testing.assert_close(v, torch.tensor([[0.6, 0.8]]))


@pytest.mark.parametrize("find", [power_iteration, lanczos])
def test_search_in_the_null_space_keeps_a_unit_vector(find):
    v = find(lambda v: 0 * v, torch.tensor([[3.0, 4.0]]), 3)
    torch.testing.assert_close(v, torch.tensor([[0.6, 0.8]]))


def test_the_estimate_is_a_lower_bound_and_rises_with_the_iterations(x, y):
    module = net()
    values = [lh.InputHessianNorm(k).value(context(module, x, y)).item() for k in (0, 1, 3, 10)]
    assert values == sorted(values)
    assert values[-1] <= dense_norm(module, x, y).mean().item() * (1 + 1e-12)


def test_finite_differences_tend_to_the_exact_norm_with_its_gradient(x, y):
    module = net()
    settings = {"iterations": 300, "method": "finite_difference", "step": 1e-4}
    value = lh.InputHessianNorm(**settings).value(context(module, x, y))
    assert value.item() == pytest.approx(dense_norm(module, x, y).mean().item(), rel=1e-4)
    exact = lh.InputHessianNorm(300).value(context(module, x, y))
    assert relative_error(gradient_of(value, module.parameters()), gradient_of(exact, module.parameters())) < 1e-4


def test_finite_differences_of_negative_curvature_count_by_their_size(x, y):
    module = net()
    probabilities = torch.full((SAMPLES, CLASSES), 1 / CLASSES, dtype=torch.float64)

    def loss(x):  # saturating, so that some curvatures are negative
        return F.mse_loss(torch.tanh(3 * module(x)), 4 * probabilities)

    of = lh.StepContext.evaluate(loss, x, dict(module.named_parameters()))
    by_autograd = lh.InputHessianNorm(50, "lanczos").value(of).item()
    by_differences = lh.InputHessianNorm(50, "lanczos", "finite_difference", step=1e-3).value(of).item()
    assert by_differences == pytest.approx(by_autograd, rel=1e-3)


def test_a_zero_gradient_starts_at_random(y):
    module = nn.Sequential(nn.Linear(2, 2, bias=False)).double()

    def loss(x):
        return (module(x) ** 2).sum(1).mean()

    of = lh.StepContext.evaluate(loss, torch.zeros(3, 2, dtype=torch.float64), dict(module.named_parameters()))
    w = module[0].weight.detach()
    expected = 2 * torch.linalg.eigvalsh(w.T @ w).max().item()
    assert lh.InputHessianNorm(100).value(of).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("squared", [False, True])
def test_no_curvature_gives_zero_with_a_finite_gradient(squared, x):
    module = nn.Linear(FEATURES, 1).double()
    of = lh.StepContext.evaluate(
        lambda x: module(x).mean() + 0 * (module(x) ** 2).mean(), x, dict(module.named_parameters())
    )
    value = lh.InputHessianNorm(squared=squared).value(of)
    assert value.item() == 0
    assert gradient_of(value, module.parameters()).isfinite().all()


def test_a_loss_linear_in_the_input_has_no_curvature(x):
    module = nn.Linear(FEATURES, 1).double()
    of = lh.StepContext.evaluate(lambda x: module(x).mean(), x, dict(module.named_parameters()))
    assert lh.InputHessianNorm().value(of).item() == 0


def test_input_gradient_norm_is_the_mean_of_each_samples_own(x, y):
    module = net()
    own = [torch.func.grad(lambda one, k=k: F.cross_entropy(module(one), y[k]))(x[k]) for k in range(SAMPLES)]
    value = lh.InputGradientNorm().value(context(module, x, y))
    assert value.item() == pytest.approx(torch.stack(own).square().sum(1).mean().item(), rel=1e-10)

    def dense():
        return lh.InputGradientNorm().value(context(module, x, y))

    assert relative_error(gradient_of(value, module.parameters()), gradient_by_differences(dense, module)) < 1e-7


def test_exact_jacobian_norm(x, y):
    module = net()
    jacobians = torch.stack([torch.func.jacrev(module)(one) for one in x])
    value = lh.JacobianNorm(projections=-1).value(context(module, x, y))
    assert value.item() == pytest.approx(jacobians.square().sum((1, 2)).mean().item(), rel=1e-10)

    def dense():
        return torch.stack([torch.func.jacrev(module)(one) for one in x]).square().sum((1, 2)).mean()

    assert relative_error(gradient_of(value, module.parameters()), gradient_by_differences(dense, module)) < 1e-7


def test_random_projections_are_unbiased(x, y):
    module = net()
    exact = lh.JacobianNorm(projections=-1).value(context(module, x, y)).item()
    of = context(module, x, y)
    draws = []
    for step in range(400):
        source = lh.curvature.ProbeSource(step=step)
        draws.append(lh.JacobianNorm().value(dataclasses.replace(of, probes=source)).item())
    draws = torch.tensor(draws)
    assert abs(draws.mean().item() - exact) < 4 * draws.std().item() / len(draws) ** 0.5


PENALTIES = {
    "hessian": lh.InputHessianNorm(2),
    "finite differences": lh.InputHessianNorm(2, method="finite_difference"),
    "gradient": lh.InputGradientNorm(),
    "jacobian": lh.JacobianNorm(projections=-1),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_the_value_is_the_mean_over_samples_whatever_the_batch_size(name, x, y):
    module, penalty = net(), PENALTIES[name]
    together = penalty.value(context(module, x, y)).item()
    one_by_one = [penalty.value(context(module, x[i : i + 1], y[i : i + 1])).item() for i in range(SAMPLES)]
    assert together == pytest.approx(sum(one_by_one) / SAMPLES, rel=1e-6)


@pytest.mark.parametrize("name", PENALTIES)
def test_reductions_mean_and_sum_give_the_same_value(name, x, y):
    module, penalty = net(), PENALTIES[name]
    values = [penalty.value(context(module, x, y, reduction)).item() for reduction in ("mean", "sum")]
    assert values[0] == pytest.approx(values[1], rel=1e-6)


@pytest.mark.parametrize("name", PENALTIES)
def test_a_step_that_reduces_by_itself_is_understood(name, x, y):
    module, penalty = net(), PENALTIES[name]
    parameters = dict(module.named_parameters())
    expected = penalty.value(context(module, x, y)).item()
    for reduce in (torch.mean, torch.sum):
        of = lh.StepContext.evaluate(
            lambda x, reduce=reduce: reduce(F.cross_entropy(module(x), y, reduction="none")), x, parameters
        )
        assert penalty.value(of).item() == pytest.approx(expected, rel=1e-6)


LOSSES = {
    "cross entropy": lambda z, y: F.cross_entropy(z, y),
    "cross entropy, weighted": lambda z, y: F.cross_entropy(z, y, weight=torch.tensor([1.0, 2.0, 3.0]).double()),
    "cross entropy, some ignored": lambda z, y: F.cross_entropy(z, torch.where(y == 0, -100, y)),
    "cross entropy, smoothed": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1),
    "cross entropy, module": lambda z, y: nn.CrossEntropyLoss()(z, y),
    "binary": lambda z, y: F.binary_cross_entropy_with_logits(z, F.one_hot(y, CLASSES).double()),
    "mse": lambda z, y: F.mse_loss(z, F.one_hot(y, CLASSES).double()),
    "nll": lambda z, y: F.nll_loss(F.log_softmax(z, 1), y),
    "two losses": lambda z, y: 0.3 * F.cross_entropy(z, y) + 0.7 * F.cross_entropy(z, (y + 1) % CLASSES),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_losses_of_the_samples_are_seen(name, x, y):
    module = net()
    of = lh.StepContext.evaluate(lambda x: LOSSES[name](module(x), y), x, dict(module.named_parameters()))
    torch.testing.assert_close(of.sample_losses.mean(), of.loss)
    parts = torch.autograd.grad(of.sample_losses.mean(), list(module.parameters()), retain_graph=True)
    torch.testing.assert_close(
        list(parts), list(torch.autograd.grad(of.loss, list(module.parameters()), retain_graph=True))
    )
    # By differences it is the same Hessian as by autograd.
    values = [
        lh.InputHessianNorm(6, "lanczos", method, step=1e-3).value(of).item()
        for method in ("autograd", "finite_difference")
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-3)


def test_several_inputs_are_one_long_vector(x, y):
    module = net()
    left, right = x[:, :2].contiguous(), x[:, 2:].contiguous()
    of = lh.StepContext.evaluate(
        lambda a, b: F.cross_entropy(module(torch.cat([a, b], 1)), y), [left, right], dict(module.named_parameters())
    )
    for penalty in PENALTIES.values():
        assert penalty.value(of).item() == pytest.approx(penalty.value(context(module, x, y)).item(), rel=1e-6)


def test_inputs_with_different_numbers_of_samples_are_refused(x):
    module = net()
    of = lh.StepContext.evaluate(
        lambda a, b: (module(a).sum() + b.sum()) / 5, [x, x[:2]], dict(module.named_parameters())
    )
    with pytest.raises(ValueError, match=r"shapes \(5, 6\), \(2, 6\): their first dimension"):
        lh.InputHessianNorm().value(of)


def test_no_loss_function_seen():
    module = net()
    of = lh.StepContext.evaluate(
        lambda x: module(x).square().mean(), torch.ones(2, FEATURES).double(), dict(module.named_parameters())
    )
    with pytest.raises(ValueError, match=r'Return \{"loss": \.\.\., "logits": \.\.\.\}'):
        lh.JacobianNorm().value(of)
    with pytest.raises(ValueError, match="use method='autograd'"):
        lh.InputHessianNorm(method="finite_difference").value(of)


@pytest.mark.parametrize("name", PENALTIES)
def test_a_loss_that_does_not_depend_on_the_inputs_is_an_error(name, x, y):
    module = net()
    of = lh.StepContext.evaluate(
        lambda x: F.cross_entropy(module(x.detach()), y) + 0 * x.detach().sum(), x, dict(module.named_parameters())
    )
    with pytest.raises(ValueError, match="do not depend on the inputs"):
        PENALTIES[name].value(of)


@pytest.mark.parametrize(
    ("loss", "factor"),
    [
        (lambda z, y: F.cross_entropy(z, y, reduction="sum") / SAMPLES, 1),
        (lambda z, y: 10 * F.cross_entropy(z, y, reduction="none").mean(), 10),
        (lambda z, y: 0.7 * F.cross_entropy(z, y, reduction="none").mean(), 0.7),
        (lambda z, y: F.cross_entropy(z, y, reduction="none").sum() / SAMPLES, 1),
        (
            lambda z, y: F.cross_entropy(z, y, reduction="sum") + F.cross_entropy(z, y, reduction="none").sum(),
            2,
        ),
        (lambda z, y: F.cross_entropy(z, y, size_average=False), 1),
        (lambda z, y: F.cross_entropy(z, y).mul_(3).add_(2), 3),
    ],
)
@pytest.mark.parametrize("method", ["autograd", "finite_difference"])
def test_factors_of_the_loss_are_understood(loss, factor, method, x, y):
    module, penalty = net(), lh.InputHessianNorm(6, "lanczos", method, step=1e-3)
    expected = penalty.value(context(module, x, y)).item()
    of = lh.StepContext.evaluate(lambda x: loss(module(x), y), x, dict(module.named_parameters()))
    assert penalty.value(of).item() == pytest.approx(factor * expected, rel=1e-5)


def test_a_sum_over_the_targets_that_count_is_a_mean_whatever_the_batch(x):
    """The usual loss of language models: the sum over all tokens that are no padding, divided by their number."""
    module, y, penalty = net(), torch.tensor([0, 1, 2, -100, 0]), lh.InputGradientNorm()

    def value(copies, loss):
        return penalty.value(
            lh.StepContext.evaluate(
                lambda x: loss(module(x), y.repeat(copies)), x.repeat(copies, 1), dict(module.named_parameters())
            )
        ).item()

    def divided(z, y):
        return F.cross_entropy(z, y, reduction="sum") / (y >= 0).sum()

    def masked(z, y):
        return (F.cross_entropy(z, y, reduction="none") * (y >= 0)).sum() / (y >= 0).sum()

    for copies in (1, 4):
        for loss in (divided, masked):
            assert value(copies, loss) == pytest.approx(value(1, F.cross_entropy), rel=1e-9)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_sum_with_a_factor_of_its_own_is_refused(reduction, x, y):
    module = net()
    of = lh.StepContext.evaluate(
        lambda x: 0.01 * F.cross_entropy(module(x), y, reduction=reduction).sum(), x, dict(module.named_parameters())
    )
    with pytest.raises(ValueError, match=r"a mean cannot be told from a sum.*reduction='mean'"):
        lh.InputGradientNorm().value(of)


def focal(z, y):
    losses = F.cross_entropy(z, y, reduction="none")
    return ((1 - torch.exp(-losses)) ** 2 * losses).mean()


@pytest.mark.parametrize("loss", [focal, lambda z, y: F.cross_entropy(z, y) + z.square().mean()])
def test_finite_differences_refuse_a_loss_that_is_not_all_seen(loss, x, y):
    module = net()
    of = lh.StepContext.evaluate(lambda x: loss(module(x), y), x, dict(module.named_parameters()))
    with pytest.raises(ValueError, match="other terms depend on the inputs, or a factor does"):
        lh.InputHessianNorm(method="finite_difference").value(of)


def test_finite_differences_know_the_gradient_of_a_factor(x, y):
    module = net()
    module.scale = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def loss(x):
        return torch.exp(-module.scale) * F.cross_entropy(module(x), y) + module.scale

    found = [
        gradient_of(
            penalty.value(lh.StepContext.evaluate(loss, x, dict(module.named_parameters()))), module.parameters()
        )
        for penalty in (lh.InputHessianNorm(200), lh.InputHessianNorm(200, method="finite_difference", step=1e-4))
    ]
    assert relative_error(*found) < 1e-4


@pytest.mark.parametrize("first", [True, False])
def test_outputs_of_some_samples_only_are_refused(first, x, y):
    module, x, y = net(), torch.cat([x, x[:1]]), torch.cat([y, y[:1]])
    chosen = torch.arange(6) % 2 == int(first)
    of = lh.StepContext.evaluate(
        lambda x: F.cross_entropy(module(x)[chosen], y[chosen]), x, dict(module.named_parameters())
    )
    for penalty in (lh.JacobianNorm(), lh.InputHessianNorm(method="finite_difference")):
        with pytest.raises(ValueError, match="its rows cannot be told apart by sample"):
            penalty.value(of)


def test_the_outputs_of_an_autoencoder_are_what_has_parameters(x):
    module = nn.Linear(FEATURES, FEATURES).double()
    norms = [
        lh.JacobianNorm(-1).value(lh.StepContext.evaluate(loss, x, dict(module.named_parameters()))).item()
        for loss in (lambda x: F.mse_loss(module(x), x), lambda x: F.mse_loss(x, module(x)))
    ]
    assert norms == pytest.approx([module.weight.square().sum().item()] * 2)


def test_a_sample_that_is_not_a_number_makes_the_value_so():
    module, x = nn.Linear(3, 2).double(), torch.tensor([[1.0, 2, 3], [0, 0, 0]], dtype=torch.float64)
    y = torch.tensor([0, 1])
    of = lh.StepContext.evaluate(
        lambda x: F.cross_entropy(module(x) * x.norm(dim=1, keepdim=True), y), x, dict(module.named_parameters())
    )
    assert lh.InputHessianNorm().value(of).isnan()


def test_a_loss_for_the_logs_alone_does_not_count(x, y):
    module = net()

    def loss(x):
        logits = module(x)
        F.cross_entropy(3 * logits, y, reduction="sum")
        return F.cross_entropy(logits, y)

    of = lh.StepContext.evaluate(loss, x, dict(module.named_parameters()))
    for penalty in PENALTIES.values():
        assert penalty.value(of).item() == pytest.approx(penalty.value(context(module, x, y)).item(), rel=1e-6)


def test_rows_of_tokens_belong_to_their_samples_and_mixed_rows_are_refused(x, y):
    module = net()
    tokens, labels = x.repeat(1, 2).view(SAMPLES, 2, FEATURES), y.repeat_interleave(2)
    parameters = dict(module.named_parameters())
    flat = lh.StepContext.evaluate(lambda t: F.cross_entropy(module(t).flatten(0, 1), labels), tokens, parameters)
    for method in ("autograd", "finite_difference"):
        value = lh.InputHessianNorm(12, "lanczos", method, step=1e-3).value(flat).item()
        expected = dense_norm(module, x, y).mean().item() / 2  # the mean of two tokens' losses, each in its own entries
        assert value == pytest.approx(expected, rel=1e-4)
    mixed = lh.StepContext.evaluate(
        lambda x: F.cross_entropy(torch.cat([module(x), module(2 * x)]), torch.cat([y, y])), x, parameters
    )
    for penalty in (lh.JacobianNorm(), lh.InputHessianNorm(method="finite_difference")):
        with pytest.raises(ValueError, match="cannot be told apart by sample"):
            penalty.value(mixed)


def test_dropout_is_the_same_at_shifted_inputs(x, y):
    module = nn.Sequential(net(), nn.Dropout(0.5))
    state = torch.get_rng_state()
    values = []
    for method in ("autograd", "finite_difference"):
        torch.set_rng_state(state)
        values.append(lh.InputHessianNorm(6, "lanczos", method, step=1e-3).value(context(module, x, y)).item())
    assert values[0] == pytest.approx(values[1], rel=1e-4)


@pytest.mark.parametrize("name", PENALTIES)
def test_batch_statistics_are_refused_outside_of_lightning(name, x, y):
    module = nn.Sequential(nn.Linear(FEATURES, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, CLASSES)).double()
    with pytest.raises(ValueError, match="couples the samples"):
        PENALTIES[name].value(context(module, x, y))
    assert PENALTIES[name].value(context(module.eval(), x, y)).item() > 0


def test_no_inputs_in_the_context():
    w = torch.ones(1, requires_grad=True)
    for penalty in PENALTIES.values():
        with pytest.raises(ValueError, match=r"StepContext\.evaluate"):
            penalty.value(lh.StepContext((w**2).sum(), {"w": w}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"iterations": -1}, "iterations=-1"),
        ({"iterations": 1.5}, "iterations=1.5"),
        ({"search": "newton"}, "Choose one of power, lanczos"),
        ({"method": "fd"}, "Choose one of autograd, finite_difference"),
        ({"step": 0}, "step=0"),
        ({"inputs": "x", "layer": "net"}, "keep one"),
    ],
)
def test_bad_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        lh.InputHessianNorm(**settings)


def test_bad_projections():
    with pytest.raises(ValueError, match="projections=0"):
        lh.JacobianNorm(projections=0)
