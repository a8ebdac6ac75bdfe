"""Image classifiers: small ones with smooth activations, and two known architectures adapted to small images."""

from __future__ import annotations

import math

import torchvision
from torch import nn

from lightning_hessian.arguments import whole_number

Shape = tuple[int, int, int]


def _check(**settings: int) -> None:
    for name, value in settings.items():
        whole_number(name, value, least=1)


def mlp(shape: Shape, classes: int, width: int = 256, depth: int = 2) -> nn.Sequential:
    """``depth`` hidden layers of ``width`` units with SiLU.

    Example:
        >>> sum(p.numel() for p in mlp((1, 8, 8), 10, width=32).parameters())
        3466
    """
    _check(width=width, depth=depth)
    size = shape[0] * shape[1] * shape[2]
    layers: list[nn.Module] = [nn.Flatten()]
    for _ in range(depth):
        layers += [nn.Linear(size, width), nn.SiLU()]
        size = width
    return nn.Sequential(*layers, nn.Linear(size, classes))


def cnn(shape: Shape, classes: int, width: int = 32) -> nn.Sequential:
    """Three 3 x 3 convolutions with batch norm and SiLU (the last two of stride 2), average pooling, a linear layer.

    Example:
        >>> import torch
        >>> cnn((1, 8, 8), 10, width=8)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    _check(width=width)

    def block(channels: int, out: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(out), nn.SiLU()]

    return nn.Sequential(
        *block(shape[0], width, 1),
        *block(width, 2 * width, 2),
        *block(2 * width, 2 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, classes),
    )


def softplus_cnn(shape: Shape, classes: int, width: int = 16, beta: float = 8.0) -> nn.Sequential:
    """Two 3 x 3 convolutions and a hidden layer, with softplus and no normalization.

    It is smooth and uses no batch statistics, so each sample has its own input Hessian. Downsampling moves 2 x 2 pixels
    into channels instead of using strides, because the input derivatives of strided convolutions are slow on a CPU.

    Args:
        shape: (channels, height, width) of an image; height and width are multiples of 4.
        classes: number of outputs.
        width: channels of the first convolution. The second has 2 ``width``, the hidden layer 4 ``width``.
        beta: of softplus(x) = log(1 + exp(beta x)) / beta. It tends to ReLU as beta grows.

    Example:
        >>> import torch
        >>> softplus_cnn((1, 8, 8), 10, width=8)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    _check(width=width)
    channels, height, side = shape
    if isinstance(beta, bool) or not 0 < beta < math.inf:
        raise ValueError(f"beta={beta!r} must be a positive number.")
    if height % 4 or side % 4:
        raise ValueError(
            f"softplus_cnn halves the image twice, so height and width must be multiples of 4, not {height} x {side}. "
            "Choose another model or data set."
        )
    return nn.Sequential(
        nn.PixelUnshuffle(2),
        nn.Conv2d(4 * channels, width, 3, padding=1),
        nn.Softplus(beta),
        nn.PixelUnshuffle(2),
        nn.Conv2d(4 * width, 2 * width, 3, padding=1),
        nn.Softplus(beta),
        nn.Flatten(),
        nn.Linear(2 * width * (height // 4) * (side // 4), 4 * width),
        nn.Softplus(beta),
        nn.Linear(4 * width, classes),
    )


def resnet18(shape: Shape, classes: int) -> nn.Module:
    """torchvision's ResNet-18 with a stem for small images: a 3 x 3 convolution of stride 1 and no max-pool."""
    net = torchvision.models.resnet18(num_classes=classes)
    net.conv1 = nn.Conv2d(shape[0], 64, 3, padding=1, bias=False)
    net.maxpool = nn.Identity()
    return net


def vit(
    shape: Shape, classes: int, patch: int | None = None, width: int = 64, depth: int = 4, heads: int = 4
) -> nn.Module:
    """A small version of torchvision's vision transformer on square patches.

    Args:
        shape: (channels, height, width) of an image.
        classes: number of outputs.
        patch: side of a patch in pixels. Default: 4, or 2 for images narrower than 16 pixels.
        width: features per token.
        depth: number of blocks.
        heads: attention heads per block.
    """
    patch = (4 if shape[-1] >= 16 else 2) if patch is None else patch
    _check(patch=patch, width=width, depth=depth, heads=heads)
    if shape[-1] % patch or width % heads:
        raise ValueError(
            f"patch={patch} must divide the image width of {shape[-1]} pixels, and heads={heads} must divide "
            f"width={width}."
        )
    net = torchvision.models.VisionTransformer(shape[-1], patch, depth, heads, width, 2 * width, num_classes=classes)
    net.conv_proj = nn.Conv2d(shape[0], width, patch, patch)
    return net
