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
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.overrides import TorchFunctionMode

from lightning_hessian.curvature import activations, norms
from lightning_hessian.curvature.graph import nodes


class HigherOrderError(RuntimeError):
    """An operator or a layer cannot be differentiated as often as a curvature penalty needs."""


_OTHERWISE = "As a penalty, HessianTrace(method='two_pass') takes it as it is: it needs ordinary backward passes only."


def _batch_norm(x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float,
                cudnn_enabled: bool = True) -> Tensor:  # fmt: skip
    return norms.batch_norm(x, mean, var, weight, bias, training, momentum, eps)


def _instance_norm(x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, use_input_stats: bool, momentum: float,
                   eps: float, cudnn_enabled: bool = True) -> Tensor:  # fmt: skip
    return norms.instance_norm(x, mean, var, weight, bias, use_input_stats, momentum, eps)


def _layer_norm(x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5,
                cudnn_enable: bool = True) -> Tensor:  # fmt: skip
    return norms.layer_norm(x, shape, weight, bias, eps)


def _hardsigmoid(x: Tensor, inplace: bool = False) -> Tensor:
    return (x + 3).clamp(0, 6) / 6  # the fused one has no double backward


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
    F.hardsigmoid: _hardsigmoid,
}

# Sound up to the second derivative, and faster there than as primitives.
_SOUND_TWICE = {F.layer_norm, torch.layer_norm}

# Right as they are, and slow when differentiated three times.
_FASTER: dict[Any, Callable[..., Tensor]] = {F.softplus: activations.softplus, F.silu: activations.silu}

# Entry points to the fused kernels that return the statistics too: silently wrong, and nobody needs them by name.
_REFUSED = {
    torch.native_layer_norm: "torch.nn.functional.layer_norm",
    torch.native_batch_norm: "torch.nn.functional.batch_norm",
}

# cuDNN's kernels have no double backward; PyTorch's own cells have.
_RECURRENT = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}


class higher_order(TorchFunctionMode):
    """Context manager: every operation of the forward pass inside is differentiable three times, or twice.

    Training on a curvature penalty differentiates the loss three times: for the gradient, for the Hessian-vector
    product, and for the penalty's own gradient. Inside this context

    - batch, layer, instance and RMS norm and the fused weight norm run as primitives (the fused kernels have wrong
      third derivatives, pytorch#175754 and #186256; the fused weight norm a wrong second one); running statistics
      move as in the fused operator; so does hardsigmoid, whose kernel has no double backward;
    - attention runs on the math backend (pytorch#116350), recurrent layers without cuDNN (pytorch#5261);
    - compiled modules run eagerly (pytorch#91469);
    - checkpointed regions (``use_reentrant=False``) are recomputed in the same way.

    Only the forward pass needs the context; call ``torch.autograd.grad`` and ``backward`` inside or outside.

    Args:
        module: the model. Layers that cannot be made right (SyncBatchNorm across processes, spectral norm in training
            mode, sparse embeddings, TorchScript) are then found before anything runs, and errors give layers their
            full names.
        derivatives: how often the loss will be differentiated: 3 to train on its Hessian; 2 to measure that, or to
            train on first derivatives, where the fused layer norm is right, and faster than primitives.

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

    def __init__(self, module: nn.Module | None = None, derivatives: int = 3) -> None:
        super().__init__()
        self.replaced: dict[str, str] = {}
        self.derivatives = derivatives
        self._module = module
        self._recomputes = False
        self._first_caller: dict[str, nn.Module] = {}
        self._stack = ExitStack()

    def __enter__(self) -> higher_order:
        if self._module is not None and not self._recomputes:
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
        sound = self.derivatives < 3 and func in _SOUND_TWICE
        if not sound and (primitive := _REPLACED.get(func)) is not None:
            self.replaced[self.layer_name(_calling_module())] = name.lstrip("_")
            with norms.statistics_at_rest() if self._recomputes else nullcontext():
                return primitive(*args, **kwargs)
        if (faster := _FASTER.get(func)) is not None and _plain(args):
            return faster(*args, **kwargs)
        if self._recomputes and func is Tensor.add_ and _counts_batches(args[0]):
            return args[0]
        if func in _REFUSED:
            raise HigherOrderError(
                f"{self.layer_name(_calling_module())} calls torch.{name}, whose third derivative is silently wrong, "
                f"so a curvature penalty would train on a wrong gradient. Call {_REFUSED[func]} instead."
            )
        if name not in self._first_caller and (caller := _calling_module()) is not None:
            self._first_caller[name] = caller
        with torch.backends.cudnn.flags(enabled=False) if func in _RECURRENT else nullcontext():
            return func(*args, **kwargs)

    def _recomputing(self) -> higher_order:
        """A context in which a part of the forward pass is run again; it reports to this one."""
        again = higher_order(derivatives=self.derivatives)
        again._module, again.replaced, again._first_caller = self._module, self.replaced, self._first_caller
        again._recomputes = True
        return again

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
            called = [name for name in self._first_caller if _same_operator(name, operator)]
            caller = self._first_caller[max(called, key=len)] if called else None
            times = {2: "two", 3: "three"}[self.derivatives]
            where = f" (called in {self.layer_name(caller)})" if caller is not None else ""
            raise HigherOrderError(
                f"The operator {operator}{where} cannot be differentiated {times} times, as curvature needs. Replace "
                "it by one that can, or keep it out of the way: choose with `parameters=` only parameters whose "
                f"gradient does not pass through it. {_OTHERWISE}"
            ) from error


# Nodes of fused kernels whose third derivative is wrong, and of the fused weight norm, whose second one is.
_FUSED_NORM = re.compile(r"(Layer|Batch|Rms)_?Norm\w*Backward", re.IGNORECASE)
_FUSED_WEIGHT_NORM = re.compile(r"WeightNorm\w*Backward", re.IGNORECASE)


def refuse_unsound_graph(loss: Tensor, derivatives: int = 3) -> None:
    """Look through the graph of a loss for operators whose higher derivatives are silently wrong or left out.

    However they got there: around ``higher_order()``, by TorchScript, by ``torch.ops``. A function marked
    ``@once_differentiable`` is no error in ``torch.autograd.grad``: its branch is pruned before it could raise, and
    the Hessian silently lacks that part.

    Args:
        loss: a scalar with its graph.
        derivatives: how many will be taken: 2 to measure curvature, 3 to train on it.

    Raises:
        HigherOrderError: there is one; it is named.
    """
    for node in nodes(loss):
        name = node.name()
        function = getattr(node, "_forward_cls", None)  # of a custom torch.autograd.Function
        fused = _FUSED_WEIGHT_NORM.search(name) or (derivatives > 2 and _FUSED_NORM.search(name))
        if fused and function is None:
            raise HigherOrderError(
                f"The loss passes through the fused kernel of {name}, whose higher derivatives are silently wrong, and "
                "so would the curvature be. Compute the loss inside `with higher_order():`, and call the layer from "
                "torch.nn or torch.nn.functional there, not by TorchScript or torch.ops. "
                "`lightning_hessian.verify` names the layer."
            )
        if function is not None and _once_differentiable(function):
            raise HigherOrderError(
                f"The loss passes through {function.__qualname__}, whose backward is marked @once_differentiable. "
                "PyTorch would leave its part of the Hessian out without an error. Write its backward with "
                "differentiable operations and remove the mark. `lightning_hessian.verify` names the layer."
            )


def _once_differentiable(function: Any) -> bool:
    return getattr(function.backward, "__globals__", {}).get("__name__") == "torch.autograd.function" and hasattr(
        function.backward, "__wrapped__"
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
                f"normalises by its own batch), or use GroupNorm. {_OTHERWISE}"
            )
        if layer.training and _spectral_norm(layer):
            raise HigherOrderError(
                f"The layer {name!r} is a spectral norm in training mode: each forward pass moves the vectors of its "
                "power iteration and treats them as constants, so the loss is not the function that its derivatives "
                "belong to. Call `.eval()` on this layer after a warm-up, or use weight norm."
            )
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.sparse:
            raise HigherOrderError(
                f"The layer {name!r} has sparse gradients, which have no double backward. Pass sparse=False."
            )
        if isinstance(layer, torch.jit.ScriptModule):
            raise HigherOrderError(
                f"The layer {name!r} is TorchScript, whose fused operators cannot be exchanged for ones that are "
                f"differentiable three times. Use the Python module it was made from. {_OTHERWISE}"
            )


def _spectral_norm(layer: nn.Module) -> bool:
    hooks = layer._forward_pre_hooks.values()
    return isinstance(layer, _SpectralNorm) or any(isinstance(hook, SpectralNorm) for hook in hooks)


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
            # The generator calls this to recompute; the first run is the caller's own.
            def recomputed(*inputs: Any, **keywords: Any) -> Any:
                with context._recomputing():
                    return function(*inputs, **keywords)

            return generator(recomputed, *args, **kwargs)

        return wrapped

    class Refused:
        @staticmethod
        def apply(*_: Any) -> Any:
            raise HigherOrderError(
                f"{context.layer_name(_calling_module())} uses a reentrant checkpoint, which cannot be differentiated "
                f"twice (pytorch#102223). Pass `use_reentrant=False` to torch.utils.checkpoint.checkpoint. {_OTHERWISE}"
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


def _plain(args: Any) -> bool:
    """Whether the first argument is an ordinary tensor (not in vmap, jvp or the like) whose type autocast leaves."""
    if not args or type(args[0]) is not Tensor or torch.is_autocast_enabled(args[0].device.type):
        return False
    transformed = torch._C._functorch.is_functorch_wrapped_tensor(args[0])
    return not transformed and forward_ad.unpack_dual(args[0]).tangent is None


def _counts_batches(tensor: Tensor) -> bool:
    layer = _calling_module()
    return isinstance(layer, _NormBase) and tensor is layer.num_batches_tracked


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
    # `cdist` and `_cdist_backward`; the longest name that fits is the one, `embedding_bag` before `embedding`.
    bare = called.strip("_")
    return bool(bare) and missing.startswith(bare)
