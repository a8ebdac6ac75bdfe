"""A strength that holds the penalty's gradient at a share of the task loss's, measured independently."""

import copy
import math
import statistics

import lightning as L
import pytest
import torch
from nets import Classifier, Mixed, context_of_inputs, data, fit, smooth, task_loss, weights
from oracles import gradient_of
from ranks import STEPS, fit_two, joined
from recorders import Recorder, SaveAt
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_hessian as lh
from lightning_hessian.cli import models
from lightning_hessian.regularization.gradient_share import ShareControl


class Measures(L.Callback):
    """At the given steps: the length of what a penalty adds to the gradient, as a share of the task loss's."""

    def __init__(self, steps):
        self.steps = steps
        self.found = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.batch, self.twin = batch, copy.deepcopy(module.net)

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.global_step in self.steps:
            x, y = self.batch
            task = gradient_of(F.cross_entropy(self.twin(x), y), self.twin.parameters())
            whole = torch.cat([p.grad.reshape(-1) for p in module.net.parameters()])
            self.found.append(((whole - task).norm() / task.norm()).item())


def learnable(batch_size=32, samples=480, dtype=torch.float64):
    x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    return DataLoader(TensorDataset(x, (x[:, :3] + 0.5 * x[:, 1:].sin()).argmax(1)), batch_size)


def images(samples=128):
    x = torch.randn(samples, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    quarters = F.avg_pool2d(x, 4).flatten(1)
    return DataLoader(TensorDataset(x.double(), quarters.argmax(1)), 32)


class Of(Classifier):
    """A model of the command line on images."""

    def __init__(self, name):
        super().__init__(lr=0.02)
        self.net = getattr(models, name)((1, 8, 8), 4, **({} if name == "vit" else {"width": 8})).double()


PENALTIES = {
    "taylor": lh.HessianTrace(),
    "autograd": lh.HessianTrace(method="autograd"),
    "gauss_newton": lh.HessianTrace(method="gauss_newton"),
    "two_pass": lh.HessianTrace(method="two_pass"),
    "central_difference": lh.HessianTrace(method="central_difference"),
    "norm": lh.HessianNorm(),
    "input gradient": lh.InputGradientNorm(),
    "input hessian": lh.InputHessianNorm(),
    "jacobian": lh.JacobianNorm(),
    "sharpness": lh.SharpnessAware(),
    "confidence": lh.ConfidencePenalty(),
}


def share(value=0.1, every_n_steps=4):
    return lh.GradientShare(value, every_n_steps)


@pytest.mark.parametrize("name", PENALTIES)
def test_the_share_is_held_throughout_training(name):
    module, measures = Classifier(lr=0.05), Measures(range(60, 180, 2))
    regularizer = lh.HessianRegularizer(copy.deepcopy(PENALTIES[name]), share())
    fit(module, [regularizer, measures], learnable(), max_steps=180, max_epochs=-1)
    assert statistics.median(measures.found) == pytest.approx(0.1, rel=1 / 3)


@pytest.mark.parametrize("name", ["mlp", "cnn", "vit"])
def test_the_share_is_held_on_the_models_of_the_command_line(name):
    module, measures = Of(name), Measures(range(20, 60, 2))
    fit(module, [lh.HessianRegularizer(lh.HessianTrace(), share()), measures], images(), max_steps=60, max_epochs=-1)
    assert statistics.median(measures.found) == pytest.approx(0.1, rel=1 / 3)


def test_several_penalties_have_their_own_shares():
    alone, beside = Recorder(), Recorder()
    trace, gradient = lh.HessianTrace(probes=-1), lh.InputGradientNorm()
    fit(smooth(), [lh.HessianRegularizer(trace, share(0.2)), alone], max_steps=1)
    strengths = [share(0.2), share(0.05)]
    fit(smooth(), [lh.HessianRegularizer([trace, gradient], strengths), beside], max_steps=1)
    assert beside.rows[0]["train/hessian_trace_strength"] == pytest.approx(alone.rows[0]["train/strength"])
    module, batch = smooth(), next(iter(data()))
    task = gradient_of(task_loss(module, batch), module.parameters()).norm()
    added = gradient_of(gradient(context_of_inputs(module, *batch)), module.parameters()).norm()
    assert beside.rows[0]["train/input_gradient_norm_strength"] == pytest.approx((0.05 * task / added).item())


def test_two_ranks_measure_together(tmp_path):
    loader, settings = data(8), {"probes": -1}
    first, second = fit_two(tmp_path, smooth(), lh.HessianRegularizer(lh.HessianTrace(**settings), share()), loader)
    alone, recorder = smooth(), Recorder()
    joint = DataLoader(list(joined(loader)), batch_size=None)
    fit(alone, [lh.HessianRegularizer(lh.HessianTrace(**settings), share()), recorder], joint, max_steps=STEPS)
    assert torch.equal(first["weights"], second["weights"])
    torch.testing.assert_close(first["weights"], weights(alone), rtol=1e-5, atol=1e-6)
    for rank in (first, second):
        found = [row["train/strength"] for row in rank["logged"]]
        assert found == pytest.approx([row["train/strength"] for row in recorder.rows], rel=1e-5)


@pytest.mark.parametrize("steps", [6, 7])
@pytest.mark.parametrize("penalty", [lh.HessianTrace, lh.HessianNorm])
@pytest.mark.parametrize("module", [Classifier, Mixed], ids=["callback", "mixin"])
def test_resumed_equals_uninterrupted(tmp_path, module, penalty, steps):
    def run(**settings):
        regularizer = lh.HessianRegularizer(penalty(), share())
        one = module(regularizer, middle=nn.LayerNorm(6)) if module is Mixed else smooth()
        callbacks = [] if module is Mixed else [regularizer]
        trainer = fit(one, [*callbacks, *settings.pop("others", [])], loader, **settings)
        return weights(one), trainer.logged_metrics["train/strength"]

    path = tmp_path / "half.ckpt"
    loader = DataLoader([next(iter(data()))] * 12, batch_size=None)
    whole, strength = run(others=[SaveAt(path, steps)])
    resumed, found = run(ckpt_path=path)
    assert torch.equal(whole, resumed)
    assert found == strength


@pytest.mark.parametrize("beside", [None, lh.SharpnessAware()])
def test_the_norms_vector_goes_on_where_gradients_are_taken_one_by_one(beside):
    """As without a measurement, and without a penalty beside it, each step after the first has its coefficients."""
    penalty, needs = lh.HessianNorm(), []

    class Watch(L.Callback):
        def on_train_batch_end(self, *_):
            needs.append(penalty.needs.taylor)

    if beside is None:
        regularizer = lh.HessianRegularizer(penalty, share(every_n_steps=1))
    else:
        regularizer = lh.HessianRegularizer([penalty, beside], 0.1)
    fit(smooth(), [regularizer, Watch()], max_steps=4)
    assert needs == [True] * 4


def test_every_nth_step_and_a_warmup_multiply_the_strength():
    regularizer = lh.HessianRegularizer(lh.HessianTrace(), share(), every_n_steps=3, warmup_steps=6)
    recorder = Recorder()
    fit(smooth(), [regularizer, recorder], max_steps=4)
    raw = recorder.rows[3]["curvature/hessian_trace"]
    assert recorder.rows[3]["train/penalty"] == pytest.approx(1.5 * recorder.rows[3]["train/strength"] * raw, rel=1e-5)


@pytest.mark.parametrize("name", ["taylor", "input gradient", "confidence", "sharpness", "two_pass"])
def test_with_accumulation_the_share_is_that_of_the_whole_steps_gradients(name):
    """Of a micro-batch the task loss's gradient is mostly noise: four times the gradient of the step, or so."""

    class SumsOfWindow(L.Callback):
        def __init__(self):
            self.task, self.found = 0, []

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            self.task = self.task + gradient_of(task_loss(module, batch), module.parameters()) / 8

        def on_before_optimizer_step(self, trainer, module, optimizer):
            whole = torch.cat([p.grad.flatten() for p in module.parameters()])
            self.found.append(((whole - self.task).norm() / self.task.norm()).item())
            self.task = 0

    x = torch.randn(256, 4, generator=torch.Generator().manual_seed(0)).double()
    loader = DataLoader(TensorDataset(x, torch.randint(3, (256,), generator=torch.Generator().manual_seed(1))), 8)
    penalty = lh.HessianTrace(-1) if name == "taylor" else copy.deepcopy(PENALTIES[name])
    sums = SumsOfWindow()
    regularizer = lh.HessianRegularizer(penalty, share(every_n_steps=1))
    fit(smooth(lr=0.05), [regularizer, sums], loader, max_epochs=10, accumulate_grad_batches=8)
    assert statistics.median(sums.found[5:]) == pytest.approx(0.1, rel=1 / 3)


@pytest.mark.parametrize("warmup_steps", [0, 100])
def test_two_pass_in_bfloat16_is_measured_above_its_rounding(warmup_steps):
    def strengths(precision):
        recorder = Recorder()
        regularizer = lh.HessianRegularizer(
            lh.HessianTrace(method="two_pass"), share(every_n_steps=10), warmup_steps=warmup_steps
        )
        loader = learnable(dtype=torch.float32)
        module = smooth(dtype=torch.float32, lr=0.05)
        fit(module, [regularizer, recorder], loader, max_steps=160, max_epochs=-1, precision=precision)
        return [row["train/strength"] for row in recorder.rows if "train/strength" in row]

    half, single = strengths("bf16-mixed"), strengths("32-true")
    assert 1 / 3 < half[-1] / single[-1] < 3


def test_a_checkpoint_before_the_penalty_has_acted_again_keeps_its_strength(tmp_path):
    def run(epochs, start=None):
        module = smooth()
        regularizer = lh.HessianRegularizer(lh.HessianTrace(), share(), every_n_steps=10)
        path = tmp_path / f"{epochs}.ckpt"
        trainer = fit(module, [regularizer], loader, max_epochs=epochs, ckpt_path=start)
        trainer.save_checkpoint(path)
        return weights(module), path

    loader = DataLoader([next(iter(data()))] * 4, batch_size=None)
    start = None
    for epochs in (1, 2, 6):
        resumed, start = run(epochs, start)
    assert torch.equal(resumed, run(6)[0])


def test_a_compiled_network_with_several_penalties_is_measured():
    def trained(compiled):
        module = smooth()
        if compiled:
            module.net.compile(backend="aot_eager")
        penalties = [lh.ConfidencePenalty(), lh.HessianTrace()]
        fit(module, [lh.HessianRegularizer(penalties, [share(), 1e-3])], max_steps=4)
        return weights(module)

    torch.testing.assert_close(trained(compiled=True), trained(compiled=False), rtol=1e-8, atol=1e-9)


def test_the_name_in_the_logs_is_the_same_before_a_second_penalty_starts():
    recorder = Recorder()
    regularizers = [
        lh.HessianRegularizer(lh.HessianTrace(), share()),
        lh.HessianRegularizer(lh.HessianNorm(), share(), start=0.5),
    ]
    fit(smooth(), [*regularizers, recorder], max_steps=4)
    assert all("train/hessian_trace_strength" in row and "train/strength" not in row for row in recorder.rows)


def test_to_look_at_the_strength_changes_nothing():
    class Looks(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            regularizer.strength, before = 1.0, regularizer.strength
            assert regularizer.strengths_at(trainer.global_step) == [1.0]
            regularizer.strength = before

    def trained(*callbacks):
        module = smooth()
        fit(module, [regularizer, *callbacks], max_steps=5)
        return weights(module)

    regularizer = lh.HessianRegularizer(lh.HessianTrace(), share())
    assert torch.equal(trained(), trained(Looks()))


def test_a_network_that_is_compiled_is_measured_too():
    module, measures = Classifier(lr=0.05), Measures(range(30, 60, 3))
    module.net.compile(backend="aot_eager")
    fit(module, [lh.HessianRegularizer(lh.HessianTrace(), share()), measures], learnable(), max_steps=60, max_epochs=-1)
    assert statistics.median(measures.found) == pytest.approx(0.1, rel=1 / 2)


def test_one_measurement_changes_the_strength_by_a_bounded_factor():
    control = ShareControl(lh.GradientShare(0.1))
    control.measure(task=2.0, penalty=4.0)
    assert control.strength == pytest.approx(0.05)
    for lengths in ((1.0, math.nan), (0.0, 1.0), (1.0, 0.0), (math.inf, 1.0)):
        control.measure(*lengths)
    assert control.strength == pytest.approx(0.05)
    for penalty, factor in ((1e9, 1), (1e-9, 2)):
        for _ in range(4):
            before = control.strength
            control.measure(task=1.0, penalty=penalty)
        assert control.strength == pytest.approx(before * factor)


def test_a_ratio_that_changes_is_followed_at_once_and_an_outlier_is_not():
    def after(*ratios):
        control = ShareControl(lh.GradientShare(0.1))
        for ratio in (*[1.0] * 6, *ratios):
            control.measure(task=1.0, penalty=ratio)
            control.acted()
        return control

    steady, outlier, changed = after(), after(4.0), after(4.0, 4.0)
    assert steady.strength == pytest.approx(0.1)
    assert outlier.strength == pytest.approx(0.15 / 4)  # a share of at most 0.15 on this step
    assert after(4.0, 1.0).strength == pytest.approx(2 * outlier.strength, rel=0.02)
    assert outlier.next_at == outlier.steps  # and looked at again
    assert changed.strength == pytest.approx(0.1 / 4)


def test_a_penalty_without_a_gradient_is_warned_of():
    class Linear(Classifier):
        def training_step(self, batch, batch_idx):
            return self.net[0](batch[0]).mean()

    with pytest.warns(UserWarning, match=r"has no gradient on this batch.*no strength gives it a share"):
        fit(Linear(), [lh.HessianRegularizer(lh.HessianTrace(), share())], max_steps=2)


@pytest.mark.parametrize("value", [0, -0.1, 1.5, "0.1", None, math.nan, torch.ones(2)])
def test_a_share_out_of_range_is_refused(value):
    with pytest.raises(ValueError, match=r"share=.* must lie in \(0, 1\]"):
        lh.GradientShare(value)
    with pytest.raises(ValueError, match=r"GradientShare is a class. Pass an object: GradientShare\(...\)"):
        lh.HessianRegularizer(lh.HessianTrace(), lh.GradientShare)
    with pytest.raises(ValueError, match="every_n_steps=0"):
        lh.GradientShare(0.1, every_n_steps=0)
