"""verify() is right about sound models, names the layer at fault in unsound ones, and leaves the model alone."""

import copy
from contextlib import suppress

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from nets import OnceDifferentiable
from torch import nn
from torch.nn import functional as F

import lightning_hessian as lh
from lightning_hessian.verification import OUTSIDE


class Odd(nn.Module):
    """A custom tanh, right up to the second derivative and wrong in the third, as the fused norms are."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.tanh()

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            y = x.tanh()
            slope = 1 - y * y
            # Value and first derivative are right; the second derivative's own derivative is not.
            return g * (slope.detach() - 2 * (y * slope).detach() * (x - x.detach()))

    def forward(self, x):
        return self.Function.apply(x)


class Net(L.LightningModule):
    def __init__(self, odd=None):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6), odd or nn.Tanh(), nn.Linear(6, 5), nn.LayerNorm(5)
        )
        self.head = nn.Linear(5, 3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.head(self.body(x)), y)
        self.log("loss", loss)
        return {"loss": loss}


BATCH = (torch.randn(7, 4, generator=torch.Generator().manual_seed(0)), torch.arange(7) % 3)


def test_a_sound_model_is_right_and_the_replaced_layers_are_named():
    report = lh.verify(Net(), BATCH, lh.HessianTrace(probes=2))
    assert report.ok
    assert report.penalty_gradient_error < 1e-6
    assert report.replaced == {"body.1": "batch_norm", "body.4": "layer_norm"}
    assert report.faults == ()
    assert "body.1 (batch_norm)" in str(report)
    assert "WRONG" not in str(report)


def test_the_layer_with_a_wrong_third_derivative_is_named():
    report = lh.verify(Net(odd=Odd()), BATCH, lh.HessianTrace())
    assert not report.ok
    assert report.loss_gradient_error < 1e-7
    assert report.hessian_error < 1e-7
    assert report.penalty_gradient_error > 1e-2
    assert report.faults == ("body.2",)
    assert "at fault: body.2" in str(report)


def test_two_faulty_layers_are_both_named():
    net = Net(odd=nn.Sequential(Odd(), Odd()))
    assert lh.verify(net, BATCH, lh.HessianTrace()).faults == ("body.2.0", "body.2.1")


def test_a_detached_penalty_is_called_wrong():
    class Detached(lh.HessianTrace):
        def value(self, context):
            return super().value(context).detach()

    report = lh.verify(Net(), BATCH, Detached())
    assert not report.ok
    assert report.penalty_gradient_error == pytest.approx(1.0)
    assert report.faults == (OUTSIDE,)


def test_batch_norm_through_the_fused_operator_is_not_right(monkeypatch):
    monkeypatch.setattr("lightning_hessian.curvature.context._REPLACED", {})
    ok = False
    with suppress(lh.HigherOrderError):  # PyTorch 2.15 raises, 2.13 is silently wrong.
        ok = lh.verify(Net(), BATCH, lh.HessianTrace()).ok
    assert not ok


def test_dropout_is_the_same_in_every_evaluation():
    assert lh.verify(Net(odd=nn.Dropout(0.5)), BATCH, lh.HessianTrace()).ok


def test_the_module_is_left_as_it_was():
    net = Net()
    before = copy.deepcopy(net.state_dict())
    state = torch.get_rng_state()
    lh.verify(net, BATCH, lh.HessianTrace())
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in net.parameters())
    assert net.training


def test_manual_optimization_needs_the_loss():
    net = Net()
    net.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="Pass `loss="):
        lh.verify(net, BATCH, lh.HessianTrace())


class InFloat32(nn.Module):
    """An RMS norm that computes in float32 on purpose, as language models have it."""

    def forward(self, x):
        y = x.to(torch.float32)
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def test_a_layer_that_computes_in_float32_is_not_blamed():
    assert lh.verify(Net(odd=InFloat32()), BATCH, lh.HessianTrace()).ok


def test_a_layer_in_place_beside_a_faulty_one_does_no_harm():
    net = Net(odd=nn.Sequential(Odd(), nn.ReLU(inplace=True)))
    assert lh.verify(net, BATCH, lh.HessianTrace()).faults == ("body.2.0",)


def test_a_layer_without_derivatives_is_named():
    with pytest.raises(lh.HigherOrderError, match=r"@once_differentiable.*At fault: body\.2\."):
        lh.verify(Net(odd=OnceDifferentiable()), BATCH, lh.HessianTrace())


def test_a_step_may_look_at_its_trainer():
    class Looks(Net):
        def training_step(self, batch, batch_idx):
            assert self.trainer.max_epochs == 7
            return super().training_step(batch, batch_idx)

    net = Looks()
    net.trainer = L.Trainer(max_epochs=7, logger=False, enable_checkpointing=False, accelerator="cpu")
    assert lh.verify(net, BATCH, lh.HessianTrace()).ok
