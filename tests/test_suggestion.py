"""suggest_strength() against dense and differenced gradients, in a real step, and as a guest that leaves no trace."""

import copy
import random

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from nets import (
    Classifier,
    Mixed,
    data,
    exponential,
    fit,
    smooth,
    task_loss,
    without_automatic_optimization,
)
from oracles import DIFFERENCES, by_differences, dense_hessian, gradient_by_differences, gradient_of
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector
from torchmetrics.classification import MulticlassAccuracy

import lightning_hessian as lh

BATCHES = list(data())


def task_gradient(module, batch):
    return gradient_of(module.training_step(batch, 0), module.parameters())


def test_the_exact_trace_against_differences_of_the_dense_one():
    module = Classifier(middle=nn.Identity())
    x, y = BATCHES[0]

    def trace():
        return dense_hessian(module.net, lambda net: F.cross_entropy(net(x), y)).trace()

    gradient = gradient_by_differences(trace, module)
    expected = 0.3 * task_gradient(module, (x, y)).norm() / gradient.norm()
    found = lh.suggest_strength(module, BATCHES[:1], lh.HessianTrace(probes=-1), share=0.3)
    assert float(found) == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("method", DIFFERENCES)
def test_differences_have_the_share_at_the_strength_that_they_are_taken_at(method):
    module = smooth()
    found = lh.suggest_strength(module, BATCHES[:2], lh.HessianTrace(method=method), share=0.2)
    for index, strength in enumerate(found.by_batch):
        task = task_gradient(module, BATCHES[index])
        total = by_differences(
            method,
            module,
            lambda module, index=index: module.training_step(BATCHES[index], index),
            strength,
            step=index,
            micro_batch=index,
        )
        assert ((total - task).norm() / task.norm()).item() == pytest.approx(0.2, rel=1e-2)


@pytest.mark.parametrize(
    "penalty",
    [
        lh.HessianTrace(),
        lh.HessianTrace(method="two_pass"),
        lh.HessianTrace(method="gauss_newton"),
        lh.HessianTrace(clamp=0.0),
        lh.InputHessianNorm(),
        [lh.InputGradientNorm(), lh.JacobianNorm(projections=-1)],
    ],
    ids=str,
)
def test_a_step_of_training_has_the_share(penalty):
    def moved(callbacks):
        # With batch norm: the penalties on inputs take a pass of their own.
        module = settled(Classifier(), BATCHES[:1])
        before = parameters_to_vector(module.parameters()).detach().clone()
        fit(module, callbacks, max_steps=1)
        return parameters_to_vector(module.parameters()).detach() - before

    plain = moved([])
    for one in penalty if isinstance(penalty, list) else [penalty]:
        found = lh.suggest_strength(Classifier(), BATCHES[:1], one, share=0.1)
        penalized = moved([lh.HessianRegularizer(one, strength=found)])
        assert ((penalized - plain).norm() / plain.norm()).item() == pytest.approx(0.1, rel=1e-2)


def settled(module, batches):
    """With the running statistics of the batches, as after a long while at these weights."""
    norm = module.net[1]
    norm.momentum = None
    norm.reset_running_stats()
    for x, _ in batches:
        module.net(x)
    norm.momentum = 0.1
    return module


@pytest.mark.parametrize("penalty", [lh.InputGradientNorm(), lh.InputHessianNorm(), lh.JacobianNorm()], ids=repr)
def test_running_statistics_settle_on_the_batches_first(penalty):
    module = Classifier()
    before = copy.deepcopy(module.state_dict())
    found = lh.suggest_strength(module, iter(BATCHES[:2]), penalty)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    # A momentum of 0 says that the statistics do not move in training: these are taken as they are.
    still = settled(Classifier(), BATCHES[:2])
    still.net[1].momentum = 0.0
    assert float(found) == pytest.approx(float(lh.suggest_strength(still, BATCHES[:2], penalty)))
    still.net[1].reset_running_stats()
    assert float(found) != pytest.approx(float(lh.suggest_strength(still, BATCHES[:2], penalty)), rel=0.1)


def test_kinks_make_the_share_jump_and_a_strength_is_found_between():
    module = Classifier(middle=nn.ReLU())
    fit(module, max_epochs=5)
    penalty = lh.HessianTrace(method="two_pass")
    assert len(lh.suggest_strength(module, data(batch_size=24), penalty, share=0.1).by_batch) == 2


def line():
    return nn.Linear(1, 1, bias=False)


def test_median_and_spread_over_the_batches():
    batches = (torch.full((3, 1), x) for x in (0.5, 1.0, 2.0, 4.0))
    found = lh.suggest_strength(line(), batches, lh.HessianTrace(), share=0.2, loss=exponential)
    assert found.by_batch == pytest.approx((0.8, 0.2, 0.05, 0.0125))
    assert (found.strength, found.low, found.high) == pytest.approx((0.125, 0.0125, 0.8))
    assert float(found) == found.strength
    assert "strength 0.125 (0.013 to 0.8 over 4 batches)" in str(found)
    assert "20 % of the task loss's" in str(found)


def test_the_callback_takes_it_as_a_strength():
    found = lh.suggest_strength(line(), [torch.ones(1, 1)], lh.HessianTrace(), loss=exponential)
    regularizer = lh.HessianRegularizer([lh.HessianTrace()] * 2, [found, 1.0], every_n_steps=2, warmup_steps=4)
    assert regularizer.strengths_at(2) == pytest.approx([0.1, 1.0])


def test_a_batch_without_a_loss_or_a_gradient_is_left_out():
    module = Classifier(returns="every other None")
    assert len(lh.suggest_strength(module, BATCHES, lh.HessianTrace()).by_batch) == 3
    batches = [torch.zeros(1, 1), torch.ones(1, 1)]  # at x = 0 nothing depends on w
    assert len(lh.suggest_strength(line(), batches, lh.HessianTrace(), loss=exponential).by_batch) == 1


class Guest(Classifier):
    """Everything that a run could leave behind."""

    def __init__(self):
        super().__init__()
        self.accuracy = MulticlassAccuracy(3)
        self.drop = nn.Dropout(0.5)
        self.frozen = nn.BatchNorm1d(4).double().eval()
        self.net[0].bias.requires_grad_(False)

    def training_step(self, batch, batch_idx):
        x, y = batch
        x.mul_(2)
        logits = self.net(self.drop(self.frozen(x)) * random.random() * np.random.rand())
        self.accuracy(logits, y)
        self.log("train/accuracy", self.accuracy)
        return F.cross_entropy(logits, y)


class Remembers(lh.HessianTrace):
    """A penalty with a state of its own, which fails on the third batch if told to."""

    def __init__(self, fails=False):
        super().__init__()
        self.fails = fails
        self.seen = []

    def value(self, context):
        self.seen.append(context.loss.item())
        if self.fails and context.probes.step == 2:
            raise ZeroDivisionError
        return super().value(context)


@pytest.mark.parametrize("penalty", [Remembers(), Remembers(fails=True), lh.HessianTrace(method="two_pass")], ids=repr)
def test_everything_is_left_as_it_was(penalty):
    module = Guest()
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    batches = [[tensor.clone() for tensor in batch] for batch in BATCHES]
    shuffled = torch.utils.data.DataLoader(batches, batch_size=None, shuffle=True)

    def everything():
        tensors = [*module.state_dict().values(), *module.accuracy.metric_state.values(), torch.get_rng_state()]
        tensors += [parameter.grad for parameter in module.parameters()] + [x for batch in batches for x in batch]
        others = [
            [(layer.training, sorted(vars(layer))) for layer in module.modules()],
            [np.random.get_state()[1].tolist(), random.getstate(), vars(penalty)],
        ]
        return copy.deepcopy((tensors, others))

    tensors, others = everything()
    parameters = [id(parameter) for parameter in module.parameters()]
    if getattr(penalty, "fails", False):
        with pytest.raises(ZeroDivisionError):
            lh.suggest_strength(module, shuffled, penalty)
    else:
        lh.suggest_strength(module, shuffled, penalty)
    torch.testing.assert_close(everything()[0], tensors, rtol=0, atol=0)
    assert everything()[1] == others
    assert parameters == [id(parameter) for parameter in module.parameters()]


def test_it_is_of_the_mode_that_the_module_is_in():
    strengths = {
        mode: float(lh.suggest_strength(Classifier().train(mode), BATCHES[:1], lh.HessianTrace()))
        for mode in (True, False)
    }
    assert strengths[True] != pytest.approx(strengths[False], rel=0.1)


def squares(net, x):
    return (net(x) - 1).square().mean()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batches": []}, "there is no batch"),
        ({"share": 0}, r"share=0 must lie in \(0, 1\]"),
        ({"share": 1.5}, "share=1.5"),
        ({"share": float("nan")}, "share=nan"),
        ({"share": "0.1"}, "share='0.1'"),
        ({"penalty": [lh.HessianTrace()]}, "is not a Penalty"),
        ({"penalty": lh.HessianTrace}, r"HessianTrace'> is not a Penalty. Pass an object such as HessianTrace\(\)"),
        ({"penalty": lh.HessianTrace(parameters="nothing")}, "matches no trainable parameter"),
        ({"loss": squares}, "linear or quadratic"),
        ({"loss": squares, "penalty": lh.HessianTrace(method="two_pass")}, "linear or quadratic"),
        ({"loss": squares, "penalty": lh.HessianTrace(method="central_difference")}, "linear or quadratic"),
        ({"penalty": lh.HessianTrace(clamp=1e9)}, "clamp="),
        ({"loss": lambda net, x: 0 * net(x).sum()}, "the task loss has no gradient"),
        ({"loss": lambda net, x: None}, "the step returned None"),
        ({"batches": [torch.full((1, 1), float("inf"))]}, "The gradient of the task loss is (nan|inf) on batch 0"),
        ({"loss": lambda net, x: net(x).exp().mean() + (net.weight - net.weight).abs().sum().sqrt()}, "root of 0"),
    ],
)
def test_what_cannot_be_suggested_is_refused_with_the_reason(settings, message):
    given = {"batches": [torch.ones(2, 1)], "penalty": lh.HessianTrace(), "loss": exponential, **settings}
    with pytest.raises(ValueError, match=message):
        lh.suggest_strength(line(), **given)


@pytest.mark.parametrize("module", [line, without_automatic_optimization, Mixed])
def test_a_step_that_returns_no_task_loss_needs_one(module):
    with pytest.raises(MisconfigurationException, match="Pass `loss="):
        lh.suggest_strength(module(), BATCHES, lh.HessianTrace())


def test_manual_optimization_with_the_loss_given():
    expected = lh.suggest_strength(Classifier(), BATCHES, lh.HessianTrace())
    assert lh.suggest_strength(without_automatic_optimization(), BATCHES, lh.HessianTrace(), loss=task_loss) == expected


def test_a_step_without_the_batch_index():
    class Short(Classifier):
        def training_step(self, batch):
            return super().training_step(batch, 0)

    expected = lh.suggest_strength(Classifier(), BATCHES, lh.HessianTrace())
    assert lh.suggest_strength(Short(), BATCHES, lh.HessianTrace()) == expected
