"""FSDP2: the penalty on parameters that are sharded over several processes.

The module shards its own layers in `configure_model`, as Lightning's ModelParallelStrategy asks. The penalty is as on
one device. On the CPU, FSDP2 needs a recent PyTorch.

    pip install . scikit-learn
    torchrun --nproc-per-node 2 examples/fsdp2.py            # a minute
    torchrun --nproc-per-node 2 examples/fsdp2.py --tiny     # seconds
"""

import argparse

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

import lightning_hessian as lh


class Net(L.LightningModule):
    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, width), nn.LayerNorm(width), nn.GELU(),
            nn.Linear(width, width), nn.LayerNorm(width), nn.GELU(),
            nn.Linear(width, 10),
        )  # fmt: skip

    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        for layer in (self.net[0], self.net[3], self.net):
            fully_shard(layer, mesh=mesh)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strength", type=float, default=1e-4)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--tiny", action="store_true", help="a small network, two steps")
    options = parser.parse_args(arguments)
    L.seed_everything(0)
    images, labels = load_digits(return_X_y=True)
    digits = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
    usual = {"logger": False, "enable_checkpointing": False}
    usual |= {"max_epochs": 1, "limit_train_batches": 2} if options.tiny else {"max_epochs": options.epochs}
    trainer = L.Trainer(
        devices=2,
        strategy=ModelParallelStrategy(),
        callbacks=[lh.HessianRegularizer(lh.HessianTrace(), options.strength)],
        **usual,
    )
    trainer.fit(Net(16 if options.tiny else 256), DataLoader(digits, 32, shuffle=True))
    return trainer


if __name__ == "__main__":
    trainer = main()
    if trainer.is_global_zero:
        print({name: value.item() for name, value in trainer.callback_metrics.items()})
