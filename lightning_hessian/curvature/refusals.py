"""Find and name what makes curvature wrong or impossible, in a module's layers and in the graph of a loss."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from lightning_hessian.curvature.errors import OTHERWISE, HigherOrderError, once_differentiable_error
from lightning_hessian.curvature.graph import nodes


def _native(name: str, instead: str) -> Callable[..., str]:
    """Return the check for an entry point to a fused kernel."""
    return lambda *args, **kwargs: (
        f"calls torch.{name}, whose third derivative is silently wrong, so a curvature penalty would train on a wrong "
        f"gradient. Call torch.nn.functional.{instead} instead."
    )


def _as_strided_scatter(*args: Any, **kwargs: Any) -> str:
    return (
        "calls torch.as_strided_scatter, whose gradient PyTorch computes wrongly, so its derivatives would be wrong "
        "too. Write into a clone by indices instead."
    )


def _embedding(
    input: Any,
    weight: Any,
    padding_idx: Any = None,
    max_norm: Any = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> str | None:
    if not weight.requires_grad:
        return None
    if scale_grad_by_freq:
        return (
            "looks up an embedding with scale_grad_by_freq=True. Its gradient is scaled and not the gradient of the "
            "loss, so its derivatives are not the loss's curvature. Pass scale_grad_by_freq=False."
        )
    if sparse:
        return "looks up an embedding with sparse gradients, which have no double backward. Pass sparse=False."
    if max_norm is None:
        return None
    return (
        f"looks up an embedding with max_norm={max_norm:g}, which changes the weights in each forward pass. The "
        "gradient ignores that change, so it is not the gradient of the loss. Pass max_norm=None."
    )


def _max_unpool(dimensions: int) -> Callable[..., str | None]:
    def check(input: Any, indices: Any, *args: Any, **kwargs: Any) -> str | None:
        if not (torch.is_grad_enabled() and input.requires_grad and _repeats(indices, dimensions)):
            return None
        return (
            "unpools several maxima into one place, which overlapping pooling windows cause. PyTorch's gradient of "
            "this is wrong, so its derivatives would be wrong too. Pool with kernel_size = stride."
        )

    return check


CALLS: Mapping[Any, Callable[..., str | None]] = {
    torch.native_layer_norm: _native("native_layer_norm", "layer_norm"),
    torch.native_batch_norm: _native("native_batch_norm", "batch_norm"),
    torch.as_strided_scatter: _as_strided_scatter,
    Tensor.as_strided_scatter: _as_strided_scatter,
    F.embedding: _embedding,
    F.max_unpool1d: _max_unpool(1),
    F.max_unpool2d: _max_unpool(2),
    F.max_unpool3d: _max_unpool(3),
}
"""Functions whose derivatives can be silently wrong. Each check returns what is wrong with a call, or None."""


def _repeats(indices: Any, dimensions: int) -> bool:
    if not isinstance(indices, Tensor) or torch._C._functorch.is_functorch_wrapped_tensor(indices):
        return False
    places = indices.flatten(-dimensions).sort(dim=-1).values
    return bool((places[..., 1:] == places[..., :-1]).any())


# Nodes of fused kernels with a wrong third derivative, and of the fused weight norm with a wrong second one. If the
# forward pass computed a gradient through a layer norm, the loss's second derivative is that norm's third.
_FUSED_NORM = re.compile(r"(Layer|Batch|Rms)_?Norm\w*Backward", re.IGNORECASE)
_DIFFERENTIATED_LAYER_NORM = re.compile(r"LayerNorm\w*BackwardBackward", re.IGNORECASE)
_FUSED_WEIGHT_NORM = re.compile(r"WeightNorm\w*Backward", re.IGNORECASE)
_LEARNED_SPARSE = re.compile(r"^_?Sparse\w*Tensor\w*Backward|^Sparse(SampledAddmm|Mask|Softmax|LogSoftmax)Backward")


def refuse_unsound_graph(result: Tensor | Sequence[Tensor], derivatives: int = 3) -> list[Any]:
    """Search the graph of a loss for operators whose higher derivatives are silently wrong or omitted.

    This also finds operators that bypass ``higher_order()``, for example through TorchScript or ``torch.ops``. For a
    function marked ``@once_differentiable``, ``torch.autograd.grad`` raises no error: it prunes the branch first, and
    the Hessian silently lacks that part.

    Args:
        result: a scalar with its graph, or several results.
        derivatives: how often the result will be differentiated: 2 to measure curvature, 3 to train on it.

    Returns:
        The nodes of all custom ``torch.autograd.Function``s in the graph, except this library's own.

    Raises:
        HigherOrderError: the graph contains such an operator. The error names it.
    """
    custom = []
    for node in nodes(result):
        function = getattr(node, "_forward_cls", None)
        if function is None:
            _refuse_node(node, derivatives)
        elif not function.__module__.startswith("lightning_hessian."):
            refuse_function(function)
            custom.append(node)
    return custom


_NO_DERIVATIVE = "torch::autograd::Error"
"""The node of a result that PyTorch refuses to differentiate. It raises only in the backward pass."""
_EXAMINED = (
    _FUSED_NORM, _FUSED_WEIGHT_NORM, _LEARNED_SPARSE,
    re.compile(f"^(Embedding|Convolution)Backward|^{_NO_DERIVATIVE}$"),
)  # fmt: skip


@cache
def _is_harmless(name: str) -> bool:
    """Return whether nodes of this name need no check. Cached, because graphs are large but have few names."""
    return not any(pattern.search(name) for pattern in _EXAMINED)


def _refuse_node(node: Any, derivatives: int) -> None:
    name = node.name()
    if _is_harmless(name):
        return
    if name == _NO_DERIVATIVE:
        raise HigherOrderError(
            "The loss passes through an operator that this version of PyTorch cannot differentiate at all (maybe "
            "a control-flow operator such as while_loop). Write it with operators that have a gradient."
        )
    if (
        _FUSED_WEIGHT_NORM.search(name)
        or (derivatives > 2 and _FUSED_NORM.search(name))
        or _DIFFERENTIATED_LAYER_NORM.search(name)
    ):
        raise HigherOrderError(
            f"The loss passes through the fused kernel of {name}, whose higher derivatives are silently wrong, so the "
            "curvature would be wrong too. Compute the loss inside `with higher_order():` (with `derivatives=3` if the "
            "step computes a gradient in its forward pass), and call the layer from torch.nn or torch.nn.functional "
            "there, not through TorchScript or torch.ops. `lightning_hessian.verify` names the layer."
        )
    if _LEARNED_SPARSE.search(name):
        raise HigherOrderError(
            f"The loss passes through a sparse tensor of learned values ({name}), whose part of the Hessian PyTorch "
            "silently omits. Use a dense tensor, or gather and scatter the values yourself "
            f"(`torch.index_add`). Constant sparse matrices are supported. {OTHERWISE}"
        )
    if getattr(node, "_saved_scale_grad_by_freq", False):
        raise HigherOrderError(
            "The loss passes through an embedding with scale_grad_by_freq=True. Its gradient is scaled and not the "
            "gradient of the loss, so its derivatives are not the loss's curvature. Pass scale_grad_by_freq=False."
        )
    if getattr(node, "_saved_sparse", False):
        raise HigherOrderError(
            "The loss passes through an embedding with sparse gradients, which have no double backward. Pass "
            "sparse=False."
        )
    if getattr(node, "_saved_transposed", False) and any(node._saved_output_padding):
        raise HigherOrderError(
            "The loss passes through a transposed convolution with output_padding, which PyTorch cannot differentiate "
            "twice. Compute the loss inside `with higher_order():`, which uses a differentiable version."
        )


def refuse_function(function: Any) -> None:
    """Refuse a custom ``torch.autograd.Function`` whose backward cannot be differentiated."""
    name: str = function.__qualname__
    if "linear_cross_entropy" in name:
        raise HigherOrderError(
            "The loss is a fused linear_cross_entropy, whose gradient has no derivative, so its part of the Hessian "
            "would be zero. Compute the loss inside `with higher_order():`, or pass `options=None`."
        )
    if function.__module__.startswith("torch._higher_order_ops"):
        operator = re.sub(r"(?<!^)(?=[A-Z])", "_", name.removesuffix("AutogradOp"))
        raise control_flow_error(operator.lower())
    if any(_is_once_differentiable(getattr(function, way, None)) for way in ("backward", "vjp")):
        raise once_differentiable_error(name)


def control_flow_error(operator: str, error: BaseException | None = None) -> HigherOrderError:
    """Build the error for ``torch.cond``, ``scan`` and similar operators."""
    found = f" (inside it: {type(error).__name__}: {str(error).splitlines()[0]})" if error is not None else ""
    return HigherOrderError(
        f"The loss passes through the control-flow operator {operator}, whose gradient PyTorch cannot differentiate: "
        f"its part of the Hessian would be missing{found}. Write the branch or the loop in Python. {OTHERWISE}"
    )


_ONCE_DIFFERENTIABLE = once_differentiable(lambda ctx: None).__code__


def _is_once_differentiable(function: Any) -> bool:
    """Return whether the function, or any function it wraps, is marked ``@once_differentiable``."""
    while function is not None:
        if getattr(function, "__code__", None) is _ONCE_DIFFERENTIABLE:
            return True
        function = getattr(function, "__wrapped__", None)
    return False


@contextmanager
def without_lost_derivatives(custom: Sequence[Any]) -> Iterator[None]:
    """Context manager: refuse a custom function whose backward cuts the graph.

    The cause may be a hidden ``@once_differentiable``, ``torch.no_grad()`` or ``.detach()``.

    Args:
        custom: the nodes of custom functions in the graph. The backward pass inside must start from a seed that
            requires grad, so that every gradient that depends on it does too.

    Raises:
        HigherOrderError: a backward cuts the graph. The error names the function.
    """

    def check(node: Any) -> Callable[..., None]:
        def on_backward(inputs: Sequence[Tensor | None], outputs: Sequence[Tensor | None]) -> None:
            given = any(isinstance(g, Tensor) and g.requires_grad for g in outputs)
            found = [g for g in inputs if isinstance(g, Tensor)]
            if not given or not found:
                return
            if any(g.grad_fn is not None and g.grad_fn.name() == _NO_DERIVATIVE for g in found):
                raise once_differentiable_error(function_name(node))
            if not any(g.requires_grad for g in found) and any(bool(g.any()) for g in found):
                raise once_differentiable_error(
                    function_name(node),
                    "has no graph (it contains torch.no_grad(), .detach() or the mark @once_differentiable)",
                )

        return on_backward

    handles = [node.register_hook(check(node)) for node in custom]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def function_name(node: Any) -> str:
    """Return the name of a node's custom ``torch.autograd.Function``."""
    name: str = node._forward_cls.__qualname__
    return name


def refuse_layers(module: nn.Module) -> None:
    """Refuse a module with layers that ``higher_order()`` cannot make differentiable.

    Raises:
        HigherOrderError: the module has such a layer. The error names it.
    """
    is_distributed = (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )
    for name, layer in module.named_modules():
        if isinstance(layer, nn.SyncBatchNorm) and is_distributed and layer.training:
            raise HigherOrderError(
                f"The layer {name!r} is a SyncBatchNorm, which has no double backward (pytorch#61222), so no curvature "
                "penalty can be differentiated through it. Train with `sync_batchnorm=False` (each process then "
                f"normalizes by its own batch), or use GroupNorm. {OTHERWISE}"
            )
        if layer.training and _is_spectral_norm(layer):
            raise HigherOrderError(
                f"The layer {name!r} is a spectral norm in training mode: each forward pass updates the vectors of "
                "its power iteration and treats them as constants, so its derivatives do not match the loss. Call "
                "`.eval()` on this layer after a warm-up, or use weight norm."
            )
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
            _refuse_embedding(name, layer)
        if isinstance(layer, torch.jit.ScriptModule):
            raise HigherOrderError(
                f"The layer {name!r} is TorchScript, whose fused operators cannot be replaced by ones that are "
                f"differentiable three times. Use the original Python module. {OTHERWISE}"
            )


def _refuse_embedding(name: str, layer: nn.Embedding | nn.EmbeddingBag) -> None:
    if layer.sparse:
        raise HigherOrderError(
            f"The layer {name!r} has sparse gradients, which have no double backward. Pass sparse=False."
        )
    if not layer.weight.requires_grad:
        return
    if layer.max_norm is not None:
        raise HigherOrderError(
            f"The layer {name!r} has max_norm={layer.max_norm:g}: each forward pass changes its weights, and the "
            "gradient ignores that change, so its derivatives do not match the loss. Pass max_norm=None, and bound "
            "the weights in `on_train_batch_end` if necessary."
        )
    if layer.scale_grad_by_freq:
        raise HigherOrderError(
            f"The layer {name!r} has scale_grad_by_freq=True: its gradient is scaled and not the gradient of the loss, "
            "so its derivatives are not the loss's curvature. Pass scale_grad_by_freq=False."
        )


def _is_spectral_norm(layer: nn.Module) -> bool:
    hooks = layer._forward_pre_hooks.values()
    return isinstance(layer, _SpectralNorm) or any(isinstance(hook, SpectralNorm) for hook in hooks)
