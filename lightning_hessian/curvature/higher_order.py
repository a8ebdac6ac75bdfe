"""``higher_order()``: make the forward pass inside differentiable three times."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from lightning_hessian.curvature import activations, norms, refusals, twice
from lightning_hessian.curvature.checkpoints import checkpoints_recomputed_in
from lightning_hessian.curvature.errors import HigherOrderError, derivatives_explained, nested_tensor_error
from lightning_hessian.curvature.layers import calling_module, counts_batches, layer_name
from lightning_hessian.curvature.replacements import replacement

# PyTorch's versions are correct, but slow when differentiated three times.
_FASTER: dict[Any, Callable[..., Tensor]] = {F.softplus: activations.softplus, F.silu: activations.silu}
# Faster still up to the second derivative.
_FASTER_TWICE = _FASTER | twice.FASTER

# cuDNN's kernels have no double backward. PyTorch's native cells do.
_RECURRENT = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}


class higher_order(TorchFunctionMode):
    """Context manager: make every operation of the forward pass inside differentiable three times, or twice.

    Training on a curvature penalty differentiates the loss three times: for the gradient, for the Hessian-vector
    product, and for the penalty's own gradient. Inside this context

    - batch, layer, instance and RMS norm and the fused weight norm run as primitives. The fused norm kernels have
      wrong third derivatives (pytorch#175754 and #186256), the fused weight norm a wrong second one. Running
      statistics update as in the fused operator;
    - hardsigmoid runs as primitives: its kernel has no double backward;
    - attention runs on the math backend (pytorch#116350), recurrent layers without cuDNN (pytorch#5261);
    - compiled modules run eagerly (pytorch#91469);
    - checkpointed regions (``use_reentrant=False``) are recomputed in the same way.

    Only the forward pass needs the context. Call ``torch.autograd.grad`` and ``backward`` inside or outside.

    Args:
        module: the model. With it, unsupported layers (SyncBatchNorm across processes, spectral norm in training
            mode, sparse embeddings, TorchScript) raise before anything runs, and errors use the layers' full names.
        derivatives: how often the loss will be differentiated. Use 3 to train on its Hessian, and 2 to measure the
            Hessian or to train on first derivatives. With 2 the fused layer norm is correct, and faster than
            primitives; batch norm, convolutions and SiLU have faster derivatives of their gradients.

    Attributes:
        replaced: maps the name of each layer whose fused operator was replaced to the operator's name.
        takes_gradients: whether the forward pass computed a gradient itself (forces, physics-informed losses). With
            ``derivatives=2``, fused layer norms before it are then wrong, and the operators refuse them. The
            context's next forward pass replaces them.

    Raises:
        HigherOrderError: on entry, for a layer of ``module`` that is not differentiable often enough; in the forward
            pass, at a reentrant checkpoint or a call to a fused kernel by its native name.

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
        self.takes_gradients = False
        self._recomputes = False
        self._first_caller: dict[str, nn.Module] = {}
        self._stack = ExitStack()

    def __enter__(self) -> higher_order:
        if self._module is not None and not self._recomputes:
            refusals.refuse_layers(self._module)
        with ExitStack() as stack:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            # Importing the compiler takes seconds. If it is not imported yet, nothing is compiled.
            if "torch._dynamo" in sys.modules:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(checkpoints_recomputed_in(self._module, self._recomputing))
            super().__enter__()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        super().__exit__(kind, error, trace)
        self._stack.close()
        if isinstance(error, Exception) and (operator := _control_flow_in(trace)) is not None:
            raise refusals.control_flow_error(operator, error) from error

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return func(*args, **kwargs)
        if func is torch.autograd.grad:
            self.takes_gradients |= bool(kwargs.get("create_graph"))
        # A gradient computed in the forward pass adds one derivative.
        derivatives = 3 if self.takes_gradients or _transformed() else self.derivatives
        if (primitive := replacement(func, args, kwargs, derivatives)) is not None:
            layer = self.layer_name(calling_module())
            if args and isinstance(args[0], Tensor) and args[0].is_nested:
                raise nested_tensor_error(f"{name} in {layer}")
            self.replaced[layer] = name.strip("_")
            with norms.statistics_at_rest() if self._recomputes else nullcontext():
                return primitive(*args, **kwargs)
        faster_ones = _FASTER if derivatives > 2 else _FASTER_TWICE
        if (faster := faster_ones.get(func)) is not None and _plain(args):
            return faster(*args, **kwargs)
        if self._recomputes and func is Tensor.add_ and counts_batches(args[0]):
            return args[0]
        if (check := refusals.CALLS.get(func)) is not None and (wrong := check(*args, **kwargs)) is not None:
            raise HigherOrderError(f"{self.layer_name(calling_module())} {wrong}")
        if name not in self._first_caller and (caller := calling_module()) is not None:
            self._first_caller[name] = caller
        with torch.backends.cudnn.flags(enabled=False) if func in _RECURRENT else nullcontext():
            return func(*args, **kwargs)

    def _recomputing(self) -> higher_order:
        """Return a context for recomputing a part of the forward pass. It shares its records with this one."""
        again = higher_order(derivatives=self.derivatives)
        again._module, again.replaced, again._first_caller = self._module, self.replaced, self._first_caller
        again.takes_gradients, again._recomputes = self.takes_gradients, True
        return again

    def layer_name(self, layer: nn.Module | None) -> str:
        """Return the layer's full name in ``module``, or else its class name."""
        return layer_name(self._module, layer)

    def explained(self) -> AbstractContextManager[None]:
        """Translate autograd's errors about missing derivatives. The new error names the operator, layer and remedy."""
        return derivatives_explained(self._caller_of, {2: "two times,", 3: "three times,"}[self.derivatives])

    def _caller_of(self, operator: str) -> str | None:
        called = [name for name in self._first_caller if _same_operator(name, operator)]
        return self.layer_name(self._first_caller[max(called, key=len)]) if called else None


def _plain(args: Any) -> bool:
    """Return whether the first argument is an ordinary real tensor, without autocast, vmap, jvp or the like."""
    if not args or type(args[0]) is not Tensor or torch.is_autocast_enabled(args[0].device.type):
        return False
    real = not args[0].is_complex() and not args[0].is_nested
    return real and not _transformed() and forward_ad.unpack_dual(args[0]).tangent is None


def _transformed() -> bool:
    """Return whether vmap, jvp, grad or forward-mode differentiation is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


_CONTROL_FLOW = {"associative_scan", "cond", "map", "scan", "while_loop"}


def _control_flow_in(trace: TracebackType | None) -> str | None:
    """Return the control-flow operator (``torch.cond``, ...) that a traceback passes through."""
    while trace is not None:
        module = trace.tb_frame.f_globals.get("__name__", "")
        package, _, name = module.rpartition(".")
        if package == "torch._higher_order_ops" and name in _CONTROL_FLOW:
            return name
        trace = trace.tb_next
    return None


def _same_operator(called: str, missing: str) -> bool:
    # `cdist` matches `_cdist_backward`. The caller prefers the longest match: `embedding_bag` before `embedding`.
    bare = called.strip("_")
    return bool(bare) and missing.startswith(bare)
