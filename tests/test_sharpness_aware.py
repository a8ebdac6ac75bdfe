"""Sharpness-aware steps against the formulas of the papers (SAM: 2010.01412, ASAM: 2102.11600)."""

import functools

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from nets import Classifier, Manual, data, fit, plain_loop, smooth, task_loss, weights
from oracles import relative_error, sharp_loss
from ranks import fit_two, joined
from recorders import Recorder
from torch import nn

import lightning_hessian as lh

SETTINGS = [
    {},
    {"rho": 0.5, "adaptive": True},
    {"rho": 0.1, "parameters": "*.weight"},
]


def callback(strength=None, **settings):
    return lh.HessianRegularizer(lh.SharpnessAware(**settings), strength)


@pytest.mark.parametrize("strength", [None, 0.3])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_training_is_that_of_the_paper(settings, strength):
    module, seen = smooth(), Recorder()
    fit(module, [callback(strength, **settings), seen], data(8))

    def loss_of(module, x, y, step):
        return sharp_loss(module, (x, y), **settings, strength=1.0 if strength is None else strength)

    torch.testing.assert_close(weights(module), plain_loop(smooth(), loss_of, data(8)), rtol=1e-9, atol=1e-11)
    batch, fresh = next(iter(data(8))), smooth()
    sharpness = (sharp_loss(fresh, batch, **settings) - task_loss(fresh, batch)).item()
    assert seen.rows[0]["curvature/sharpness"] == pytest.approx(sharpness, rel=1e-6)
    assert seen.rows[0]["train/penalty"] == pytest.approx((strength or 1) * sharpness, rel=1e-6)
    assert seen.rows[0]["train/loss"] == pytest.approx(task_loss(fresh, batch).item(), rel=1e-6)


def test_the_second_pass_leaves_no_trace():
    """Batch norm's statistics and the stream of dropout masks are those of plain steps."""
    masks = []

    def module():
        net = Classifier(middle=nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5)), lr=0.0)
        net.net[1][1].register_forward_hook(lambda layer, args, output: masks.append(output == 0))
        return net

    plain, ours = module(), module()
    torch.manual_seed(0)
    fit(plain, max_steps=3)
    once = masks[:]
    masks.clear()
    torch.manual_seed(0)
    fit(ours, [callback()], max_steps=3)
    assert torch.equal(weights(plain), weights(ours))
    assert all(torch.equal(mask, once[-1]) for mask in masks[-2:])


def test_each_micro_batch_ascends_by_itself():
    module = smooth()
    fit(module, [callback()], data(8), accumulate_grad_batches=2)
    batches = list(data(8))

    def loss_of(module, x, y, step):
        return sum(sharp_loss(module, part) for part in zip(x.chunk(2), y.chunk(2), strict=True)) / 2

    pairs = [tuple(map(torch.cat, zip(a, b, strict=True))) for a, b in zip(batches[::2], batches[1::2], strict=True)]
    torch.testing.assert_close(weights(module), plain_loop(smooth(), loss_of, pairs), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("ascent", ["rank", "global"])
def test_two_ranks_ascend_each_by_itself_or_together(tmp_path, ascent):
    loader = data(8)
    first, second = fit_two(tmp_path, smooth(), callback(ascent=ascent), loader)

    def loss_of(module, x, y, step):
        together = (x, y) if ascent == "global" else None
        parts = zip(x.chunk(2), y.chunk(2), strict=True)
        return sum(sharp_loss(module, part, gradients_from=together) for part in parts) / 2

    assert torch.equal(first["weights"], second["weights"])
    torch.testing.assert_close(first["weights"], plain_loop(smooth(), loss_of, joined(loader)), rtol=1e-6, atol=1e-6)
    assert first["logged"][0]["curvature/sharpness"] == second["logged"][0]["curvature/sharpness"]


def test_beside_another_penalty_each_sees_the_task_loss_alone():
    module = smooth()
    penalties = [lh.SharpnessAware(), lh.HessianTrace(probes=-1)]
    fit(module, [lh.HessianRegularizer(penalties, [1.0, 0.01])], data(8))

    def loss_of(module, x, y, step):
        loss = functools.partial(task_loss, batch=(x, y))
        with lh.higher_order(module):
            context = lh.StepContext(loss(module), dict(module.named_parameters()), lh.ProbeSource())
        return sharp_loss(module, (x, y)) + 0.01 * lh.HessianTrace(probes=-1)(context)

    torch.testing.assert_close(weights(module), plain_loop(smooth(), loss_of, data(8)), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_half_precision_is_near_float32(precision):
    def step(**settings):
        module = smooth(dtype=torch.float32, lr=1.0)
        before = weights(module)
        fit(module, [callback(rho=0.2)], data(16, 16, torch.float32), max_steps=1, **settings)
        return weights(module) - before

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    half = {"precision": precision}
    if precision == "16-mixed":
        half = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}
    assert relative_error(step(**half), step()) < 0.05


def test_a_compiled_network_stays_compiled():
    compiled, eager = smooth(), smooth()
    compiled.net.compile(backend="aot_eager", fullgraph=True)
    fit(compiled, [callback()], max_steps=3)
    fit(eager, [callback()], max_steps=3)
    torch.testing.assert_close(weights(compiled), weights(eager), rtol=1e-10, atol=1e-12)


def test_manual_optimization_equals_the_callback():
    manual, automatic = Manual(callback()), Classifier()
    fit(manual, max_steps=3)
    fit(automatic, [callback()], max_steps=3)
    torch.testing.assert_close(weights(manual), weights(automatic), rtol=1e-10, atol=1e-12)


def test_a_point_without_slope_stays_where_it_is():
    class Flat(Classifier):
        def training_step(self, batch, batch_idx):
            return 0 * task_loss(self, batch)

    module = Flat(middle=nn.LayerNorm(6))
    before = weights(module)
    fit(module, [callback()], max_steps=2)
    assert torch.equal(weights(module), before)


@pytest.mark.parametrize("rho", [0, -0.1, float("inf"), "0.1", True, None])
def test_a_rho_out_of_range_is_refused(rho):
    with pytest.raises(ValueError, match=r"rho=.* must be a positive number: the length of the ascent step"):
        lh.SharpnessAware(rho)


def test_on_every_nth_step_it_is_sams_step_all_the_same():
    regularizer = lh.HessianRegularizer(lh.SharpnessAware(), every_n_steps=2)
    assert [regularizer.strengths_at(step) for step in (0, 1, 2)] == [[1.0], [0.0], [1.0]]


def test_an_unclear_adaptive_is_refused():
    with pytest.raises(ValueError, match="adaptive='no' must be true or false"):
        lh.SharpnessAware(adaptive="no")
