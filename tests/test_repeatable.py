"""Penalties that run the step several times need a step that can be run again."""

from collections import deque

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from nets import Silent, data, fit
from recorders import all_warnings
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_hessian as lh


class Net(Silent):
    def __init__(self):
        super().__init__(dtype=torch.float32)


class HiddenState(Net):
    """Truncated back-propagation through time: the next step begins where this one ended."""

    def __init__(self):
        super().__init__()
        self.hidden = None

    def training_step(self, batch, batch_idx):
        h = self.net(batch[0])
        if self.hidden is not None:
            h = h + self.hidden
        self.hidden = h.detach()
        return F.cross_entropy(h, batch[1])


class MemoryBank(Net):
    def __init__(self):
        super().__init__()
        self.bank = deque(maxlen=8)

    def training_step(self, batch, batch_idx):
        z = self.net(batch[0])
        self.bank.append(z.detach())
        return F.cross_entropy(z @ torch.cat(list(self.bank)).T, torch.arange(len(z)))


class Generator(Net):
    def __init__(self):
        super().__init__()
        self.noise = torch.Generator().manual_seed(0)

    def training_step(self, batch, batch_idx):
        x = batch[0] + torch.randn(batch[0].shape, generator=self.noise)
        return F.cross_entropy(self.net(x), batch[1])


class Elsewhere(Net):
    calls = [0]  # noqa: RUF012

    def training_step(self, batch, batch_idx):
        self.calls[0] += 1
        return super().training_step(batch, batch_idx) * self.calls[0]


class Repeatable(Net):
    """Counts its calls, keeps its last outputs, and has a state in a buffer and in the global generators."""

    def __init__(self):
        super().__init__()
        self.register_buffer("hidden", torch.zeros(3))
        self.calls, self.outputs = 0, []

    def training_step(self, batch, batch_idx):
        self.calls += 1
        logits = self.net(batch[0]) + self.hidden + torch.rand(3) + np.random.rand()
        self.outputs.append(logits.detach())
        self.hidden = logits.detach().mean(0)
        return F.cross_entropy(logits, batch[1])


def train(module, callbacks):
    return fit(module, callbacks, data(4, 8, torch.float32), max_steps=2)


PENALTIES = {
    "two_pass": lambda: lh.HessianTrace(method="two_pass"),
    "central_difference": lambda: lh.HessianTrace(method="central_difference"),
    "norm by differences": lambda: lh.HessianNorm(method="central_difference"),
    "batch norm's second pass": lh.InputGradientNorm,
    "inputs by differences": lambda: lh.InputHessianNorm(method="finite_difference"),
}
STATES = {HiddenState: "hidden", MemoryBank: "bank", Generator: "noise", Elsewhere: None}


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_state_of_the_step_is_refused_and_named(penalty, kind):
    message = r"gives another loss when it is run again.*" + (f"changed: .*{STATES[kind]}" if STATES[kind] else "")
    with pytest.raises(MisconfigurationException, match=message):
        train(kind(), [lh.HessianRegularizer(PENALTIES[penalty](), 1e-4)])


@pytest.mark.parametrize("kind", STATES)
def test_the_monitor_and_the_suggestion_refuse_it_too(kind):
    with pytest.raises(MisconfigurationException, match="gives another loss when it is run again"):
        train(kind(), [lh.CurvatureMonitor(mode="train")])
    if kind is not Elsewhere:  # a copy for each batch has a state of its own
        with pytest.raises(MisconfigurationException, match="gives another loss when it is run again"):
            lh.suggest_strength(kind(), data(4, 8, torch.float32), lh.HessianTrace(method="two_pass"))


@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_step_that_can_be_run_again_is_not_refused(penalty):
    train(Repeatable(), [lh.HessianRegularizer(PENALTIES[penalty](), 1e-4)])


def test_a_penalty_that_runs_the_step_once_takes_any_state():
    train(HiddenState(), [lh.HessianRegularizer(lh.HessianTrace(), 1e-4)])


class Late(HiddenState):
    """Begins to use its state in the second step."""

    def training_step(self, batch, batch_idx):
        self.hidden = self.hidden if batch_idx else None
        return super().training_step(batch, batch_idx)


def test_what_the_runs_change_is_told_where_the_loss_is_the_same():
    with pytest.warns(UserWarning, match=r"changes hidden, and HessianTrace.*register_buffer"):
        train(Late(), [lh.HessianRegularizer(lh.HessianTrace(method="two_pass"), 1e-4)])


class Strange(Net):
    """Attributes that are not to be read."""

    def __init__(self):
        super().__init__()
        from omegaconf import OmegaConf

        self.config = OmegaConf.create({"lr": "???"})
        self.loop = {}
        self.loop["loop"] = self.loop
        with torch.inference_mode():
            self.seen = torch.ones(2)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_attributes_of_any_kind_do_no_harm(penalty):
    train(Strange(), [lh.HessianRegularizer(PENALTIES[penalty](), 1e-4)])


class Keys(Net):
    """Contrastive keys from the same network, held constant."""

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            keys = self.net(batch[0])
            self.log("length", self.net[0].weight.norm())
        return (self.net(batch[0] + 0.1) - keys).square().sum()


@pytest.mark.parametrize(("kind", "times"), [(Keys, 1), (Net, 0)])
def test_moved_parameters_that_the_step_uses_as_constants_are_warned_of_once(kind, times):
    with all_warnings() as told:
        train(kind(), [lh.HessianRegularizer(lh.HessianTrace(method="two_pass"), 1e-4)])
    assert sum("under torch.no_grad()" in message and "'net.0'" in message for message in told) == times


class Tokens(L.LightningModule):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        settings = {} if kind is nn.Embedding else {"mode": "sum"}
        self.embedding = kind(5, 4, padding_idx=2, **settings)
        self.head = nn.Linear(4, 3)
        self.rows = []

    def training_step(self, batch, batch_idx):
        self.rows.append(self.embedding.weight[2].detach().clone())
        z = self.embedding(batch[0])
        return self.head((z.sum(1) if z.dim() == 3 else z).tanh()).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("penalty", ["two_pass", "central_difference", "norm by differences"])
def test_differences_do_not_move_padding_rows(penalty, kind):
    module = Tokens(kind)
    loader = DataLoader(TensorDataset(torch.tensor([[0, 2, 3], [2, 1, 2]])), 2)
    fit(module, [lh.HessianRegularizer(PENALTIES[penalty](), 1e-3)], loader, max_steps=2, max_epochs=-1)
    assert len(module.rows) > 3
    assert all(torch.equal(row, torch.zeros(4)) for row in module.rows)
