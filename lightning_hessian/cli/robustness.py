"""Accuracy under attack for the command line, whose data may be normalized."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_hessian.cli.data import ImageData
from lightning_hessian.robustness.callback import AdversarialAccuracy


class PixelAdversarialAccuracy(AdversarialAccuracy):
    """:class:`AdversarialAccuracy` in pixels: radii, bounds and the radius estimate mean pixels in [0, 1], also where
    the data are normalized.

    Args:
        attacks: and all others as there.
    """

    def attacked(self, module: LightningModule, x: Tensor) -> tuple[nn.Module, Tensor]:
        data = getattr(module.trainer, "datamodule", None)
        if not isinstance(data, ImageData) or not data.normalize:
            return module, x
        model = _OfPixels(module, data.mean, data.std).to(x.device)
        return model, model.pixels_of(x)


class _OfPixels(nn.Module):
    """A model of normalized images as one of pixels."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])
        self.training = False

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model((pixels - self.mean) / self.std)

    def pixels_of(self, images: Tensor) -> Tensor:
        """The other way, without what rounding adds beyond black and white."""
        return (images * self.std + self.mean).clamp(0, 1)
