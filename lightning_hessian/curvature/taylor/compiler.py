"""Taylor mode and ``torch.compile``: what the compiler is to trace into a graph, and what it is to leave alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from types import CodeType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_hessian.curvature.errors import HigherOrderError

_comptime: Any = None
"""Runs a function while the compiler traces its call. None until the compiler is there."""


def never_compile_alone(code: CodeType) -> None:
    """Run a function as it is wherever the compiler does not trace it as a part of another one, with all that it calls.

    In code that a graph break leaves to Python, the mode is called for each operation. The compiler would take it for
    a function of its own. It could not tell the operations apart, and would run one in the place of another.
    """
    frames: Any = torch._C._dynamo.eval_frame
    if not hasattr(frames, "_FrameAction"):  # older versions of PyTorch
        frames.skip_code(code)
        return
    skip = frames._FrameAction.SKIP
    frames.set_code_exec_strategy(code, frames._FrameExecStrategy(skip, skip))


_TRACES_MODES = torch.__version__ >= (2, 11)  # type: ignore[operator]


def compiled_part(module: nn.Module) -> str | None:
    """The name of a part of the network that is compiled; None if there is none."""
    if "torch._dynamo" not in sys.modules:
        return None
    # By `module.compile()`, by Lightning, and by `torch.compile(module)`.
    names = ("_compiled_call_impl", "_compiler_ctx", "_orig_mod")
    for path, part in module.named_modules():
        if any(getattr(part, name, None) is not None for name in names):
            return path or type(part).__name__
    return None


def refuse_old_compilers(module: nn.Module) -> None:
    """Refuse a compiled network where the compiler cannot trace the mode.

    Raises:
        HigherOrderError: PyTorch is older than 2.11, and a part of the network is compiled.
    """
    if not _TRACES_MODES and (name := compiled_part(module)) is not None:
        raise HigherOrderError(
            f"The layer {name!r} is compiled, and Taylor coefficients pass compiled networks from PyTorch 2.11 on "
            f"(this is {torch.__version__}). Update it, or use method='two_pass', or method='autograd', which runs the "
            "network eagerly."
        )


def show_all_operations() -> None:
    """Have the compiler call torch function modes also where it does not by itself, as Python does.

    That is item assignment (``x[i] = y``), what torch.nn.functional calls inside, and functions that PyTorch does not
    list as ones that can be overridden.
    """
    if "torch._dynamo" in sys.modules:  # else nothing is compiled, and importing it takes seconds
        _show_all_operations()


@cache
def _show_all_operations() -> None:
    global _comptime
    from torch._dynamo.comptime import comptime
    from torch._dynamo.symbolic_convert import InstructionTranslator
    from torch._dynamo.variables.tensor import TensorVariable
    from torch._dynamo.variables.torch import get_overridable_functions
    from torch._dynamo.variables.torch_function import can_dispatch_torch_function

    shown: Any = get_overridable_functions()
    shown.update(
        function
        for place in (torch._C._VariableFunctions, torch._C._nn)
        for name in dir(place)
        if callable(function := getattr(place, name)) and not name.startswith("__")
    )
    shown.update(getattr(F, name) for name in _WITHOUT_DISPATCH)
    original = TensorVariable.method___setitem__

    def setitem(self: Any, *args: Any) -> Any:
        *given, key, value = args
        tx = given[0] if given else InstructionTranslator.current_tx()  # older versions of PyTorch do not give it
        if can_dispatch_torch_function(tx, (self, key, value), {}):
            return self.call_method(tx, "__setitem__", [key, value], {})
        return original(self, *args)

    TensorVariable.method___setitem__ = setitem  # type: ignore[method-assign, assignment]
    _comptime = comptime


_WITHOUT_DISPATCH = ("tanh", "sigmoid", "hardsigmoid", "hardswish", "upsample", "upsample_nearest", "upsample_bilinear")


# While the compiler traces, the tensors have no memory and no count of writes that the traced code could read. What
# follows is run on their stand-ins, which have both.


def note_coefficients(x: Tensor) -> None:
    """Coefficients were attached to a tensor."""
    if _comptime is not None:
        _comptime(_note_coefficients)


def note_constant(x: Tensor) -> None:
    """A tensor is a constant, whatever its memory."""
    if _comptime is not None:
        _comptime(_note_constant)


def note_write(x: Tensor) -> None:
    """A tensor was written in place with something that has coefficients."""
    if _comptime is not None:
        _comptime(_note_write)


def check_writes(x: Any) -> None:
    """Refuse tensors among the values that a write in place has passed by."""
    if isinstance(x, Tensor):
        if _comptime is not None:
            _comptime(_check)
    elif isinstance(x, list | tuple):
        for part in x:
            check_writes(part)
    elif isinstance(x, dict):
        for part in x.values():
            check_writes(part)


def _note_coefficients(context: Any) -> None:
    x = context.get_local("x").as_fake()
    x._taylor_version = x._version


def _note_constant(context: Any) -> None:
    x = context.get_local("x").as_fake()
    x._taylor_version, x._taylor_constant = None, x._version


def _note_write(context: Any) -> None:
    local = context.get_local("x")
    x = local.as_fake()
    storage = x.untyped_storage()
    if local.as_proxy().node.op == "placeholder" and x.numel() * x.element_size() < storage.nbytes():
        raise _refused(stale(x))  # a part of a tensor from before a graph break, which may be used after a further one
    _written(x)[storage._cdata] = storage


def _check(context: Any) -> None:
    x = context.get_local("x").as_fake()
    noted = getattr(x, "_taylor_version", None)
    if noted is not None:
        is_stale = noted != x._version
    else:
        is_constant = getattr(x, "_taylor_constant", None) == x._version
        is_stale = not is_constant and x.layout == torch.strided and x.untyped_storage()._cdata in _written(x)
    if is_stale:
        raise _refused(stale(x))


def _written(x: Any) -> dict[int, Any]:
    """The written memory, in this run of the compiler."""
    found: dict[int, Any] = vars(x.fake_mode).setdefault("_taylor_written", {})
    return found


def stale(x: Tensor, layer: Callable[[], str] | None = None) -> HigherOrderError:
    """The error for a tensor whose memory was written through another one."""
    where = "" if layer is None else f" (used in {layer()})"
    return HigherOrderError(
        f"A tensor of shape {tuple(x.shape)}{where} was written in place through another tensor that shares its memory "
        "(a view), so its Taylor coefficients are not known. Write out of place (`x = x + y`), or take the view after "
        "the write. Or use method='autograd'."
    )


def _refused(error: HigherOrderError) -> Exception:
    """The error in a form that the compiler lets pass."""
    from torch._dynamo.exc import TorchRuntimeError

    class Refused(HigherOrderError, TorchRuntimeError):
        pass

    Refused.__name__ = Refused.__qualname__ = HigherOrderError.__name__
    return Refused(str(error))
