"""A vision transformer of timm with mixup, and the trace of the Hessian as a penalty.

Mixup changes each batch and makes its targets soft, in the training step. The penalty is that of the loss which the
step computes; where the step runs again, it gets the same batch and the same random numbers. `two_pass` doubles the
cost of a step.

    pip install '.[train]' timm
    python examples/timm_vit_mixup.py            # scikit-learn's digits, a few minutes on a CPU
    python examples/timm_vit_mixup.py --tiny     # seconds
"""

import argparse

import lightning as L
import timm
import torch
from sklearn.datasets import load_digits
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_hessian as lh


class Classifier(L.LightningModule):
    def __init__(self, net, classes, lr=1e-3):
        super().__init__()
        self.net, self.lr = net, lr
        self.mixup = Mixup(mixup_alpha=0.2, cutmix_alpha=0.0, num_classes=classes)
        self.loss = SoftTargetCrossEntropy()

    def training_step(self, batch, batch_idx):
        images, soft_targets = self.mixup(*batch)
        loss = self.loss(self.net(images), soft_targets)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("val/accuracy", (self.net(images).argmax(1) == labels).float().mean(), batch_size=len(labels))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), self.lr, weight_decay=0.05)


def digits(samples):
    """Loaders of training and validation data: 1797 gray images of 8 x 8 pixels, enlarged to 32 x 32."""
    found = load_digits()
    images = torch.tensor(found.images[:samples] / 16, dtype=torch.float32).unsqueeze(1)
    images = F.interpolate(images, size=32, mode="bilinear").expand(-1, 3, -1, -1)
    data = TensorDataset(images, torch.tensor(found.target[:samples]))
    train, val = torch.utils.data.random_split(data, [0.8, 0.2])
    return DataLoader(train, 32, shuffle=True, drop_last=True), DataLoader(val, 256)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strength", type=float, default=1e-5)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--tiny", action="store_true", help="a small network, few images, two steps")
    options = parser.parse_args(arguments)
    L.seed_everything(0)
    size = {"embed_dim": 24, "depth": 1, "num_heads": 2} if options.tiny else {"depth": 4}
    net = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=10, drop_path_rate=0.1, **size
    )
    train, val = digits(200 if options.tiny else 1797)
    regularizer = lh.HessianRegularizer(lh.HessianTrace(method="two_pass"), options.strength, warmup_steps=20)
    length = {"max_epochs": 1, "limit_train_batches": 2} if options.tiny else {"max_epochs": options.epochs}
    trainer = L.Trainer(**length, callbacks=[regularizer], accelerator="auto", logger=False, enable_checkpointing=False)
    trainer.fit(Classifier(net, classes=10), train, val)
    return trainer


if __name__ == "__main__":
    print({name: round(value.item(), 4) for name, value in main().callback_metrics.items()})
