"""Checkpointed regions inside a context: they are recomputed as they first ran."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn

from lightning_hessian.curvature.errors import OTHERWISE, HigherOrderError
from lightning_hessian.curvature.layers import calling_module, layer_name
from lightning_hessian.curvature.modes import in_modes


@contextmanager
def checkpoints_recomputed_in(
    module: nn.Module | None, recomputing: Callable[[], AbstractContextManager[Any]]
) -> Iterator[None]:
    """Recompute checkpointed regions as they first ran, at any time and in any thread. Refuse reentrant checkpoints.

    Args:
        module: the model, whose layers' modes are those of the first run.
        recomputing: makes the context manager that a region is recomputed in.
    """
    checkpoint = torch.utils.checkpoint
    # Which of these names exist, and which one calls the other, depends on the PyTorch version.
    names = [
        name
        for name in ("_checkpoint_without_reentrant_generator", "_checkpoint_without_reentrant_generator_impl")
        if hasattr(checkpoint, name)
    ]

    def inside(generator: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(generator)
        def wrapped(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            # Selective checkpoints allow only one backward pass. Without a selection, every pass recomputes all.
            if (selection := kwargs.get("context_fn")) is not None:
                kwargs["context_fn"] = _without_selection(selection)
            elif len(args) > 1 and callable(args[1]):
                args = (args[0], _without_selection(args[1]), *args[2:])

            layers = module.modules() if module is not None else ()
            modes = [(layer, layer.training) for layer in layers]

            # The generator calls this to recompute. The caller itself makes the first run.
            def recomputed(*inputs: Any, **keywords: Any) -> Any:
                with recomputing(), in_modes(modes):
                    return function(*inputs, **keywords)

            return generator(recomputed, *args, **kwargs)

        return wrapped

    class Refused:
        @staticmethod
        def apply(*_: Any) -> Any:
            raise HigherOrderError(
                f"{layer_name(module, calling_module())} uses a reentrant checkpoint, which cannot be differentiated "
                f"twice (pytorch#102223). Pass `use_reentrant=False` to torch.utils.checkpoint.checkpoint. {OTHERWISE}"
            )

    patched: dict[str, Any] = {name: inside(getattr(checkpoint, name)) for name in names}
    patched["CheckpointFunction"] = Refused
    originals = {name: getattr(checkpoint, name) for name in patched}
    try:
        for name, replacement in patched.items():
            setattr(checkpoint, name, replacement)
        yield
    finally:
        for name, original in originals.items():
            setattr(checkpoint, name, original)


def _without_selection(contexts: Callable[[], Any]) -> Callable[[], Any]:
    """Return a checkpoint's contexts without the pair that caches the results of a selective checkpoint."""

    def checked() -> Any:
        pair = contexts()
        selective = any(type(one).__name__ == "_CachedTorchDispatchMode" for one in pair)
        return (nullcontext(), nullcontext()) if selective else pair

    return checked
