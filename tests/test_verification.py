"""verify() is right about sound models, names the layer at fault in unsound ones, and leaves the model alone."""

import copy
import random
from contextlib import suppress
from dataclasses import dataclass

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from nets import CPU, OnceDifferentiable
from torch import nn
from torch.nn import functional as F

import lightning_hessian as lh
from lightning_hessian.regularization.verify import OUTSIDE


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
    report = lh.verify(Net(), BATCH, lh.HessianTrace(probes=2, method="autograd"))
    assert report.ok
    assert report.penalty_gradient_error < 1e-6
    assert report.replaced == {"body.1": "batch_norm", "body.4": "layer_norm"}
    assert report.faults == ()
    assert "body.1 (batch_norm)" in str(report)
    assert "WRONG" not in str(report)


def test_the_layer_with_a_wrong_third_derivative_is_named():
    report = lh.verify(Net(odd=Odd()), BATCH, lh.HessianTrace(method="autograd"))
    assert not report.ok
    assert report.loss_gradient_error < 1e-7
    assert report.hessian_error < 1e-7
    assert report.penalty_gradient_error > 1e-2
    assert report.faults == ("body.2",)
    assert "at fault: body.2" in str(report)


def test_two_faulty_layers_are_both_named():
    net = Net(odd=nn.Sequential(Odd(), Odd()))
    assert lh.verify(net, BATCH, lh.HessianTrace(method="autograd")).faults == ("body.2.0", "body.2.1")


def test_a_detached_penalty_is_called_wrong():
    class Detached(lh.HessianTrace):
        def value(self, context):
            return super().value(context).detach()

    report = lh.verify(Net(), BATCH, Detached())
    assert not report.ok
    assert report.penalty_gradient_error == pytest.approx(1.0)
    assert report.faults == (OUTSIDE,)


def test_batch_norm_through_the_fused_operator_is_not_right(monkeypatch):
    monkeypatch.setattr("lightning_hessian.curvature.replacements.ALWAYS", {})
    ok = False
    with suppress(lh.HigherOrderError):  # PyTorch 2.15 raises, 2.13 is silently wrong.
        ok = lh.verify(Net(), BATCH, lh.HessianTrace(method="autograd")).ok
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
    assert lh.verify(net, BATCH, lh.HessianTrace(method="autograd")).faults == ("body.2.0",)


@pytest.mark.parametrize("method", ["autograd", "taylor"])
def test_a_layer_without_derivatives_is_named(method):
    with pytest.raises(lh.HigherOrderError, match=r"@once_differentiable.*At fault: body\.2\."):
        lh.verify(Net(odd=OnceDifferentiable()), BATCH, lh.HessianTrace(method=method))


@pytest.mark.parametrize("method", ["autograd", "taylor", "gauss_newton"])
def test_a_layer_below_the_chosen_parameters_needs_no_second_derivative(method):
    net = nn.ModuleDict({"bag": nn.EmbeddingBag(10, 4), "head": nn.Sequential(nn.Linear(4, 4), nn.Tanh())})
    words, labels = torch.randint(0, 10, (5, 3)), torch.randint(0, 4, (5,))

    def loss(net, batch):
        return nn.functional.cross_entropy(net["head"](net["bag"](batch[0])), batch[1])

    assert lh.verify(net, (words, labels), lh.HessianTrace(method=method, parameters="head.*"), loss).ok


def test_a_step_may_look_at_its_trainer():
    class Looks(Net):
        def training_step(self, batch, batch_idx):
            assert self.trainer.max_epochs == 7
            return super().training_step(batch, batch_idx)

    net = Looks()
    net.trainer = L.Trainer(**CPU, max_epochs=7)
    assert lh.verify(net, BATCH, lh.HessianTrace()).ok


def test_randomness_and_changes_in_place_of_a_step_are_no_errors():
    class Mixes(Net):
        def training_step(self, batch, batch_idx):
            x, y = batch
            x.mul_(np.random.beta(0.4, 0.4)).add_(x.flip(0), alpha=random.random())
            return super().training_step((x, y), batch_idx)

    x, y = BATCH[0].double(), BATCH[1]
    before, states = x.clone(), (np.random.get_state()[1].copy(), random.getstate())
    assert lh.verify(Mixes(), (x, y), lh.HessianTrace()).ok
    assert torch.equal(x, before)
    assert (np.random.get_state()[1] == states[0]).all()
    assert random.getstate() == states[1]


@pytest.mark.parametrize("penalty", [lh.HessianTrace, lh.HessianNorm, "HessianTrace", None])
def test_what_is_no_penalty_is_refused(penalty):
    with pytest.raises(ValueError, match=r"is not a Penalty\. Pass an object such as HessianTrace\(\)"):
        lh.verify(Net(), BATCH, penalty)


def test_a_loader_is_no_batch():
    with pytest.raises(ValueError, match=r"verify takes one batch, not a DataLoader"):
        lh.verify(Net(), torch.utils.data.DataLoader([0]), lh.HessianTrace())


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_padding_rows_are_constants(kind):
    settings = {} if kind is nn.Embedding else {"mode": "sum"}
    net = nn.Sequential(kind(5, 4, padding_idx=2, **settings), nn.Flatten(), nn.LazyLinear(3), nn.Tanh())
    tokens = torch.tensor([[0, 2, 3], [2, 1, 2]])
    net(tokens)
    if kind is nn.EmbeddingBag:
        with pytest.raises(lh.HigherOrderError, match="embedding_bag"):
            lh.verify(net, tokens, lh.HessianTrace(), loss=lambda net, x: net(x).square().mean())
        return
    assert lh.verify(net, tokens, lh.HessianTrace(), loss=lambda net, x: net(x).square().mean()).ok


def test_kinks_that_differences_cross_are_said_and_no_relu_is_blamed():
    net = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3))
    x = torch.randn(8, 4)
    with torch.no_grad():  # every kink of the first layer is within a step of the first sample
        net[0].bias.copy_(1e-6 * torch.randn(64) - net[0].weight @ x[0])
    report = lh.verify(net, x, lh.HessianTrace(), loss=lambda net, x: net(x).square().mean())
    assert not report.ok
    assert report.faults == ()
    assert "UNDECIDED" in str(report)
    assert "kinks: ReLU" in str(report)
    smooth = nn.Sequential(net[0], nn.SiLU(), net[2], nn.SiLU(), net[4])
    assert "kinks" not in str(lh.verify(smooth, x, lh.HessianTrace(), loss=lambda net, x: net(x).square().mean()))


def test_a_detached_penalty_is_wrong_on_a_network_with_kinks_too():
    class Detached(lh.HessianTrace):
        def value(self, context):
            return super().value(context).detach()

    report = lh.verify(Net(odd=nn.ReLU()), BATCH, Detached())
    assert report.faults == (OUTSIDE,)
    assert "WRONG" in str(report)


def test_a_step_with_a_state_is_refused():
    class Remembers(Net):
        generator = torch.Generator().manual_seed(0)

        def training_step(self, batch, batch_idx):
            x, y = batch
            return super().training_step((x + torch.randn(x.shape, generator=self.generator), y), batch_idx)

    with pytest.raises(MisconfigurationException, match="another loss when it is run again"):
        lh.verify(Remembers(), BATCH, lh.HessianTrace())


@dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    y: torch.Tensor


class Plain:
    def __init__(self, x, y):
        self.x, self.y = x, y


@pytest.mark.parametrize("kind", [Frozen, Plain])
def test_a_batch_of_the_users_own_class_is_copied(kind):
    class Takes(Net):
        def training_step(self, batch, batch_idx):
            batch.x.mul_(1.1)
            return super().training_step((batch.x.double(), batch.y), batch_idx)

    batch = kind(BATCH[0].double(), BATCH[1])
    before = batch.x.clone()
    assert lh.verify(Takes(), batch, lh.HessianTrace()).ok
    assert torch.equal(batch.x, before)


def test_a_faulty_layer_beside_a_kinked_one_in_a_block_is_named():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, x):
            return Odd.Function.apply(self.relu(x) + x)

    assert lh.verify(Net(odd=Block()), BATCH, lh.HessianTrace(method="autograd")).faults == ("body.2",)


def test_errors_of_the_users_own_are_not_translated():
    class Fails(Net):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("the config file has nested keys and sparse labels")

    with pytest.raises(RuntimeError, match="nested keys") as error:
        lh.verify(Fails(), BATCH, lh.HessianTrace())
    assert not isinstance(error.value, lh.HigherOrderError)
