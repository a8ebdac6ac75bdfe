"""The command line's LightningModule: an ordinary classifier without penalty code."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy


class Classifier(LightningModule):
    """SGD with Nesterov momentum, and one cosine decay of the learning rate to 0.

    Validation, test and measurements use the cross-entropy, whatever the training loss is.

    Args:
        net: maps images to logits.
        classes: number of classes.
        training_loss: maps logits and labels (class indices, or probabilities of shape (n, classes)) to the mean loss
            to train on. Default: the cross-entropy.
        lr: initial learning rate.
        momentum: SGD's momentum.
        weight_decay: SGD's weight decay.

    Raises:
        ValueError: a number is negative or not finite.
    """

    def __init__(
        self,
        net: nn.Module,
        classes: int,
        training_loss: nn.Module | None = None,
        *,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
    ) -> None:
        super().__init__()
        for name, value in {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"optimizer.{name}={value!r} must be a finite number of at least 0.")
        self.net = net
        self.training_loss = training_loss or nn.CrossEntropyLoss()
        self.lr = lr
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.accuracy = nn.ModuleDict(
            {f"{stage}_accuracy": MulticlassAccuracy(classes, average="micro") for stage in ("train", "val", "test")}
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean cross-entropy of a batch."""
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._step(batch, "train", self.training_loss)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._step(batch, "val", F.cross_entropy)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._step(batch, "test", F.cross_entropy)

    def _step(self, batch: tuple[Tensor, Tensor], stage: str, loss_of: Callable[..., Tensor]) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = loss_of(logits, labels)
        accuracy = cast(MulticlassAccuracy, self.accuracy[f"{stage}_accuracy"])
        accuracy(logits, labels.argmax(1) if labels.dim() == 2 else labels)  # of a mixed image, the larger part
        in_epoch: dict[str, Any] = {
            "on_step": False,
            "on_epoch": True,
            "batch_size": len(labels),
            "prog_bar": stage == "val",
        }
        self.log(f"{stage}/loss", loss, sync_dist=True, **in_epoch)
        self.log(f"{stage}/accuracy", accuracy, **in_epoch)
        return loss

    def optimizer(self) -> torch.optim.Optimizer:
        """A new optimizer at the initial learning rate."""
        return torch.optim.SGD(
            self.parameters(), self.lr, self.momentum, weight_decay=self.weight_decay, nesterov=self.momentum > 0
        )

    def schedule(self, optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
        """Cosine decay of the learning rate over ``steps`` steps."""
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer()
        scheduler = self.schedule(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
