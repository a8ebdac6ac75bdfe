"""A penalty that is finite and whose gradient is not: verify says so, and a step does not train on it."""

import copy
import warnings

import lightning as L
import pytest
import torch
from nets import fit, root_of_zero
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_hessian as lh

x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))


def distances(z):
    return F.pdist(z).square().mean()


def own_distances(z):
    return torch.cdist(z, z).square().mean()


def cumulated(z):
    return torch.logcumsumexp(z.mul(400), 0).mul(1e-2).square().mean()


class Model(L.LightningModule):
    def __init__(self, loss, other=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
        self.other = other
        self.task = loss

    def training_step(self, batch, batch_idx):
        return self.task(self.net(batch[0]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Manual(lh.HessianRegularizationMixin, Model):
    """The same in a hand-written step, with or without another term beside the regularized one."""

    aside = False

    def __init__(self, loss):
        super().__init__(loss)
        self.automatic_optimization = False
        self.regularizer = lh.HessianRegularizer(lh.HessianTrace(), 1e-3)

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.regularized(lambda: self.task(self.net(batch[0])))
        self.manual_backward(loss + 10 * self.net[0].weight.square().sum() if self.aside else loss)
        optimizer.step()


def train(module, callbacks=(), **settings):
    return fit(module, callbacks, DataLoader(TensorDataset(x), 3), **{"max_steps": 3, "max_epochs": -1, **settings})


@pytest.mark.parametrize("loss", [distances, own_distances, cumulated])
def test_verify_does_not_call_a_gradient_right_that_is_not_a_number(loss):
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    # pdist's second derivative is not a number where two points are equal.
    batch = torch.cat([x, x[:1]])
    try:
        report = lh.verify(net, batch, lh.HessianTrace(), loss=lambda net, x: loss(net(x)))
    except lh.HigherOrderError:
        return
    assert not report.ok
    assert "WRONG" in str(report)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("loss", [lambda z: z.square().mean(), lambda z: z.exp().sum().log()])
def test_the_step_trains_on_the_task_loss_alone(loss, accumulate):
    plain = Model(loss)
    settings = {"accumulate_grad_batches": accumulate, "max_steps": 2, "max_epochs": 3}
    train(plain, **settings)
    module, regularizer = Model(loss), lh.HessianRegularizer(BadGradient(), 1e-3)
    with pytest.warns(UserWarning, match=r"gradient of the penalty bad is not finite at step 0.*train/bad_skipped"):
        trainer = train(module, [regularizer], **settings)
    assert regularizer.nonfinite_steps == 2 * accumulate
    assert trainer.callback_metrics["train/bad_skipped"] == 2 * accumulate
    for ours, expected in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-8)


class BadGradient(lh.HessianTrace):
    """A finite value whose gradient is not a number."""

    name = "bad"

    def value(self, context):
        return super().value(context) + root_of_zero(next(iter(context.parameters.values())))


def test_the_step_stops_on_request_and_leaves_gradients_and_weights():
    module = Model(lambda z: z.square().mean())
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(FloatingPointError, match="gradient of the penalty bad is not finite at step 0"):
        train(module, [lh.HessianRegularizer(BadGradient(), 1e-3, on_nonfinite="raise")])
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_one_bad_step_of_many():
    """Only the step that meets the point goes without its penalty."""

    class SecondStep(BadGradient):
        def value(self, context):
            return (BadGradient if context.probes.step == 1 else lh.HessianTrace).value(self, context)

    module, regularizer = Model(lambda z: z.square().mean()), lh.HessianRegularizer(SecondStep(), 1e-2)
    train(module, [regularizer])
    assert regularizer.nonfinite_steps == 1
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_a_task_gradient_that_is_not_finite_is_not_put_down_to_the_penalty():
    class Root(Model):
        def training_step(self, batch, batch_idx):
            loss = self.net(batch[0]).square().mean()
            return loss + root_of_zero(self.net[0].weight)

    regularizer = lh.HessianRegularizer(lh.HessianTrace(method="two_pass"), 1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(Root(None), [regularizer], max_steps=1)
    assert regularizer.nonfinite_steps <= 1


class Pops(Model):
    """Uses the batch up."""

    def training_step(self, batch, batch_idx):
        return self.net(batch.pop()).square().mean()


class InPlace(Model):
    def training_step(self, batch, batch_idx):
        return self.net(batch[0].mul_(3).add_(1)).square().mean()


class Hidden(Model):
    hidden = 0.0

    def training_step(self, batch, batch_idx):
        z = self.net(batch[0]) + self.hidden
        self.hidden = z.detach() + 1
        return z.square().mean()


class Rounds(Model):
    """Each run has another rounding error."""

    runs = 0

    def training_step(self, batch, batch_idx):
        self.runs += 1
        return self.net(batch[0]).square().mean() * (1 + 1e-6 * self.runs)


@pytest.mark.parametrize(
    ("kind", "alone"), [(Pops, True), (InPlace, False), (Hidden, False), (Rounds, True), (Model, True)]
)
def test_a_step_that_cannot_be_run_again_is_left_out_as_a_whole(kind, alone):
    plain, module = (kind(lambda z: z.square().mean()) for _ in range(2))
    before = copy.deepcopy(module.state_dict())
    train(plain, max_steps=1)
    did = "trains on the task loss alone" if alone else "whole gradient of this backward pass is left out"
    with pytest.warns(UserWarning, match=did):
        train(module, [lh.HessianRegularizer(BadGradient(), 1e-3)], max_steps=1)
    expected = plain.state_dict() if alone else before
    assert all(torch.allclose(value, expected[name]) for name, value in module.state_dict().items())


class Without(Manual):
    """Manual optimization that goes around Lightning's hooks, or overrides one."""

    def on_before_backward(self, loss):
        pass

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.regularized(lambda: self.task(self.net(batch[0])))
        loss.backward() if batch_idx else self.manual_backward(loss)
        optimizer.step()


def test_backward_by_hand_is_looked_at_too():
    module = Without(lambda z: z.square().mean())
    module.regularizer = lh.HessianRegularizer(BadGradient(), 1e-3)
    before = copy.deepcopy(module.state_dict())
    with pytest.warns(UserWarning, match="whole gradient of this backward pass is left out"):
        trainer = train(module, max_steps=4, max_epochs=1)
    assert module.regularizer.nonfinite_steps == 2
    assert trainer.callback_metrics["train/bad_skipped"] >= 1
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("aside", [False, True])
def test_in_manual_optimization(aside):
    module = Manual(lambda z: z.square().mean())
    module.aside = aside
    module.regularizer = lh.HessianRegularizer(BadGradient(), 1e-3)
    before = copy.deepcopy(module.state_dict())
    what = "whole gradient of this backward pass is left out" if aside else "trains on the task loss alone"
    with pytest.warns(UserWarning, match=what):
        train(module, max_steps=1)
    assert module.regularizer.nonfinite_steps == 1
    assert all(value.isfinite().all() for value in module.state_dict().values())
    unchanged = all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert unchanged == aside


def test_weights_that_are_not_finite_are_named():
    module = Model(lambda z: z.square().mean())
    with torch.no_grad():
        module.net[0].bias[0] = torch.nan
    with pytest.warns(UserWarning, match=r"'net\.0\.bias' holds NaN.*diverged"):
        train(module, [lh.HessianRegularizer(lh.HessianTrace(), 1e-3)], max_steps=1)


class BadValue(lh.Penalty):
    name = "bad_value"

    def value(self, context):
        return context.loss * float("nan")


def test_a_step_whose_only_penalty_was_left_out_is_counted_once_and_runs_once():
    calls = []

    def nan(z):
        calls.append(1)
        return z.square().mean() * float("nan")

    regularizer = lh.HessianRegularizer(BadValue(), 1e-3)
    train(Model(nan), [regularizer])
    assert regularizer.nonfinite_steps == 3
    assert len(calls) == 3
