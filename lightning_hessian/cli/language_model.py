"""The command line's LightningModule for text: the classifier of each next token."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric

from lightning_hessian.cli.classifier import Classifier


class LanguageModel(Classifier):
    """A :class:`Classifier` of each next token, with the perplexity, exp(mean cross-entropy per token).

    The network maps tokens of shape (batch, length) to logits of shape (batch, length, classes). The loss is the mean
    over all tokens, and the accuracy is the share of tokens that have the highest logit.

    Args:
        args: as for :class:`Classifier`.
        kwargs: as for :class:`Classifier`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for stage in ("val", "test"):
            self.metrics_of(stage)["perplexity"] = _Perplexity()

    def logits_and_targets(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        tokens, following = batch
        return self(tokens).flatten(0, 1), following.flatten()


class _Perplexity(MeanMetric):
    """exp(mean cross-entropy), of logits of shape (n, classes)."""

    def update(self, logits: Tensor, labels: Tensor) -> None:  # type: ignore[override]
        super().update(F.cross_entropy(logits.float(), labels), weight=len(labels))

    def compute(self) -> Tensor:
        return super().compute().exp()
