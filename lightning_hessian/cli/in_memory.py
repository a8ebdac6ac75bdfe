"""Data in memory: the loaders of all data modules, and the batches that curvature is measured on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from itertools import islice
from typing import Any, ClassVar, cast

from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_hessian.arguments import whole_number


class DataUnavailable(RuntimeError):
    """A data set is not on the disk and cannot be downloaded."""


class TensorBatches(Dataset[tuple[Tensor, Tensor]]):
    """Inputs and targets in memory. A batch is one indexing operation."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs = inputs
        self.targets = targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.inputs[indices], self.targets[indices]


class InMemoryData(LightningDataModule):
    """Training, validation and test samples in memory. A subclass has ``training_and_validation`` and ``test``.

    Args:
        batch_size: samples per batch and device.
        train_samples: number of training samples to use; None for all.
        seed: of the order of training batches. The order depends on seed and epoch only, so a resumed run repeats it.

    Raises:
        ValueError: a setting is out of range.
    """

    classes: ClassVar[int]

    def __init__(self, batch_size: int, train_samples: int | None, seed: int) -> None:
        super().__init__()
        for name, value in {"batch_size": batch_size, "train_samples": train_samples}.items():
            if value is not None:
                whole_number(name, value, least=1)
        self.batch_size = batch_size
        self.train_samples = train_samples
        self.seed = seed
        self._sets: dict[str, TensorBatches] = {}

    def training_and_validation(self) -> tuple[TensorBatches, TensorBatches]:
        """The samples of both."""
        raise NotImplementedError

    def test(self) -> TensorBatches:
        """The samples of the test, which are not read before it begins."""
        raise NotImplementedError

    def prepared(self, batch: tuple[Tensor, Tensor], in_training: bool) -> tuple[Tensor, Tensor]:
        """A batch as the module gets it."""
        return batch

    def setup(self, stage: str) -> None:
        if not self._sets:
            self._sets["train"], self._sets["val"] = self.training_and_validation()

    def enough(self, available: int) -> int:
        """How many of the available training samples to use.

        Raises:
            ValueError: there are not as many as asked for.
        """
        if self.train_samples is not None and self.train_samples > available:
            raise ValueError(
                f"data.train_samples={self.train_samples}, but there are only {available} for training. Lower it."
            )
        return available if self.train_samples is None else self.train_samples

    def train_dataloader(self) -> DataLoader[Any]:
        trainer = self.trainer
        sampler: DistributedSampler[Any] = DistributedSampler(
            self._sets["train"],
            num_replicas=trainer.world_size if trainer else 1,
            rank=trainer.global_rank if trainer else 0,
            seed=self.seed,
        )
        # A small last batch would have noisy batch-norm statistics and a noisy Hessian.
        return self._loader("train", sampler=sampler, drop_last=len(sampler) > self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        if "test" not in self._sets:
            self._sets["test"] = self.test()
        return self._loader("test")

    def training_samples(self, count: int) -> list[tuple[Tensor, Tensor]]:
        """The first ``count`` training samples in batches, not augmented, for measuring curvature."""
        part = self._sets["train"]
        count = min(count, len(part))
        size = min(self.batch_size, count)
        starts = range(0, count, size)
        return [self.prepared(part.__getitems__([*range(i, min(i + size, count))]), in_training=False) for i in starts]

    def training_batches(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The first ``count`` batches as the training step gets them: augmented, and over several epochs if needed."""
        for batch in islice(self._epochs(), count):
            yield self.prepared(batch, in_training=True)

    def _epochs(self) -> Iterator[tuple[Tensor, Tensor]]:
        loader = self.train_dataloader()
        for epoch in itertools.count():
            cast(DistributedSampler, loader.sampler).set_epoch(epoch)
            yield from loader

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        return self.prepared(batch, in_training=self.trainer is not None and self.trainer.training)

    def _loader(self, part: str, **settings: Any) -> DataLoader[Any]:
        return DataLoader(self._sets[part], self.batch_size, collate_fn=_identity, **settings)


def _identity(batch: Any) -> Any:
    return batch
