"""Parameters that a step uses as constants, seen where it uses them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# What layers with parameters call. (A norm of weights, for the logs, is none of these.)
_LAYERS = {
    F.linear, F.bilinear, F.embedding, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d,
    F.conv_transpose3d, F.multi_head_attention_forward, torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu,
}  # fmt: skip


class watch_constants(TorchFunctionMode):
    """Context manager that records which parameters layers use while gradients are disabled.

    Args:
        module: whose parameters they are.
        parameters: those to look for.

    Attributes:
        found: their names.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> with watch_constants(layer, layer.parameters()) as seen, torch.no_grad():
        ...     y = layer(torch.ones(1, 2))
        >>> sorted(seen.found)
        ['bias', 'weight']
    """

    def __init__(self, module: nn.Module, parameters: Iterable[Tensor]) -> None:
        super().__init__()
        wanted = {id(parameter) for parameter in parameters}
        self._names = {id(p): name for name, p in module.named_parameters() if id(p) in wanted and p.requires_grad}
        self.found: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _LAYERS and not torch.is_grad_enabled():
            used = [*args, *(kwargs or {}).values()]
            self.found |= {self._names[id(value)] for value in used if id(value) in self._names}
        return func(*args, **(kwargs or {}))
