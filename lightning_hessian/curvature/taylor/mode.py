"""``taylor_mode()``: every operation inside carries Taylor coefficients along."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from lightning_hessian.curvature import refusals
from lightning_hessian.curvature.checkpoints import checkpoints_recomputed_in
from lightning_hessian.curvature.errors import HigherOrderError
from lightning_hessian.curvature.layers import calling_module, counts_batches, layer_name
from lightning_hessian.curvature.norms import statistics_at_rest
from lightning_hessian.curvature.replacements import replacement
from lightning_hessian.curvature.sharding import is_dtensor, reshard
from lightning_hessian.curvature.taylor.coefficients import (
    Call,
    Coefficients,
    RuleFunction,
    attach,
    coefficients_of,
    current,
    detach,
    has_coefficients,
    renew,
)
from lightning_hessian.curvature.taylor.compiler import (
    compiled_part,
    never_compile_alone,
    refuse_old_compilers,
    show_all_operations,
)
from lightning_hessian.curvature.taylor.custom_functions import custom_function
from lightning_hessian.curvature.taylor.fallback import BODY_LIST, body_number, by_forward_mode
from lightning_hessian.curvature.taylor.in_place import Writes, is_in_place
from lightning_hessian.curvature.taylor.rules import FOR_COMPLEX, IS_CONSTANT, NO_RULE, RULE_LIST, rule_number
from lightning_hessian.curvature.taylor.sharded import ShardedParameters, passed_through


class taylor_mode(TorchFunctionMode):
    r"""Context manager: the forward pass inside computes Taylor coefficients along theta(t) = theta + t v_p.

    .. math:: L(\theta + t v) = L_0 + t L_1 + \tfrac{t^2}{2} L_2 + O(t^3), \qquad L_1 = g'v, \quad L_2 = v'Hv

    Each tensor x that depends on theta is an ordinary tensor to the code inside, and has its coefficients beside it.
    Several directions share x_0, and x_2 is summed over them: P directions cost 2 + P streams. The second coefficient
    of the loss is an ordinary scalar with an ordinary graph. One backward pass gives its exact gradient.

    Functions with a rule (linear, bilinear, element-wise, norms, softmax, attention, losses, gathers) use it. All
    others are differentiated by two nested ``torch.func.jvp``. A function without forward-mode derivatives is refused
    by name.

    Args:
        tensors: the parameters theta, part by part; leaves that require a gradient.
        directions: the v_p (or ``scale`` v_p), each in parts of the tensors' shapes; None for a part that is zero.
        module: the model. Sharded parameters need it; it names layers in errors.
        scale: the directions' factor. With a small one the coefficients stay in float16's range.

    Raises:
        HigherOrderError: in the forward pass, for an operation without rule and without forward-mode derivatives, or a
            write in place that the coefficients of other tensors would miss.

    Source:
        Griewank and Walther 2008, "Evaluating Derivatives", chapter 13; several directions at once: Dangel et al. 2025
        (arXiv 2505.13644).

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> with taylor_mode([w], [[torch.ones(2)]]) as mode:
        ...     loss = (w**3).sum()
        >>> mode.second(loss).item()  # 6 w_1 + 6 w_2
        18.0
        >>> torch.autograd.grad(mode.second(loss), w)[0]
        tensor([6., 6.])
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        directions: Sequence[Sequence[Tensor | None]],
        module: nn.Module | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.directions = len(directions)
        self.tensors = list(tensors)
        self.parts = [tuple(v[i] for v in directions) for i in range(len(self.tensors))]
        self._module = module
        self._scale = scale
        self._sharded = ShardedParameters(module, self.tensors, self.parts)
        self._recomputes = False
        self._writes = Writes()
        self._stack = ExitStack()

    def __enter__(self) -> taylor_mode:
        if self._module is not None:
            refusals.refuse_layers(self._module)
            refuse_old_compilers(self._module)
        show_all_operations()
        with ExitStack() as stack:
            stack.enter_context(checkpoints_recomputed_in(self._module, self._recomputing))
            stack.enter_context(self._active())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()
        if self._module is not None:
            reshard(self._module)

    @contextmanager
    def _active(self) -> Iterator[None]:
        """Inside, the parameters have their coefficients, and operations carry coefficients along."""
        with ExitStack() as stack:
            drops = any(part is None for parts in self.parts for part in parts)
            fill = drops and self._module is not None and compiled_part(self._module) is not None
            for tensor, parts in zip(self.tensors, self.parts, strict=True):
                if not is_dtensor(tensor):
                    if fill:  # which parts are zero changes from step to step, and would be compiled in
                        parts = tuple(torch.zeros_like(tensor) if part is None else part for part in parts)
                    attach(Coefficients(tensor, parts, None))
                    stack.callback(detach, tensor)
            stack.enter_context(self._sharded.active(self.directions))
            stack.enter_context(_custom_functions_seen(self))
            stack.enter_context(self._again())
            yield

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        """Inside, a checkpointed region runs again, in the backward pass: its batch was counted already."""
        before, self._recomputes = self._recomputes, True
        try:
            with statistics_at_rest(), self._active():
                yield
        finally:
            self._recomputes = before

    def first(self, loss: Tensor) -> tuple[Tensor | None, ...]:
        """The loss's first coefficient for each direction as it was given; None is zero."""
        return coefficients_of(loss, self.directions).first

    def second(self, loss: Tensor) -> Tensor:
        """sum_p v_p'Hv_p, with its graph."""
        second = coefficients_of(loss, self.directions).second
        return torch.zeros_like(loss) if second is None else second.reshape(loss.shape) / self._scale**2

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._recomputes and func is Tensor.add_ and counts_batches(args[0]):
            return args[0]
        number = rule_number(func)
        if not torch.compiler.is_compiling() and number != IS_CONSTANT and _in_a_transform((args, kwargs)):
            raise HigherOrderError(
                f"{self._layer()} runs inside a transform (torch.vmap, torch.func, forward-mode derivatives), which "
                "Taylor coefficients cannot pass. Write the batch dimension out, or use method='autograd'."
            )
        if number == IS_CONSTANT or not (has_coefficients(args) or has_coefficients(tuple(kwargs.values()))):
            self._writes.check((args, kwargs), self._layer)
            kept = [] if torch.is_grad_enabled() else current(args)
            result = func(*args, **kwargs)
            for x in kept:
                renew(x)
            if func is Tensor.detach:
                self._writes.mark_constant(result)
            return result
        if not torch.is_grad_enabled():
            kept = current((*args, *kwargs.values()))
            result = func(*args, **kwargs)
            for x in kept:
                renew(x)
            if not has_coefficients(result):
                self._writes.mark_constant(result)
            return result
        name = getattr(func, "__name__", "")
        if name == "__set__":
            return func(*args)
        call = Call(func, args, kwargs, self.directions, self._again, self._layer)
        if name == "__get__":
            return func(*args) if number == NO_RULE else self._attached(RULE_LIST[number](call))
        self._writes.check((args, kwargs), self._layer)
        if number == NO_RULE and (wrong := _what_is_wrong(call)) is not None:
            raise HigherOrderError(f"{self._layer()} {wrong}")
        if is_in_place(call):
            return self._writes.write(call, self._coefficients)
        return self._attached(self._coefficients(call))

    def _layer(self) -> str:
        """The name of the layer that is running."""
        return layer_name(self._module, calling_module())

    def _coefficients(self, call: Call) -> Any:
        """What a call returns, tensors as coefficients."""
        number = rule_number(call.function)
        if number == IS_CONSTANT:
            return Coefficients(call.function(*call.args, **call.kwargs), (None,) * self.directions, None)
        if number != NO_RULE:
            if number not in FOR_COMPLEX and _has_complex((*call.args, *call.kwargs.values())):
                return by_forward_mode(call)
            found = RULE_LIST[number](call)
            if found is not NotImplemented:
                return found
        if (primitive := replacement(call.function, call.args, call.kwargs, 3)) is not None:
            with self._again():
                return primitive(*call.args, **call.kwargs)
        if (body := body_number(call.function)) >= 0:
            with self._again():
                return BODY_LIST[body](*call.args, **call.kwargs)
        return by_forward_mode(call)

    @contextmanager
    def _again(self) -> Iterator[None]:
        """Inside, operations carry coefficients along, also while one is taken apart."""
        super().__enter__()
        try:
            yield
        finally:
            super().__exit__(None, None, None)

    def _attached(self, result: Any) -> Any:
        if isinstance(result, Coefficients):
            return attach(result)
        if isinstance(result, list | tuple):
            parts = [self._attached(part) for part in result]
            return type(result)(*parts) if hasattr(result, "_fields") else type(result)(parts)
        return result


never_compile_alone(taylor_mode.__torch_function__.__code__)


def _in_a_transform(values: Any) -> bool:
    """Whether a tensor that has coefficients, or wraps one that has, is used inside a transform of PyTorch."""
    if torch._C._functorch.peek_interpreter_stack() is None and forward_ad._current_level < 0:
        return False
    if isinstance(values, Tensor):
        while torch._C._functorch.is_functorch_wrapped_tensor(values):
            values = torch._C._functorch.get_unwrapped(values)
        return has_coefficients(values)
    parts = values.values() if isinstance(values, dict) else values if isinstance(values, list | tuple) else ()
    return any(map(_in_a_transform, parts))


def _what_is_wrong(call: Call) -> str | None:
    check = refusals.CALLS.get(call.function)
    return None if check is None else check(*call.args, **call.kwargs)


def _has_complex(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_complex()
    return isinstance(value, list | tuple) and any(map(_has_complex, value))


@contextmanager
def _custom_functions_seen(mode: taylor_mode) -> Iterator[None]:
    """Custom autograd functions pass no torch function mode: see their calls by ``apply``."""
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        run = original.__get__(None, cls)
        if not has_coefficients(args) or not torch.is_grad_enabled() or issubclass(cls, RuleFunction):
            return run(*args, **kwargs)
        if cls.__module__.startswith("torch._functorch"):  # a compiled graph, which carries the coefficients inside
            return run(*args, **kwargs)
        if cls.__module__.startswith("torch.distributed.fsdp"):
            return passed_through(run, args, mode.directions)
        return mode._attached(custom_function(Call(run, args, kwargs, mode.directions, mode._again, mode._layer), cls))

    never_compile_alone(apply.__code__)
    torch.autograd.Function.apply = classmethod(apply)
    try:
        yield
    finally:
        torch.autograd.Function.apply = original
