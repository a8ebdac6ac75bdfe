"""Accuracy under attack for the command line's data, which may be normalized."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_hessian.cli.data import ImageData
from lightning_hessian.robustness.callback import AdversarialAccuracy


class PixelAdversarialAccuracy(AdversarialAccuracy):
    """:class:`AdversarialAccuracy` in pixels: radii, bounds and the radius estimate refer to pixels in [0, 1], even if
    the data are normalized.

    Args:
        attacks: this and all other arguments as in :class:`AdversarialAccuracy`.
    """

    def attacked(self, module: LightningModule, x: Tensor) -> tuple[nn.Module, Tensor]:
        data = getattr(module.trainer, "datamodule", None)
        if not isinstance(data, ImageData) or not data.normalize:
            return module, x
        model = _PixelModel(module, data.mean, data.std).to(x.device)
        return model, model.denormalize(x)


class _PixelModel(nn.Module):
    """Normalizes pixels, then calls a model of normalized images."""

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

    def denormalize(self, images: Tensor) -> Tensor:
        """Pixels of normalized images, clamped because rounding can leave [0, 1]."""
        return (images * self.std + self.mean).clamp(0, 1)
