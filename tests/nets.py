"""Small LightningModules, their data, and how they are trained."""

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import lightning_hessian as lh

CPU = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Classifier(L.LightningModule):
    """Batch norm (or whatever is handed over) between two linear layers; returns a dict, a tensor or None."""

    def __init__(self, middle=None, returns="tensor", dtype=torch.float64, lr=0.1):
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6) if middle is None else middle, nn.Tanh(), nn.Linear(6, 3)
        ).to(dtype)
        self.returns = returns
        self.lr = lr
        self.losses = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.losses.append(loss.item())
        self.log("train/loss", loss, batch_size=len(y))
        if self.returns == "every other None" and batch_idx % 2:
            return None
        return {"loss": loss, "extra": 1} if self.returns == "dict" else loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def smooth(**settings):
    """With layer norm, which couples no samples and has no buffers."""
    return Classifier(middle=nn.LayerNorm(6), **settings)


class Silent(Classifier):
    """Logs nothing."""

    def training_step(self, batch, batch_idx):
        return task_loss(self, batch)


class MovingAverage(Silent):
    """A step that changes parameters: those of a teacher."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.teacher = nn.Linear(4, 6).double().requires_grad_(False)

    def training_step(self, batch, batch_idx):
        self.teacher.weight.lerp_(self.net[0].weight.detach(), 0.1)
        return super().training_step(batch, batch_idx)


class Mixed(lh.HessianRegularizationMixin, Classifier):
    """Asks for the penalty in its step."""

    def __init__(self, regularizer=None, **settings):
        super().__init__(**settings)
        self.regularizer = regularizer

    def training_step(self, batch, batch_idx):
        return self.regularized(lambda: task_loss(self, batch))


class Manual(Mixed):
    """The same by manual optimization."""

    def __init__(self, regularizer=None, **settings):
        super().__init__(regularizer, **settings)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def without_automatic_optimization():
    """A step that returns its loss and is said to optimize by itself."""
    module = Classifier()
    module.automatic_optimization = False
    return module


def data(batch_size=8, samples=48, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 4, generator=generator).to(dtype)
    return DataLoader(TensorDataset(x, torch.arange(samples) % 3), batch_size)


def fit(module, callbacks=(), loader=None, ckpt_path=None, **settings):
    trainer = L.Trainer(**{**CPU, "max_epochs": 1, "callbacks": list(callbacks), **settings})
    trainer.fit(module, loader if loader is not None else data(), ckpt_path=ckpt_path)
    return trainer


def weights(module):
    return torch.cat([value.reshape(-1).double() for value in module.state_dict().values()])


POINTS = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 2


def two_layers():
    """A network on the points, with 32 parameters."""
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def task_loss(module, batch):
    """That of a classifier, as a function."""
    x, y = batch
    return F.cross_entropy(module.net(x), y)


def context_of(module, loss, *batch, probes=None):
    """What a penalty on the Hessian of ``loss(module, *batch)`` sees."""
    with lh.higher_order(module), lh.watch_losses() as seen:
        task = loss(module, *batch)
    return lh.StepContext(task, dict(module.named_parameters()), probes or lh.ProbeSource(), losses=seen)


def context_of_inputs(module, x, y, run=lambda module, x: module.net(x)):
    """What a penalty on the inputs of a classifier sees."""
    return lh.StepContext.evaluate(lambda x: F.cross_entropy(run(module, x), y), x, dict(module.named_parameters()))


def plain_loop(module, loss_of, batches):
    """Training on ``loss_of(module, x, y, step)`` without a Trainer."""
    optimizer = module.configure_optimizers()
    for step, (x, y) in enumerate(batches):
        loss = loss_of(module, x, y, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return weights(module)


class OnceDifferentiable(nn.Module):
    """Twice its input, by a function that has no second derivative."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return 2 * gradient

    def forward(self, x):
        return self.Function.apply(x)


class Checkpointed(nn.Module):
    """A block in a checkpoint, or as it is."""

    def __init__(self, block, use_reentrant=None):
        super().__init__()
        self.block, self.use_reentrant = block, use_reentrant

    def forward(self, x):
        if self.use_reentrant is None:
            return self.block(x)
        return checkpoint(self.block, x, use_reentrant=self.use_reentrant)


def exponential(net, x):
    """A loss that has all derivatives."""
    return net(x).exp().mean()


def root_of_zero(parameter):
    """0, whose gradient is not a number."""
    return (parameter - parameter.detach()).square().sum().sqrt()
