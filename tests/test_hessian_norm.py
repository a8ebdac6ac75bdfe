"""HessianNorm: the largest absolute eigenvalue of the weight Hessian, followed from step to step."""

import copy
import itertools

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from nets import CPU, Classifier, Mixed, context_of, data, fit, smooth, task_loss, weights
from oracles import dense_hessian, flat, gradient_by_differences, gradient_of, relative_error
from recorders import LiveTensors, Recorder, SaveAt, added_gradient
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lightning_hessian as lh

METHODS = ("taylor", "autograd", "central_difference")
STRENGTH = 0.02


def callback(method="autograd", strength=STRENGTH, **settings):
    return lh.HessianRegularizer(lh.HessianNorm(method=method, **settings), strength=strength)


def batch():
    return next(iter(data()))


def context(module):
    return context_of(module, task_loss, batch())


class Written(nn.LayerNorm):
    """In primitives: torch.func's second derivative of the fused one is wrong (its Hessian is not even symmetric)."""

    def forward(self, x):
        centered = x - x.mean(-1, keepdim=True)
        return self.weight * centered / (centered.square().mean(-1, keepdim=True) + self.eps).sqrt() + self.bias


def dense(module, names=None):
    (x, y), net = batch(), copy.deepcopy(module.net)
    net[1].__class__ = Written
    return dense_hessian(net, lambda call: F.cross_entropy(call(x), y), names)


def dense_norm(module, names=None):
    return torch.linalg.matrix_norm(dense(module, names), 2).item()


def vector(penalty):
    return flat(penalty.state_dict()["v"].values())


def converged(module, **settings):
    """A penalty whose v is the top eigenvector of the module's loss on the batch."""
    penalty = lh.HessianNorm(iterations=300, **settings)
    penalty(context(module))
    penalty.iterations = 1
    return penalty


def test_the_value_is_the_largest_absolute_eigenvalue():
    module = smooth()
    assert converged(module)(context(module)).item() == pytest.approx(dense_norm(module), rel=1e-8)


def test_one_product_a_step_converges():
    module, penalty = smooth(), lh.HessianNorm()
    values = [penalty(context(module)).item() for _ in range(300)]
    assert values[-1] == pytest.approx(dense_norm(module), rel=1e-6)
    assert all(later >= earlier * (1 - 1e-12) for earlier, later in itertools.pairwise(values))


@pytest.mark.parametrize("curvatures", [[1.0, -3.0, 2.0], [2.0, -2.0, 1.0]], ids=["negative", "tie of both signs"])
def test_eigenvalues_below_zero(curvatures):
    w = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64, requires_grad=True)
    curvatures = torch.tensor(curvatures, dtype=torch.float64)
    penalty = lh.HessianNorm(iterations=100, parameters="w")
    value = penalty(lh.StepContext((scale * curvatures * w**2).sum() / 2, {"w": w, "scale": scale}))
    assert value.item() == pytest.approx(curvatures.abs().max().item())
    # The norm grows with |curvature| along the top eigenvectors: d||Hv|| = u'dH v.
    (gradient,) = torch.autograd.grad(value, scale)
    assert gradient.sum().item() == pytest.approx(curvatures.abs().max().item())


def test_the_gradient_is_that_of_the_dense_norm():
    module = smooth()
    penalty = converged(module)
    found = gradient_of(penalty(context(module)), module.parameters())
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        direction = torch.randn(found.shape, generator=generator, dtype=found.dtype)
        (expected,) = gradient_by_differences(lambda: dense_norm(module), module, [direction]).tolist()
        assert (found @ direction).item() == pytest.approx(expected, rel=1e-5)


def after_one_step(method):
    """From a state near the top: the gradient that the penalty adds, the value logged, and the next v."""
    regularizer, row = callback(method), Recorder()
    start = converged(smooth()).state_dict()
    generator = torch.Generator().manual_seed(0)
    v = flat(start["v"].values())
    v = v + 0.01 * torch.randn(v.shape, generator=generator, dtype=v.dtype)
    parts = (v / v.norm()).split([part.numel() for part in start["v"].values()])
    start["v"] = {name: part.view_as(old) for part, (name, old) in zip(parts, start["v"].items(), strict=True)}

    class Begin(L.Callback):
        def on_train_start(self, *_):
            regularizer.penalty.load_state_dict(start)

    gradient = added_gradient(regularizer, Begin(), row) / STRENGTH
    return gradient, row.rows[0]["curvature/hessian_norm"], vector(regularizer.penalty), v / v.norm()


def test_central_differences_have_autograds_next_v_and_nearly_its_gradient():
    exact, norm, u, v = after_one_step("autograd")
    found, form, u_found, _ = after_one_step("central_difference")
    assert relative_error(u_found, u) < 1e-6
    # v'Hv and ||Hv|| differ by second order away from convergence, their gradients by first order.
    hessian = dense(smooth())
    assert norm == pytest.approx((hessian @ v).norm().item(), rel=1e-6)
    assert form == pytest.approx(abs(v @ hessian @ v).item(), rel=1e-6)
    assert relative_error(found, exact) < 0.1


def test_taylor_mode_has_the_exact_gradient_of_its_form_and_autograds_next_v():
    _, _, u, _ = after_one_step("autograd")
    found, form, u_found, v = after_one_step("taylor")
    assert relative_error(u_found, u) < 1e-12
    hessian, module = dense(smooth()), smooth()
    assert form == pytest.approx(abs(v @ hessian @ v).item(), rel=1e-12)
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(found.shape, generator=generator, dtype=found.dtype)
    (expected,) = gradient_by_differences(lambda: abs(v @ dense(module) @ v).item(), module, [direction]).tolist()
    assert (found @ direction).item() == pytest.approx(expected, rel=1e-6)


def test_the_gradient_of_central_differences_is_autograds_at_convergence():
    """The first step of a run searches long enough."""

    def gradient(method):
        return added_gradient(callback(method, iterations=60)) / STRENGTH

    assert relative_error(gradient("central_difference"), gradient("autograd")) < 1e-4


class Counts(Classifier):
    """Counts the runs of the step, and may fail in one of them or lose its loss."""

    def __init__(self, fails_at=None, **settings):
        super().__init__(middle=nn.LayerNorm(6), **settings)
        self.fails_at = fails_at
        self.calls = 0

    def training_step(self, batch, batch_idx):
        self.calls += 1
        if self.calls == self.fails_at:
            raise KeyError("the step failed")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("method", "iterations", "first", "later"),
    [("autograd", 1, 1, 1), ("autograd", 3, 1, 1), ("central_difference", 1, 14, 3), ("central_difference", 2, 16, 5)],
)
def test_runs_of_the_step(method, iterations, first, later):
    module, recorder = Counts(), Recorder()
    fit(module, [callback(method, iterations=iterations), recorder], max_steps=3)
    assert module.calls == first + 2 * later
    assert len(recorder.rows) == 3


@pytest.mark.parametrize("iterations", [1, 3])
def test_products_of_a_step(iterations, monkeypatch):
    products = []
    matvec = lh.curvature.HessianOperator.matvec

    def counted(self, v, create_graph=False):
        products.append(create_graph)
        return matvec(self, v, create_graph)

    monkeypatch.setattr(lh.curvature.HessianOperator, "matvec", counted)
    module, penalty = smooth(), lh.HessianNorm(iterations)
    for before in (5, 0):  # a search of five more at first
        products.clear()
        penalty(context(module))
        assert products == [False] * (before + iterations - 1) + [True]


@pytest.mark.parametrize("method", METHODS)
def test_at_rest_the_value_converges_and_nothing_drifts_or_piles_up(method):
    module = smooth(lr=0.0)
    before, recorder, alive = weights(module), Recorder(), LiveTensors((100, 300), collect=True)
    loader = DataLoader([batch()] * 300, batch_size=None)
    fit(module, [callback(method), recorder, alive], loader, max_steps=300)
    assert torch.equal(weights(module), before)
    assert recorder.rows[-1]["curvature/hessian_norm"] == pytest.approx(dense_norm(module), rel=1e-5)
    assert alive.counts[1] <= alive.counts[0] + 2


@pytest.mark.parametrize("method", METHODS)
def test_it_brings_the_norm_down(method):
    def norm_after(strength):
        torch.manual_seed(0)
        module = smooth()
        fit(module, [callback(method, strength)], DataLoader([batch()] * 30, batch_size=None))
        return dense_norm(module)

    assert norm_after(0.1) < 0.8 * norm_after(0.0)


def mixed(regularizer):
    return Mixed(regularizer, middle=nn.LayerNorm(6), dtype=torch.float32)


def by_callback(regularizers):
    return smooth(dtype=torch.float32), regularizers


def by_mixin(regularizers):
    return mixed(list(regularizers)), []


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("given", [by_callback, by_mixin])
def test_resumed_equals_uninterrupted_to_the_bit(tmp_path, given, method):
    # Two callbacks with state on one Trainer, and one without.
    def regularizers():
        return [
            callback(method),
            lh.HessianRegularizer(lh.HessianTrace(), 1e-3),
            callback(method, parameters="net.0.*"),
        ]

    loader = DataLoader([next(iter(data(dtype=torch.float32)))] * 6, batch_size=None)
    path = tmp_path / "at-two.ckpt"
    (whole, callbacks), (second, again) = given(regularizers()), given(regularizers())
    fit(whole, [*callbacks, SaveAt(path)], loader)
    assert set(torch.load(path)["lightning_hessian"]) == {"hessian_norm", "hessian_norm_2"}
    fit(second, again, loader, ckpt_path=path)
    assert torch.equal(weights(whole), weights(second))


def test_checkpoints_without_state_have_no_entry(tmp_path):
    fit(smooth(), [lh.HessianRegularizer(lh.HessianTrace()), SaveAt(tmp_path / "c.ckpt")])
    assert "lightning_hessian" not in torch.load(tmp_path / "c.ckpt")


@pytest.mark.parametrize("given", [by_callback, by_mixin])
def test_a_fresh_fit_starts_anew(given):
    regularizer = callback()
    both = []
    for _ in range(2):
        module, callbacks = given([regularizer])
        fit(module, callbacks, data(dtype=torch.float32))
        both.append(weights(module))
    assert torch.equal(*both)


def test_a_checkpoint_that_no_fit_resumes_from_leaves_the_penalty_alone(tmp_path):
    path, loader = tmp_path / "c.ckpt", data(dtype=torch.float32)
    regularizer = callback()
    module = mixed(callback())
    fit(module, [SaveAt(path)], loader)
    second = mixed(callback())
    second.on_load_checkpoint(torch.load(path))  # as `load_from_checkpoint` does
    L.Trainer(**CPU, callbacks=[regularizer]).test(second, loader, ckpt_path=path)
    assert second.regularizer.penalty.state_dict() == regularizer.penalty.state_dict() == {}


def test_another_choice_of_parameters_is_searched_for_anew_with_a_warning():
    module, penalty = smooth(), converged(smooth())
    penalty.parameters, penalty.iterations = "net.0.*", 100
    with pytest.warns(UserWarning, match=r"belongs to other parameters.*'net\.1\.bias'.*anew"):
        value = penalty(context(module))
    assert value.item() == pytest.approx(dense_norm(module, ["0.weight", "0.bias"]), rel=1e-6)


def test_frozen_parameters_do_not_count():
    module = smooth()
    module.net[3].requires_grad_(False)
    expected = dense_norm(module, [name for name, p in module.net.named_parameters() if p.requires_grad])
    assert converged(module)(context(module)).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_linear_loss_has_norm_0(method):
    class Linear(Classifier):
        def training_step(self, batch, batch_idx):
            return self.net[0](batch[0]).mean()

    ours, plain, recorder, regularizer = Linear(), Linear(), Recorder(), callback(method)
    fit(ours, [regularizer, recorder], max_steps=2)
    fit(plain, max_steps=2)
    torch.testing.assert_close(weights(ours), weights(plain), rtol=1e-6, atol=1e-6)
    assert recorder.rows[0]["curvature/hessian_norm"] == pytest.approx(0, abs=1e-9)


def test_a_zero_product_keeps_v_and_has_a_zero_gradient():
    w = torch.ones(2, requires_grad=True)
    penalty = lh.HessianNorm()
    penalty(lh.StepContext((w**4).sum(), {"w": w}))
    before = vector(penalty)
    with torch.no_grad():
        w.zero_()
    value = penalty(lh.StepContext((w**4).sum(), {"w": w}))
    assert value.item() == 0
    assert torch.equal(torch.autograd.grad(value, w)[0], torch.zeros(2))
    assert torch.equal(vector(penalty), before)


@pytest.mark.parametrize("method", METHODS)
def test_where_the_loss_is_not_finite_v_stays_and_the_step_is_skipped(method):
    class Overflows(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * (float("inf") if batch_idx == 1 else 1.0)

    kept = []

    class Keep(L.Callback):
        def on_train_batch_end(self, *_):
            kept.append(vector(regularizer.penalty))

    regularizer = callback(method)
    fit(Overflows(middle=nn.LayerNorm(6), lr=0.0), [regularizer, Keep()], max_steps=2)
    assert torch.equal(kept[0], kept[1])
    assert regularizer.nonfinite_steps == 1


def test_after_layers_are_unfrozen_the_search_starts_anew_in_every_method():
    class Unfreezes(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            module.net[0].requires_grad_(trainer.global_step >= 2)

    def logged(method):
        recorder = Recorder()
        with pytest.warns(UserWarning, match="belongs to other parameters"):
            fit(smooth(lr=0.0), [Unfreezes(), callback(method), recorder], max_steps=4)
        return [row["curvature/hessian_norm"] for row in recorder.rows]

    # The first step of each search goes by autograd.
    found, reference = logged("taylor"), logged("autograd")
    assert found[2] == pytest.approx(reference[2], rel=1e-9)
    assert found[3] <= reference[3] * (1 + 1e-9)


def test_where_the_step_takes_its_gradient_by_itself_v_moves_all_the_same():
    class ByGrad(Mixed):
        def __init__(self, regularizer):
            super().__init__(regularizer, middle=nn.LayerNorm(6))
            self.automatic_optimization = False
            self.seen = []

        def training_step(self, batch, batch_idx):
            parameters = list(self.parameters())
            loss = self.regularized(lambda: task_loss(self, batch))
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.grad = gradient
            self.optimizers().step()
            self.seen.append(vector(self.regularizer.penalty))

    module = ByGrad(callback("taylor"))
    fit(module, max_steps=4)
    # Every second step goes by autograd.
    assert all(abs(a @ b) < 1 - 1e-6 for a, b in zip(module.seen, module.seen[2:], strict=False))


@pytest.mark.parametrize(("method", "call"), [("autograd", 3), ("central_difference", 19), ("central_difference", 18)])
def test_a_failing_step_leaves_v_as_it_was(method, call):
    kept, regularizer = [], callback(method)

    class Keep(L.Callback):
        def on_train_batch_end(self, *_):
            kept.append(vector(regularizer.penalty))

    class Fails(lh.HessianTrace):  # after the norm
        def value(self, context):
            if context.probes.step == 2:
                raise KeyError("the step failed")
            return super().value(context)

    fails_at = call if method == "central_difference" else None
    after = [] if fails_at else [lh.HessianRegularizer(Fails(), 1e-3)]
    with pytest.raises(KeyError, match="the step failed"):
        fit(Counts(fails_at), [regularizer, *after, Keep()])
    assert len(kept) == 2
    assert torch.equal(vector(regularizer.penalty), kept[-1])


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_that_the_step_skips_leaves_v_as_it_was(method):
    class SkipsTheFirst(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss if batch_idx else None

    regularizer, kept = callback(method), []

    class Keep(L.Callback):
        def on_train_batch_end(self, *_):
            kept.append(regularizer.penalty.state_dict())

    fit(SkipsTheFirst(middle=nn.LayerNorm(6)), [regularizer, Keep()], max_steps=2)
    assert kept[0] == {}
    assert kept[1]["v"]


def test_verify_holds_u_and_v_and_keeps_the_state():
    module, penalty = smooth(), lh.HessianNorm()
    report = lh.verify(module, batch(), penalty, loss=task_loss)
    assert report.ok
    assert report.penalty_gradient_error < 1e-6
    assert penalty.state_dict() == {}
    with pytest.raises(ValueError, match=r"Verify HessianNorm\(\)"):
        lh.verify(module, batch(), lh.HessianNorm(method="central_difference"))


def test_bfloat16():
    recorder, full = Recorder(), Recorder()
    for precision, rows in (("bf16-mixed", recorder), ("32-true", full)):
        fit(
            smooth(dtype=torch.float32), [callback(), rows], data(dtype=torch.float32), max_steps=3, precision=precision
        )
    for a, b in zip(recorder.rows, full.rows, strict=True):
        assert a["curvature/hessian_norm"] == pytest.approx(b["curvature/hessian_norm"], rel=0.1)
    with pytest.raises(MisconfigurationException, match="train on noise"):
        fit(smooth(), [callback("central_difference")], precision="bf16-mixed")


def test_a_loss_that_is_computed_already_has_no_differences():
    with pytest.raises(ValueError, match="runs the step at other parameters"):
        lh.HessianNorm(method="central_difference")(context(smooth()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"iterations": 0}, "iterations=0 must be a whole number of at least 1"),
        ({"method": "two_pass"}, "is unknown. Choose one of taylor, autograd, central_difference"),
        ({"step": 0.1}, "is only for method='central_difference'"),
        ({"method": "central_difference", "step": -1.0}, "must be a positive number"),
    ],
)
def test_bad_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        lh.HessianNorm(**settings)


def test_parameters_that_match_nothing_are_refused():
    with pytest.raises(MisconfigurationException, match=r"Near names"):
        fit(smooth(), [callback(parameters="net.O.*")])
