"""Element-wise functions: y1 = f'(x) x1, y2 = f''(x) x1^2 + f'(x) x2, and the backward pass needs f'''."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_hessian.curvature.taylor.coefficients import Coefficients, RuleFunction, add, nonzero, sum_of_products

Derivatives = Callable[[Tensor], Iterable[Tensor]]
"""x -> f(x), f'(x), f''(x), f'''(x), one after the other."""


def elementwise(derivatives: Derivatives, x: Coefficients) -> Coefficients:
    """The coefficients of f(x), f element by element."""
    present = [x1 for x1 in x.first if x1 is not None]
    if torch.compiler.is_compiling():  # the compiler fuses, and saves what it finds best
        y0, f1, f2, _ = derivatives(x.value)
        squares = add(*(x1 * x1 for x1 in present))
        second = add(None if x.second is None else f1 * x.second, None if squares is None else f2 * squares)
        return Coefficients(y0, tuple(None if x1 is None else f1 * x1 for x1 in x.first), second)
    y0, y2, *rest = _Elementwise.apply(derivatives, x.value, x.second, *present)
    ys = iter(rest)
    return Coefficients(y0, tuple(None if x1 is None else next(ys) for x1 in x.first), y2)


def with_pole(derivatives: Derivatives, x: Coefficients) -> Coefficients:
    """The same for an f whose derivatives are infinite at 0: an x that rests there has zero coefficients, not 0 * inf.

    The value keeps its own derivative, as autograd has it.
    """
    rests = x.value == 0
    for part in (*x.first, x.second):
        if part is not None:
            rests = rests & (part == 0)
    elsewhere = elementwise(derivatives, x._replace(value=torch.where(rests, 1, x.value)))
    return Coefficients(next(iter(derivatives(x.value))), *elsewhere[1:])


class _Elementwise(RuleFunction):
    """Saves x0, x1 and x2 only; the derivatives are computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, derivatives: Derivatives, x0: Tensor, x2: Tensor | None, *x1: Tensor) -> Any:
        ctx.derivatives = derivatives
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x0, x2, *x1)

        def coefficients(x0: Tensor, x2: Tensor | None, *x1: Tensor) -> list[Tensor | None]:
            y0, f1, f2 = islice(derivatives(x0), 3)
            return [y0, sum_of_products((f1, x2), (f2, _sum_of_squares(x1))), *(f1 * x for x in x1)]

        return tuple(_in_blocks(coefficients, x0, x2, *x1))

    @staticmethod
    def backward(ctx: Any, g0: Tensor | None, g2: Tensor | None, *g1: Tensor | None) -> Any:
        x0, x2, *x1 = ctx.saved_tensors
        n = len(x1)

        def gradients(x0: Tensor, x2: Tensor | None, g0: Tensor | None, g2: Tensor | None, *both: Any) -> Any:
            x1, g1 = both[:n], both[n:]
            _, f1, f2, f3 = ctx.derivatives(x0)
            to_f1 = sum_of_products(*zip(g1, x1, strict=True), (g2, x2))
            to_f2 = sum_of_products((g2, _sum_of_squares(x1)))
            d0 = sum_of_products((g0, f1), (to_f1, f2), (to_f2, f3))
            d2 = None if x2 is None else sum_of_products((g2, f1))
            twice = None if g2 is None or not x1 else 2 * g2 * f2
            return [d0, d2, *(sum_of_products((g, f1), (twice, x)) for g, x in zip(g1, x1, strict=True))]

        return None, *_in_blocks(gradients, x0, x2, nonzero(g0), nonzero(g2), *x1, *map(nonzero, g1))


_BLOCK = 2**16
"""Entries of a block that stays, with all intermediate results, in a processor's cache."""


def _in_blocks(f: Callable[..., Sequence[Tensor | None]], *tensors: Tensor | None) -> Sequence[Tensor | None]:
    """f(*tensors), element by element: on a CPU block by block, because fresh memory for results costs more than f."""
    present = [tensor for tensor in tensors if tensor is not None]
    size, shape = present[0].numel(), present[0].shape
    if size < 4 * _BLOCK or any(t.device.type != "cpu" or t.shape != shape or not t.is_contiguous() for t in present):
        return f(*tensors)
    flat = [None if tensor is None else tensor.view(-1) for tensor in tensors]
    found: list[Tensor | None] = []
    for start in range(0, size, _BLOCK):
        block = slice(start, start + _BLOCK)
        results = f(*(None if tensor is None else tensor[block] for tensor in flat))
        found = found or [None if part is None else part.new_empty(size) for part in results]
        for whole, part in zip(found, results, strict=True):
            if whole is not None and part is not None:
                whole[block] = part
    return [None if whole is None else whole.view(shape) for whole in found]


def _sum_of_squares(x1: Sequence[Tensor]) -> Tensor | None:
    return sum_of_products(*((x, x) for x in x1))


def _tanh(x: Tensor) -> Iterator[Tensor]:
    y = torch.tanh(x)
    yield y
    yield (f1 := 1 - y * y)
    yield (f2 := -2 * y * f1)
    yield -2 * (f1 * f1 + y * f2)


def _sigmoid(x: Tensor) -> Iterator[Tensor]:
    s = torch.sigmoid(x)
    yield s
    yield (f1 := s * (1 - s))
    t = 1 - 2 * s
    yield f1 * t
    yield f1 * (t * t - 2 * f1)


def _softplus(x: Tensor, beta: float = 1, threshold: float = 20) -> Iterator[Tensor]:
    yield F.softplus(x, beta, threshold)
    s = torch.sigmoid(beta * x).masked_fill(beta * x > threshold, 1)
    yield s
    yield (f2 := beta * s * (1 - s))
    yield beta * f2 * (1 - 2 * s)


def _silu(x: Tensor) -> Iterator[Tensor]:
    s = torch.sigmoid(x)
    yield x * s
    ds = s * (1 - s)
    yield torch.addcmul(s, x, ds)
    t = 1 - 2 * s
    yield ds * (2 + x * t)
    yield ds * (3 * t + x * (t * t - 2 * ds))


def _gelu(x: Tensor) -> Iterator[Tensor]:
    density = torch.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    distribution = torch.erf(x * math.sqrt(0.5)).add_(1).mul_(0.5)
    yield x * distribution
    yield torch.addcmul(distribution, x, density)
    squares = x * x
    yield density * (2 - squares)
    yield density * x * (squares - 4)


def _gelu_tanh(x: Tensor) -> Iterator[Tensor]:
    a, b = math.sqrt(2 / math.pi), 0.044715
    squares = x * x
    u1, u2, u3 = a * (1 + 3 * b * squares), 6 * a * b * x, 6 * a * b
    y, t1, t2, t3 = _tanh(a * (x + b * x * squares))
    # h = tanh(u(x)) and f = x (1 + h) / 2.
    yield x * (1 + y) / 2
    h1 = t1 * u1
    yield (1 + y + x * h1) / 2
    h2 = t2 * u1 * u1 + t1 * u2
    yield h1 + x * h2 / 2
    h3 = t3 * u1 * u1 * u1 + 3 * t2 * u1 * u2 + t1 * u3
    yield 1.5 * h2 + x * h3 / 2


def _exp(x: Tensor) -> Any:
    y = x.exp()
    return y, y, y, y


def _log(x: Tensor) -> Iterator[Tensor]:
    yield x.log()
    yield (r := 1 / x)
    yield -r * r
    yield 2 * r * r * r


def _sin(x: Tensor) -> Any:
    s, c = x.sin(), x.cos()
    return s, c, -s, -c


def _cos(x: Tensor) -> Any:
    s, c = x.sin(), x.cos()
    return c, -s, -c, s


def _reciprocal(x: Tensor) -> Iterator[Tensor]:
    yield (r := 1 / x)
    yield -r * r
    yield 2 * r**3
    yield -6 * r**4


def _erf(x: Tensor) -> Any:
    f1 = torch.exp(-x * x) * (2 / math.sqrt(math.pi))
    f2 = -2 * x * f1
    return x.erf(), f1, f2, -2 * (f1 + x * f2)


def _logsigmoid(x: Tensor) -> Any:
    s = torch.sigmoid(-x)
    f2 = s * (s - 1)
    return F.logsigmoid(x), s, f2, f2 * (2 * s - 1)


def _selu(x: Tensor) -> Any:
    alpha, scale = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946
    return exponential_unit(F.selu, scale * alpha, 1, scale)(x)


def exponential_unit(function: Callable[[Tensor], Tensor], height: float, rate: float, slope: float) -> Derivatives:
    """x -> slope x where x > 0, height (exp(rate x) - 1) elsewhere."""

    def derivatives(x: Tensor) -> Any:
        is_linear = x > 0
        f1 = height * rate * torch.exp(rate * x.masked_fill(is_linear, 0))  # no overflow where it is not used
        f2 = (rate * f1).masked_fill(is_linear, 0)
        return function(x), f1.masked_fill(is_linear, slope), f2, rate * f2

    return derivatives


def _square(x: Tensor) -> Any:
    return x * x, 2 * x, torch.full_like(x, 2.0), torch.zeros_like(x)


def _sqrt(x: Tensor) -> Iterator[Tensor]:
    yield (y := x.sqrt())
    yield (f1 := 0.5 / y)
    yield (f2 := -0.5 * f1 / x)
    yield -1.5 * f2 / x


def _rsqrt(x: Tensor) -> Iterator[Tensor]:
    yield (y := x.rsqrt())
    r = 1 / x
    yield (f1 := -0.5 * y * r)
    yield (f2 := -1.5 * f1 * r)
    yield -2.5 * f2 * r


def without_pole(root: Derivatives) -> Derivatives:
    """A root of a sum of powers: where that is zero the derivatives are zero, as autograd has it for a norm."""

    def derivatives(x: Tensor) -> Iterator[Tensor]:
        is_zero = x == 0
        for part in root(torch.where(is_zero, 1, x)):
            yield torch.where(is_zero, 0, part)

    return derivatives


safe_sqrt = without_pole(_sqrt)


def bounded_log(x: Tensor) -> Any:
    """log x, bounded as in PyTorch's binary cross entropy, and so are its derivatives."""
    f1 = (1 - x) / (x * (1 - x)).clamp_min(1e-12)
    return x.log().clamp_min(-100), f1, -f1 * f1, 2 * f1 * f1 * f1


def bounded_log_of_rest(x: Tensor) -> Any:
    """log (1 - x), likewise."""
    f1 = -x / (x * (1 - x)).clamp_min(1e-12)
    return (1 - x).log().clamp_min(-100), f1, -f1 * f1, 2 * f1 * f1 * f1


def power(exponent: float) -> Derivatives:
    """x -> x^n and its derivatives."""
    n = exponent

    def derivatives(x: Tensor) -> Iterator[Tensor]:
        falling = [1.0, n, n * (n - 1), n * (n - 1) * (n - 2)]
        for k, factor in enumerate(falling):
            # 0 * inf: a derivative that vanishes identically is zero also where x is.
            yield torch.zeros_like(x) if factor == 0 else factor * x ** (n - k)

    return derivatives


FORMULAS: dict[str, Derivatives] = {
    "tanh": _tanh, "sigmoid": _sigmoid, "silu": _silu, "exp": _exp, "log": _log, "sin": _sin, "cos": _cos,
    "reciprocal": _reciprocal, "square": _square, "sqrt": _sqrt, "rsqrt": _rsqrt,
    "erf": _erf, "logsigmoid": _logsigmoid, "selu": _selu,
}  # fmt: skip
"""Functions of one tensor without further arguments, by their names in torch, torch.Tensor and torch.nn.functional."""


POLES = {"log", "reciprocal", "sqrt", "rsqrt"}
"""Those whose derivatives are infinite at 0."""


def softplus(beta: float, threshold: float) -> Derivatives:
    return lambda x: _softplus(x, beta, threshold)


def gelu(approximate: str) -> Derivatives:
    return _gelu_tanh if approximate == "tanh" else _gelu
