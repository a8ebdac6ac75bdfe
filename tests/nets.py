"""Small LightningModules and data for the tests of callback and mixin."""

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

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


class OnceDifferentiable(nn.Module):
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


class Recorder(L.Callback):
    """What was logged at each step."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.rows.append({k: float(v) for k, v in trainer.logged_metrics.items()} | {"step": trainer.global_step})
