"""Data modules: images in memory as bytes, normalized on the device one batch at a time."""

from __future__ import annotations

import gzip
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar
from urllib.error import URLError

import torch
import torchvision.datasets
from torch import Tensor

from lightning_hessian.arguments import is_number, whole_number
from lightning_hessian.cli.in_memory import DataUnavailable, InMemoryData, TensorBatches

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Files of Debian's package dataset-fashion-mnist."""


class ImageData(InMemoryData):
    """Training, validation and test images of shape (batch, channels, height, width), in float32.

    The validation images are the last training images in a fixed random order, the same for every seed.

    Args:
        batch_size: images per batch and device.
        validation: number of training images held out for validation.
        train_samples: number of training images to use, from the start of the fixed random order; None for all.
        augment: random crop (padded by an eighth of the width) and, for color images, random horizontal flip.
        transform: further augmentation of one normalized training image of shape (channels, height, width), for example
            torchvision's ``v2.RandomErasing``.
        mix: augmentation of a batch of training images and of their labels, which are then probabilities of shape
            (batch, classes): torchvision's ``v2.MixUp`` or ``v2.CutMix``.
        label_noise: share of the training labels, in [0, 1), that are replaced by another class, drawn uniformly. The
            same labels are wrong for every seed. Validation and test labels stay as they are.
        normalize: to mean 0 and standard deviation 1 over the training images. If false, pixels are in [0, 1].
        root: folder of the data sets, and where downloads go.
        seed: of the order of training batches. The order depends on seed and epoch only, so a resumed run repeats it.

    Raises:
        ValueError: a setting is out of range.
        DataUnavailable: on preparation: the data are not on disk and cannot be downloaded.
    """

    shape: ClassVar[tuple[int, int, int]]
    classes: ClassVar[int] = 10
    mean: ClassVar[tuple[float, ...]]
    std: ClassVar[tuple[float, ...]]

    def __init__(
        self,
        *,
        batch_size: int = 128,
        validation: int = 200,
        train_samples: int | None = None,
        augment: bool = False,
        transform: Callable[[Tensor], Tensor] | None = None,
        mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        label_noise: float = 0.0,
        normalize: bool = True,
        root: str = "data",
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, train_samples, seed)
        whole_number("validation", validation, least=1)
        for name, switch in {"augment": augment, "normalize": normalize}.items():
            if not isinstance(switch, bool):
                raise ValueError(f"{name}={switch!r} must be true or false.")
        if not is_number(label_noise) or not 0 <= float(label_noise) < 1:
            raise ValueError(f"label_noise={label_noise!r} must be a share of the training labels, from 0 to below 1.")
        for name, function in {"transform": transform, "mix": mix}.items():
            if function is not None and not callable(function):
                raise ValueError(f"{name}={function!r} must be a function of images, or null.")
        self.validation = validation
        self.augment = augment
        self.transform = transform
        self.mix = mix
        self.label_noise = float(label_noise)
        self.normalize = normalize
        self.root = Path(root)

    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        """All images of one part, as bytes of shape (n, channels, height, width), and their labels."""
        raise NotImplementedError

    def training_and_validation(self) -> tuple[TensorBatches, TensorBatches]:
        images, labels = self.load(train=True)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        if self.validation >= len(order):
            raise ValueError(
                f"data.validation={self.validation} leaves none of the {len(order)} training images for training. "
                "Lower it."
            )
        training, validation = order[: -self.validation], order[-self.validation :]
        training = training[: self.enough(len(training))]
        noisy = self._with_noise(labels[training])
        return TensorBatches(images[training], noisy), TensorBatches(images[validation], labels[validation])

    def test(self) -> TensorBatches:
        return TensorBatches(*self.load(train=False))

    def _with_noise(self, labels: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        wrong = torch.randperm(len(labels), generator=generator)[: round(self.label_noise * len(labels))]
        noisy = labels.clone()
        noisy[wrong] += torch.randint(1, self.classes, (len(wrong),), generator=generator)
        return noisy % self.classes

    def prepared(self, batch: tuple[Tensor, Tensor], in_training: bool) -> tuple[Tensor, Tensor]:
        images, labels = batch
        if not in_training:
            return self._scaled(images), labels
        images = self._scaled(self._cropped(images) if self.augment else images)
        if self.transform is not None:
            images = torch.stack([self.transform(image) for image in images])
        if self.mix is None:
            return images, labels
        return self.mix(images, torch.nn.functional.one_hot(labels, self.classes).to(images.dtype))

    def _cropped(self, images: Tensor) -> Tensor:
        images = _random_crop(images, padding=self.shape[-1] // 8)
        if self.shape[0] == 3:
            flipped = torch.rand(len(images), device=images.device) < 0.5
            images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
        return images

    def _scaled(self, images: Tensor) -> Tensor:
        if not self.normalize:
            return images.float() / 255
        mean, std = (torch.tensor(v, device=images.device)[None, :, None, None] for v in (self.mean, self.std))
        return (images.float() / 255 - mean) / std


def _random_crop(images: Tensor, padding: int) -> Tensor:
    """Shift each image by its own random offset of at most ``padding`` pixels, and fill with zeros."""
    n, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, [padding] * 4)
    top, left = torch.randint(0, 2 * padding + 1, (2, n), device=images.device)
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = left[:, None] + torch.arange(width, device=images.device)
    sample = torch.arange(n, device=images.device)[:, None, None]
    return padded[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class Digits(ImageData):
    """scikit-learn's 1,797 handwritten digits, 8 x 8: 1,247 for training, 200 for validation, 350 for test."""

    shape = (1, 8, 8)
    mean, std = (0.305,), (0.376,)

    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
        chosen = order[350:] if train else order[:350]
        pixels = torch.from_numpy(images).view(-1, 1, 8, 8) * (255 / 16)
        return pixels.round().to(torch.uint8)[chosen], torch.from_numpy(labels)[chosen]


class _Torchvision(ImageData):
    """A data set that torchvision reads, and downloads if it is missing."""

    source: ClassVar[type]

    def prepare_data(self) -> None:
        for train in (True, False):
            try:
                self.source(self.root, train=train, download=False)
            except RuntimeError:
                self._fetch(train)

    def _fetch(self, train: bool) -> None:
        name = self.source.__name__
        try:
            self.source(self.root, train=train, download=True)
        except (URLError, RuntimeError, OSError) as error:
            raise DataUnavailable(
                f"{name} is not in {self.root.resolve()} and could not be downloaded ({error}). Put torchvision's "
                "files there, set data.root to their folder, or use data=digits, which needs no network."
            ) from error

    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        read = self.source(self.root, train=train)
        images, labels = torch.as_tensor(read.data), torch.as_tensor(read.targets)
        return images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2), labels


class MNIST(_Torchvision):
    """60,000 + 10,000 handwritten digits, 28 x 28 (LeCun et al. 1998)."""

    shape = (1, 28, 28)
    mean, std = (0.1307,), (0.3081,)
    source = torchvision.datasets.MNIST


class FashionMNIST(_Torchvision):
    """60,000 + 10,000 pieces of clothing, 28 x 28 (Xiao et al. 2017). Uses Debian's package if installed."""

    shape = (1, 28, 28)
    mean, std = (0.2860,), (0.3530,)
    source = torchvision.datasets.FashionMNIST

    def _fetch(self, train: bool) -> None:
        if not DEBIAN_FASHION_MNIST.is_dir():
            return super()._fetch(train)
        raw = self.root / "FashionMNIST" / "raw"
        raw.mkdir(parents=True, exist_ok=True)
        for packed in DEBIAN_FASHION_MNIST.glob("*.gz"):
            partial = raw / f"{packed.stem}.{os.getpid()}.partial"  # another process may unpack it at the same time
            with gzip.open(packed) as source, partial.open("wb") as target:
                shutil.copyfileobj(source, target)
            partial.replace(raw / packed.stem)  # an interruption leaves no incomplete file


class CIFAR10(_Torchvision):
    """50,000 + 10,000 color photographs of 10 classes, 32 x 32 (Krizhevsky 2009)."""

    shape = (3, 32, 32)
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    source = torchvision.datasets.CIFAR10


class CIFAR100(CIFAR10):
    """50,000 + 10,000 color photographs of 100 classes, 32 x 32 (Krizhevsky 2009)."""

    classes = 100
    mean, std = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    source = torchvision.datasets.CIFAR100
