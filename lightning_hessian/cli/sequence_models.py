"""Small language models: they map tokens of shape (batch, length) to logits of shape (batch, length, classes)."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_hessian.arguments import whole_number


def _check_tokens(tokens: Tensor) -> None:
    if tokens.is_floating_point():
        raise ValueError(
            f"Language models take tokens, whole numbers of shape (batch, length), not floating-point numbers of "
            f"shape {tuple(tokens.shape)}. On the command line choose data=text, or a model for images."
        )


class LSTM(nn.Module):
    """An embedding, LSTM layers, and a linear layer. The state is zero at the start of each sequence.

    Args:
        classes: number of tokens in the vocabulary.
        width: features of the embedding and of each layer.
        depth: number of LSTM layers.
        dropout: probability of dropping a feature, after the embedding and after each layer.

    Raises:
        ValueError: an argument is out of range, or the input is no tokens.

    Example:
        >>> import torch
        >>> LSTM(classes=50, width=8)(torch.zeros(2, 5, dtype=torch.long)).shape
        torch.Size([2, 5, 50])
    """

    def __init__(self, classes: int, width: int = 128, depth: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        for name, value in {"width": width, "depth": depth}.items():
            whole_number(name, value, least=1)
        self.embedding = nn.Embedding(classes, width)
        self.dropout = nn.Dropout(dropout)
        self.lstm = nn.LSTM(width, width, depth, batch_first=True, dropout=dropout if depth > 1 else 0.0)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        _check_tokens(tokens)
        features, _ = self.lstm(self.dropout(self.embedding(tokens)))
        return self.head(self.dropout(features))


class GPT(nn.Module):
    """A decoder: token and position embeddings, pre-norm transformer blocks with causal attention, a linear layer.

    Args:
        classes: number of tokens in the vocabulary.
        length: most tokens in a sequence.
        width: features per token.
        depth: number of blocks.
        heads: attention heads per block.
        dropout: probability of dropping a feature, in the blocks.

    Raises:
        ValueError: an argument is out of range, ``heads`` does not divide ``width``, or the input is no tokens, or too
            many.

    Example:
        >>> import torch
        >>> GPT(classes=50, length=16, width=8, heads=2)(torch.zeros(2, 5, dtype=torch.long)).shape
        torch.Size([2, 5, 50])
    """

    def __init__(
        self, classes: int, length: int, width: int = 128, depth: int = 4, heads: int = 4, dropout: float = 0.0
    ) -> None:
        super().__init__()
        for name, value in {"width": width, "depth": depth, "heads": heads}.items():
            whole_number(name, value, least=1)
        if width % heads:
            raise ValueError(f"heads={heads} must divide width={width}.")
        self.embedding = nn.Embedding(classes, width)
        self.positions = nn.Embedding(length, width)
        block = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        _check_tokens(tokens)
        length, most = tokens.size(1), self.positions.num_embeddings
        if length > most:
            raise ValueError(f"GPT has positions for {most} tokens, not for {length}. Raise its length.")
        features = self.embedding(tokens) + self.positions.weight[:length]
        mask = nn.Transformer.generate_square_subsequent_mask(length, tokens.device, features.dtype)
        return self.head(self.blocks(features, mask, is_causal=True))
