"""Which layer is running: found on the Python stack, for error messages."""

from __future__ import annotations

import sys

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


def layer_name(module: nn.Module | None, layer: nn.Module | None) -> str:
    """Return a layer's full name in a module, or else its class name."""
    if layer is None:
        return "the code outside any module"
    if module is not None:
        for name, candidate in module.named_modules():
            if candidate is layer:
                return name or type(layer).__name__
    return type(layer).__name__


def counts_batches(tensor: Tensor) -> bool:
    layer = calling_module()
    return isinstance(layer, _NormBase) and tensor is layer.num_batches_tracked


def calling_module() -> nn.Module | None:
    """Return the innermost module with a method on the Python stack."""
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            return owner
        frame = frame.f_back  # type: ignore[assignment]
    return None
