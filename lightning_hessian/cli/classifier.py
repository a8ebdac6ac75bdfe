"""The command line's LightningModule: an ordinary classifier without penalty code."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

STEPS = ("T_max", "total_steps", "total_iters", "num_training_steps")
"""How schedules call the number of optimizer steps in training."""

_SGD = partial(SGD, lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
_COSINE: Callable[..., LRScheduler] = partial(CosineAnnealingLR, T_max=cast(int, None))


class Classifier(LightningModule):
    """A network, a loss, an optimizer, and a schedule that is stepped after each optimizer step.

    Validation, test and the final curvature use the cross-entropy, whatever the training loss is. The test has the
    expected calibration error, too (15 bins; Guo et al. 2017, arXiv 1706.04599). (A CurvatureMonitor
    of training data measures the training loss.)

    Args:
        net: maps inputs to logits.
        classes: number of classes.
        training_loss: maps logits and labels (class indices, or probabilities of shape (n, classes)) to the mean loss
            to train on. Default: the cross-entropy.
        optimizer: makes an optimizer of parameters. Default: SGD with learning rate 0.1, Nesterov momentum 0.9 and
            weight decay 5e-4.
        schedule: makes a schedule of the learning rate from an optimizer. An argument of it that is the number of steps
            (``T_max``, ``total_steps``, ``total_iters``, ``num_training_steps``) and None gets the training's number.
            Default: one cosine decay to 0. None in the settings: none.

    Raises:
        ValueError: on the first use: the optimizer or the schedule does not take its settings.
    """

    def __init__(
        self,
        net: nn.Module,
        classes: int,
        training_loss: nn.Module | None = None,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = _SGD,
        schedule: Callable[..., LRScheduler] | None = _COSINE,
    ) -> None:
        super().__init__()
        self.net = net
        self.training_loss = training_loss or nn.CrossEntropyLoss()
        self._optimizer = optimizer
        self._schedule = schedule
        self.metrics = nn.ModuleDict(
            {
                f"in_{stage}": nn.ModuleDict({"accuracy": MulticlassAccuracy(classes, average="micro")})
                for stage in ("train", "val", "test")
            }
        )
        self.metrics_of("test")["calibration_error"] = MulticlassCalibrationError(classes)

    def metrics_of(self, stage: str) -> nn.ModuleDict:
        """What is logged beside the loss, by name: functions of logits and class indices."""
        return cast(nn.ModuleDict, self.metrics[f"in_{stage}"])

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def logits_and_targets(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits of shape (n, classes), and class indices of shape (n,) or probabilities of shape (n, classes)."""
        inputs, targets = batch
        return self(inputs), targets

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean cross-entropy of a batch."""
        return F.cross_entropy(*self.logits_and_targets(batch))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._step(batch, "train", self.training_loss)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._step(batch, "val", F.cross_entropy)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._step(batch, "test", F.cross_entropy)

    def _step(self, batch: tuple[Tensor, Tensor], stage: str, loss_of: Callable[..., Tensor]) -> Tensor:
        logits, targets = self.logits_and_targets(batch)
        loss = loss_of(logits, targets)
        labels = targets.argmax(1) if targets.dim() == 2 else targets  # of a mixed image, the larger part
        in_epoch: dict[str, Any] = {
            "on_step": False,
            "on_epoch": True,
            "batch_size": len(labels),
            "prog_bar": stage == "val",
        }
        self.log(f"{stage}/loss", loss, sync_dist=True, **in_epoch)
        for name, metric in self.metrics_of(stage).items():
            metric(logits, labels)
            self.log(f"{stage}/{name}", cast(Metric, metric), **in_epoch)
        return loss

    def optimizer(self) -> Optimizer:
        """A new optimizer at the initial learning rate."""
        try:
            return self._optimizer(self.parameters())
        except (TypeError, ValueError) as error:
            raise ValueError(f"optimizer: {error}.") from error

    def schedule(self, optimizer: Optimizer, steps: int) -> LRScheduler | None:
        """A new schedule over ``steps`` steps."""
        if self._schedule is None:
            return None
        given = getattr(self._schedule, "keywords", {})
        try:
            return self._schedule(optimizer, **{name: steps for name in STEPS if name in given and given[name] is None})
        except (TypeError, ValueError) as error:
            raise ValueError(f"scheduler: {error}.") from error

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer()
        schedule = self.schedule(optimizer, int(self.trainer.estimated_stepping_batches))
        if schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
