"""Data modules: text as windows of tokens, each with the token that follows."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_hessian.arguments import whole_number
from lightning_hessian.cli.in_memory import DataUnavailable, InMemoryData, TensorBatches

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
"""Stands for characters that are not in the training text."""


class TextData(InMemoryData):
    """Windows of ``length`` tokens of shape (batch, length), and targets of the same shape: the tokens that follow.

    Windows do not overlap. A network begins each with no state from the one before.

    Args:
        batch_size: windows per batch and device.
        length: tokens per window.
        train_samples: number of training windows to use, from the start of the text; None for all.
        root: folder where downloads go.
        seed: of the order of training batches. The order depends on seed and epoch only, so a resumed run repeats it.

    Raises:
        ValueError: a setting is out of range.
        DataUnavailable: on preparation: the data are not on disk and cannot be downloaded.
    """

    def __init__(
        self,
        *,
        batch_size: int = 32,
        length: int = 64,
        train_samples: int | None = None,
        root: str = "data",
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, train_samples, seed)
        whole_number("length", length, least=1)
        self.length = length
        self.root = root

    def tokens(self, part: str) -> Tensor:
        """The tokens of one part, ``"train"``, ``"validation"`` or ``"test"``, as class indices of shape (n,)."""
        raise NotImplementedError

    def training_and_validation(self) -> tuple[TensorBatches, TensorBatches]:
        training = self._windows("train")
        count = self.enough(len(training))
        return TensorBatches(training.inputs[:count], training.targets[:count]), self._windows("validation")

    def test(self) -> TensorBatches:
        return self._windows("test")

    def _windows(self, part: str) -> TensorBatches:
        tokens = self.tokens(part)
        count = (len(tokens) - 1) // self.length
        if not count:
            raise ValueError(f"data.length={self.length}, but the {part} text has {len(tokens)} tokens. Lower it.")
        end = count * self.length
        return TensorBatches(tokens[:end].view(count, -1), tokens[1 : end + 1].view(count, -1))


class PythonTopics(TextData):
    """The reference texts behind Python's ``help()``, some 300,000 characters of English, by character.

    They come with Python (``pydoc_data.topics``), so another version of Python has another text. Of the paragraphs,
    each of which is taken once, 80 % are for training, 10 % for validation and 10 % for test. The topics are in a fixed
    random order.
    """

    @property
    def classes(self) -> int:  # type: ignore[override]
        """The number of different characters in the training text, and one for all others."""
        return len(self._characters)

    def tokens(self, part: str) -> Tensor:
        indices = {character: i for i, character in enumerate(self._characters)}
        return torch.tensor([indices.get(character, indices[UNKNOWN]) for character in _topics()[part]])

    @functools.cached_property
    def _characters(self) -> Sequence[str]:
        return [*sorted({*_topics()["train"]} - {UNKNOWN}), UNKNOWN]


@functools.cache
def _topics() -> dict[str, str]:
    """The text of each part."""
    from pydoc_data.topics import topics

    order = torch.randperm(len(topics), generator=torch.Generator().manual_seed(0)).tolist()
    names = sorted(topics)
    # Some topics contain others. A paragraph that is there twice could be in training and in test.
    paragraphs = [*dict.fromkeys(paragraph.strip("\n") for i in order for paragraph in topics[names[i]].split("\n\n"))]
    first, second = (len(paragraphs) * share // 10 for share in (8, 9))
    parts = {"train": paragraphs[:first], "validation": paragraphs[first:second], "test": paragraphs[second:]}
    return {part: "\n\n".join(chosen) for part, chosen in parts.items()}


class WikiText2(TextData):
    """WikiText-2: two million words of Wikipedia articles, by word (Merity et al. 2016, arXiv 1609.07843).

    Hugging Face's package ``datasets`` downloads it. The end of a line is a word of its own.
    """

    classes: ClassVar[int] = 33278

    def prepare_data(self) -> None:
        self._load()

    def tokens(self, part: str) -> Tensor:
        return torch.tensor([self._indices[word] for word in _words(self._load()[part]["text"])])

    @functools.cached_property
    def _indices(self) -> dict[str, int]:
        """The number of each word."""
        indices = {word: i for i, word in enumerate(dict.fromkeys(_words(self._load()["train"]["text"])))}
        if len(indices) != self.classes:
            raise ValueError(
                f"WikiText-2 has {len(indices)} different words here, not {self.classes}: it is another one."
            )
        return indices

    def _load(self) -> Any:
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise DataUnavailable(
                "WikiText-2 needs Hugging Face's package datasets, which is not installed. Install it: pip install "
                "datasets. Or use data=text, which needs no network."
            ) from error
        try:
            return load_dataset("Salesforce/wikitext", "wikitext-2-v1", cache_dir=self.root)
        except (OSError, ValueError, RuntimeError) as error:
            raise DataUnavailable(
                f"WikiText-2 is not in {self.root} and could not be downloaded ({error}). Use data=text, which needs "
                "no network."
            ) from error


def _words(lines: Iterable[str]) -> Iterable[str]:
    for line in lines:
        yield from (*line.split(), "<eos>")
