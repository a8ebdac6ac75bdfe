"""``higher_order()``: what the forward pass does inside is differentiable three times."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from lightning_hessian.curvature import norms


class HigherOrderError(RuntimeError):
    """An operator or a layer cannot be differentiated as often as a curvature penalty needs."""


def _batch_norm(x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float,
                cudnn_enabled: bool = True) -> Tensor:  # fmt: skip
    return norms.batch_norm(x, mean, var, weight, bias, training, momentum, eps)


def _instance_norm(x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, use_input_stats: bool, momentum: float,
                   eps: float, cudnn_enabled: bool = True) -> Tensor:  # fmt: skip
    return norms.instance_norm(x, mean, var, weight, bias, use_input_stats, momentum, eps)


def _layer_norm(x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5,
                cudnn_enable: bool = True) -> Tensor:  # fmt: skip
    return norms.layer_norm(x, shape, weight, bias, eps)


# The functions of torch.nn.functional and the lower-level ones of torch take their arguments in different orders.
_REPLACED: dict[Any, Callable[..., Tensor]] = {
    F.batch_norm: norms.batch_norm,
    F.instance_norm: norms.instance_norm,
    F.layer_norm: norms.layer_norm,
    F.rms_norm: norms.rms_norm,
    torch.batch_norm: _batch_norm,
    torch.instance_norm: _instance_norm,
    torch.layer_norm: _layer_norm,
    torch.rms_norm: norms.rms_norm,
    torch._weight_norm: norms.weight_norm,
}

# Entry points to the fused kernels that return the statistics too: silently wrong, and nobody needs them by name.
_REFUSED = {
    torch.native_layer_norm: "torch.nn.functional.layer_norm",
    torch.native_batch_norm: "torch.nn.functional.batch_norm",
}

# cuDNN's kernels have no double backward; PyTorch's own cells have.
_RECURRENT = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}


class higher_order(TorchFunctionMode):
    """Context manager: every operation of the forward pass inside is differentiable three times.

    Training on a curvature penalty differentiates the loss three times: for the gradient, for the Hessian-vector
    product, and for the penalty's own gradient. Inside this context

    - batch, layer, instance and RMS norm and the fused weight norm run as primitives (the fused kernels have wrong
      third derivatives, pytorch#175754 and #186256; the fused weight norm a wrong second one); running statistics
      move as in the fused operator;
    - attention runs on the math backend (pytorch#116350), recurrent layers without cuDNN (pytorch#5261);
    - compiled modules run eagerly (pytorch#91469);
    - checkpointed regions (``use_reentrant=False``) are recomputed in the same way.

    Only the forward pass needs the context; call ``torch.autograd.grad`` and ``backward`` inside or outside.

    Args:
        module: the model. Layers that cannot be made right (SyncBatchNorm across processes, TorchScript) are then
            found before anything runs, and errors give layers their full names.

    Attributes:
        replaced: the layers whose fused operator was replaced, by name, with the operator's name.

    Raises:
        HigherOrderError: on entering, for a layer of ``module`` that is not differentiable often enough; in the
            forward pass, at a reentrant checkpoint or a call to a fused kernel by its native name.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1))
        >>> with higher_order(net) as context:
        ...     loss = net(torch.ones(3, 2)).square().mean()
        >>> context.replaced
        {'1': 'layer_norm'}
    """

    def __init__(self, module: nn.Module | None = None) -> None:
        super().__init__()
        self.replaced: dict[str, str] = {}
        self._module = module
        self._first_caller: dict[str, nn.Module] = {}
        self._stack = ExitStack()

    def __enter__(self) -> higher_order:
        if self._module is not None:
            _refuse_layers(self._module)
        with ExitStack() as stack:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            # Importing the compiler takes seconds; where nobody has imported it, nothing is compiled.
            if "torch._dynamo" in sys.modules:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(_checkpoints_in_higher_order(self))
            super().__enter__()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._stack.close()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return func(*args, **kwargs)
        if (primitive := _REPLACED.get(func)) is not None:
            self.replaced[self.layer_name(_calling_module())] = name.lstrip("_")
            return primitive(*args, **kwargs)
        if func in _REFUSED:
            raise HigherOrderError(
                f"{self.layer_name(_calling_module())} calls torch.{name}, whose third derivative is silently wrong, "
                f"so a curvature penalty would train on a wrong gradient. Call {_REFUSED[func]} instead."
            )
        if name not in self._first_caller and (caller := _calling_module()) is not None:
            self._first_caller[name] = caller
        with torch.backends.cudnn.flags(enabled=False) if func in _RECURRENT else nullcontext():
            return func(*args, **kwargs)

    def layer_name(self, layer: nn.Module | None) -> str:
        """The layer's full name in the module given, else its class."""
        if layer is None:
            return "the code outside any module"
        if self._module is not None:
            for name, candidate in self._module.named_modules():
                if candidate is layer:
                    return name or type(layer).__name__
        return type(layer).__name__

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Translate autograd's errors about missing derivatives: name the operator, the layer and the way out."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, HigherOrderError) or (operator := _operator_without_derivative(str(error))) is None:
                raise
            caller = next((m for name, m in self._first_caller.items() if _same_operator(name, operator)), None)
            where = f" (called in {self.layer_name(caller)})" if caller is not None else ""
            raise HigherOrderError(
                f"The operator {operator}{where} cannot be differentiated three times, as a curvature penalty needs. "
                "Replace it by one that can, or keep it out of the penalty's way: choose with `parameters=` "
                "only parameters whose gradient does not pass through it."
            ) from error


def refuse_lost_derivatives(value: Tensor) -> None:
    """Look through the graph of a penalty for custom functions marked ``@once_differentiable``.

    Their second derivative is not an error in ``torch.autograd.grad``: the branch is pruned before it could raise, and
    the penalty silently lacks that part of the Hessian.

    Raises:
        HigherOrderError: there is one; it is named.
    """
    todo, seen, lost, custom = [value.grad_fn], set(), False, set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        lost |= node.name().endswith("autograd::Error") or type(node).__name__ == "Error"
        function = getattr(node, "_forward_cls", None)
        if function is not None and hasattr(function.backward, "__wrapped__"):
            custom.add(function.__qualname__)
        todo.extend(following for following, _ in node.next_functions)
    if lost:
        named = f" ({', '.join(sorted(custom))})" if custom else ""
        raise HigherOrderError(
            f"The loss passes through a torch.autograd.Function whose backward is marked @once_differentiable{named}. "
            "PyTorch would leave its part of the Hessian out of the penalty without an error. Write its backward "
            "with differentiable operations and remove the mark; `lightning_hessian.verify` names the layer."
        )


def _refuse_layers(module: nn.Module) -> None:
    several = torch.distributed.is_available() and torch.distributed.is_initialized() and (
        torch.distributed.get_world_size() > 1
    )  # fmt: skip
    for name, layer in module.named_modules():
        if isinstance(layer, nn.SyncBatchNorm) and several and layer.training:
            raise HigherOrderError(
                f"The layer {name!r} is a SyncBatchNorm, which has no double backward (pytorch#61222), so no curvature "
                "penalty can be differentiated through it. Train with `sync_batchnorm=False` (each process then "
                "normalises by its own batch), or use GroupNorm."
            )
        if isinstance(layer, torch.jit.ScriptModule):
            raise HigherOrderError(
                f"The layer {name!r} is TorchScript, whose fused operators cannot be exchanged for ones that are "
                "differentiable three times. Use the Python module it was made from."
            )


@contextmanager
def _checkpoints_in_higher_order(context: higher_order) -> Iterator[None]:
    """Recompute checkpointed regions as they ran, whenever and in whichever thread; refuse reentrant ones."""
    checkpoint = torch.utils.checkpoint
    # Which of the two names exists, and which calls which, depends on the version.
    names = [
        name
        for name in ("_checkpoint_without_reentrant_generator", "_checkpoint_without_reentrant_generator_impl")
        if hasattr(checkpoint, name)
    ]

    def in_higher_order(generator: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(generator)
        def wrapped(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            def recomputed(*inputs: Any, **keywords: Any) -> Any:
                with higher_order():
                    return function(*inputs, **keywords)

            return generator(recomputed, *args, **kwargs)

        return wrapped

    class Refused:
        @staticmethod
        def apply(*_: Any) -> Any:
            raise HigherOrderError(
                f"{context.layer_name(_calling_module())} uses a reentrant checkpoint, which cannot be differentiated "
                "twice (pytorch#102223). Pass `use_reentrant=False` to torch.utils.checkpoint.checkpoint."
            )

    patched: dict[str, Any] = {name: in_higher_order(getattr(checkpoint, name)) for name in names}
    patched["CheckpointFunction"] = Refused
    originals = {name: getattr(checkpoint, name) for name in patched}
    try:
        for name, replacement in patched.items():
            setattr(checkpoint, name, replacement)
        yield
    finally:
        for name, original in originals.items():
            setattr(checkpoint, name, original)


def _calling_module() -> nn.Module | None:
    """The innermost module whose method is on the Python stack."""
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            return owner
        frame = frame.f_back  # type: ignore[assignment]
    return None


_MISSING_DERIVATIVE = (
    r"derivative for '?(?:aten::)?(\w+)'? is not implemented",
    r"(\w+):? does not support 3rd\+ order",
    r"(\w+) is not differentiable twice",
)


def _operator_without_derivative(message: str) -> str | None:
    for pattern in _MISSING_DERIVATIVE:
        if found := re.search(pattern, message, re.IGNORECASE):
            return found.group(1).strip("_")
    return None


def _same_operator(called: str, missing: str) -> bool:
    bare = missing.removesuffix("_backward")
    return called.strip("_") == bare or bare.startswith(called.strip("_"))
