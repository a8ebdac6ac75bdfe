"""A small segmentation network, with SAM's step and a monitor of the curvature.

The loss is a mean over pixels, and the network has batch norm. Sharpness-aware minimization (SAM) is a penalty like
others here: it needs no optimizer of its own. The monitor shows what it does to the largest eigenvalue.

    pip install .
    python examples/segmentation.py            # discs and squares in noise, a minute on a CPU
    python examples/segmentation.py --tiny     # seconds
"""

import argparse

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_hessian as lh


def block(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.SiLU())


class Segmentation(L.LightningModule):
    """A U-Net of one level."""

    def __init__(self, width=16, classes=3):
        super().__init__()
        self.down, self.bottom = block(1, width), block(width, 2 * width)
        self.up, self.head = block(3 * width, width), nn.Conv2d(width, classes, 1)

    def forward(self, x):
        fine = self.down(x)
        coarse = self.bottom(F.max_pool2d(fine, 2))
        coarse = F.interpolate(coarse, scale_factor=2, mode="bilinear")
        return self.head(self.up(torch.cat([fine, coarse], dim=1)))

    def training_step(self, batch, batch_idx):
        images, masks = batch
        return F.cross_entropy(self(images), masks)

    def validation_step(self, batch, batch_idx):
        images, masks = batch
        found = self(images).argmax(1)
        both, either = ((found == masks) & (masks > 0)).sum(), ((found > 0) | (masks > 0)).sum()
        self.log("val/overlap", both / either, batch_size=len(masks))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def shapes(count, size=32):
    """Images of a disc (class 1) or a square (class 2) in noise, and their masks."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    center, radius = torch.randint(8, size - 8, (2, count, 1, 1)), torch.randint(4, 8, (count, 1, 1))
    dx, dy = (x - center[0]).abs(), (y - center[1]).abs()
    kind = torch.arange(count).view(-1, 1, 1) % 2
    inside = torch.where(kind == 0, dx**2 + dy**2 <= radius**2, torch.maximum(dx, dy) <= radius)
    return TensorDataset((inside + 0.5 * torch.randn(count, size, size)).unsqueeze(1), inside * (kind + 1))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rho", type=float, default=0.05)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a small network, few images, two steps")
    options = parser.parse_args(arguments)
    L.seed_everything(0)
    train, val = DataLoader(shapes(64 if options.tiny else 2048), 32, shuffle=True), DataLoader(shapes(256), 128)
    callbacks = [lh.HessianRegularizer(lh.SharpnessAware(options.rho)), lh.CurvatureMonitor(layers=[])]
    length = {"max_epochs": 1, "limit_train_batches": 2} if options.tiny else {"max_epochs": options.epochs}
    trainer = L.Trainer(**length, callbacks=callbacks, logger=False, enable_checkpointing=False)
    trainer.fit(Segmentation(4 if options.tiny else 16), train, val)
    return trainer


if __name__ == "__main__":
    print({name: round(value.item(), 4) for name, value in main().callback_metrics.items()})
