"""The table of rules: which function goes by which rule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_hessian.curvature import refusals
from lightning_hessian.curvature.errors import HigherOrderError
from lightning_hessian.curvature.taylor import gathers, losses, norms, products, recurrent
from lightning_hessian.curvature.taylor import softmax as softmax_rules
from lightning_hessian.curvature.taylor.coefficients import (
    Call,
    Coefficients,
    Rule,
    add,
    bilinear,
    has_coefficients,
    is_real_or_complex,
    linear,
    scaled,
    stacked,
    total,
)
from lightning_hessian.curvature.taylor.elementwise import (
    FORMULAS,
    POLES,
    elementwise,
    exponential_unit,
    gelu,
    power,
    safe_sqrt,
    softplus,
    with_pole,
    without_pole,
)

RULES: dict[Any, Rule] = {}
"""Function -> rule."""

PROPERTIES: dict[Any, Rule] = {}
"""A property of tensors -> rule. Other properties (shapes, ``data``, ...) are constants."""

CONSTANT: set[Any] = set()
"""Functions whose result has no derivative: shapes, comparisons, rounding, what leaves the graph."""

_PLACES = (torch, Tensor, F, torch._C._nn, torch.special)


def _named(names: str) -> list[Any]:
    found = [getattr(place, name) for name in names.split() for place in _PLACES if hasattr(place, name)]
    return [function for function in found if callable(function)]


def _register(names: str, rule: Rule) -> None:
    for function in _named(names):
        RULES[function] = rule


def linear_rule(call: Call) -> Any:
    """f is linear in its first argument: f itself on every coefficient."""
    x, *rest = call.args if call.args else (call.kwargs.get("input"),)
    kwargs = {name: value for name, value in call.kwargs.items() if call.args or name != "input"}
    if not has_coefficients(x) or has_coefficients(rest) or has_coefficients(tuple(kwargs.values())):
        return NotImplemented
    return several(lambda t: call.function(t, *rest, **kwargs), call.of(x))


def view_rule(call: Call) -> Any:
    """A view of x0; the coefficients need not have its strides."""
    if any(isinstance(value, torch.dtype) for value in (*call.args, *call.kwargs.values())):
        return NotImplemented
    value = call.function(*call.args, **call.kwargs)
    return Coefficients(value, *linear(lambda t: t.reshape(value.shape), call.of(call.args[0]))[1:])


def several(f: Callable[[Tensor], Any], x: Coefficients) -> Any:
    """The coefficients of a linear f that may return several tensors; integers among them are constants."""
    values = f(x.value)
    if isinstance(values, Tensor):
        if not is_real_or_complex(values):
            return Coefficients(values, (None,) * len(x.first), None)
        first_parts = tuple(None if x1 is None else f(x1) for x1 in x.first)
        return Coefficients(values, first_parts, None if x.second is None else f(x.second))
    first = [None if x1 is None else f(x1) for x1 in x.first]
    second = None if x.second is None else f(x.second)
    return type(values)(
        Coefficients(value, tuple(None if y is None else y[i] for y in first), None if second is None else second[i])
        if is_real_or_complex(value)
        else value
        for i, value in enumerate(values)
    )


def jointly_linear_rule(call: Call) -> Any:
    """f is linear in all its floating-point tensors together (cat, stack, index_add, ...); constant ones are zero."""

    def at(k: int | None, value: Any) -> Any:
        """The k-th x1, or x2 (None), in the place of every tensor."""
        if isinstance(value, list | tuple):
            return type(value)(at(k, part) for part in value)
        if not isinstance(value, Tensor) or not is_real_or_complex(value):
            return value
        x = call.of(value)
        part = x.second if k is None else x.first[k]
        return torch.zeros_like(value) if part is None else part

    def is_zero(k: int | None, value: Any) -> bool:
        if isinstance(value, list | tuple):
            return all(is_zero(k, part) for part in value)
        if not isinstance(value, Tensor):
            return True
        x = call.of(value)
        return (x.second if k is None else x.first[k]) is None

    def part(k: int | None) -> Any:
        everything = (*call.args, *call.kwargs.values())
        if is_zero(k, everything):
            return None
        return call.function(*at(k, tuple(call.args)), **{name: at(k, value) for name, value in call.kwargs.items()})

    return Coefficients(call.function(*call.args, **call.kwargs), tuple(map(part, range(call.directions))), part(None))


def bilinear_rule(call: Call) -> Any:
    """f is linear in its first and in its second argument."""
    if len(call.args) < 2:
        return NotImplemented
    a, b, *rest = call.args
    if has_coefficients(rest) or has_coefficients(tuple(call.kwargs.values())):
        return NotImplemented
    return bilinear(lambda p, q: call.function(p, q, *rest, **call.kwargs), call.of(a), call.of(b))


def matmul_rule(call: Call) -> Any:
    if len(call.args) != 2 or call.kwargs:
        return NotImplemented
    return products.matmul(*map(call.of, call.args))


def reflected(function: Callable[..., Any]) -> Rule:
    """x.__rop__(y) is function(y, x)."""
    return lambda call: RULES[function](call.other(function, (call.args[1], call.args[0]), {}))


def add_rule(call: Call) -> Coefficients:
    return _sum(call, 1)


def sub_rule(call: Call) -> Coefficients:
    return _sum(call, -1)


def rsub_rule(call: Call) -> Coefficients:
    """other - alpha x."""
    kwargs = {name: value for name, value in call.kwargs.items() if name == "alpha"}
    return sub_rule(call.other(torch.sub, (call.argument(1, "other"), call.args[0]), kwargs))


def _sum(call: Call, sign: int) -> Coefficients:
    a, b = call.args[0], call.argument(1, "other")
    factor = sign * call.kwargs.get("alpha", 1)
    x, y = call.of(a), call.of(b)
    value = call.function(*call.args, **call.kwargs)

    def summed(p: Tensor | None, q: Tensor | None) -> Tensor | None:
        q = q if factor == 1 else (None if q is None else -q) if factor == -1 else scaled(factor, q)
        found = add(p, q)
        return found if found is None or found.shape == value.shape else found.expand(value.shape)

    first = tuple(summed(p, q) for p, q in zip(x.first, y.first, strict=True))
    return Coefficients(value, first, summed(x.second, y.second))


def div_rule(call: Call) -> Any:
    a, b = call.args[0], call.argument(1, "other")
    if call.kwargs.get("rounding_mode") is not None or len(call.args) > 2:
        return NotImplemented
    if not has_coefficients(b):
        return linear(lambda t: t / b, call.of(a))
    inverse = with_pole(FORMULAS["reciprocal"], call.of(b))
    quotient = bilinear(torch.mul, call.of(a), inverse)
    return Coefficients(a / b, *quotient[1:])


def pow_rule(call: Call) -> Any:
    x, exponent = call.args[0], call.argument(1, "exponent")
    if not isinstance(exponent, int | float) or not isinstance(x, Tensor):
        return NotImplemented
    if exponent == 2:
        return elementwise(FORMULAS["square"], call.of(x))
    apply = elementwise if exponent in (0, 1) or exponent >= 3 else with_pole
    return apply(power(float(exponent)), call.of(x))


def elementwise_rule(name: str) -> Rule:
    def rule(call: Call) -> Any:
        x = call.of(call.argument(0, "input"))
        return NotImplemented if x.value.is_complex() else apply(FORMULAS[name], x)

    apply = with_pole if name in POLES else elementwise
    return rule


def softplus_rule(call: Call) -> Coefficients:
    beta, threshold = call.argument(1, "beta", 1), call.argument(2, "threshold", 20)
    return elementwise(softplus(beta, threshold), call.of(call.argument(0, "input")))


def gelu_rule(call: Call) -> Coefficients:
    return elementwise(gelu(call.argument(1, "approximate", "none")), call.of(call.argument(0, "input")))


def elu_rule(call: Call) -> Any:
    if len(call.args) > 2 or call.kwargs.keys() & {"scale", "input_scale"}:
        return NotImplemented
    alpha = call.argument(1, "alpha", 1.0)
    return elementwise(exponential_unit(lambda x: F.elu(x, alpha), alpha, 1, 1), call.of(call.argument(0, "input")))


def celu_rule(call: Call) -> Any:
    alpha = call.argument(1, "alpha", 1.0)
    unit = exponential_unit(lambda x: F.celu(x, alpha), alpha, 1 / alpha, 1)
    return elementwise(unit, call.of(call.argument(0, "input")))


def linear_layer_rule(call: Call) -> Coefficients:
    """x W' + b."""
    x, weight, bias = (call.of(call.argument(i, name)) for i, name in enumerate(("input", "weight", "bias")))
    return products.linear_layer(x, weight, None if bias.value is None else bias)


def convolution_rule(spatial: int) -> Rule:
    def rule(call: Call) -> Coefficients:
        names = ("input", "weight", "bias")
        x, weight, bias = (call.of(call.argument(i, name)) for i, name in enumerate(names))
        rest = call.args[3:]
        kwargs = {name: value for name, value in call.kwargs.items() if name not in names}
        product = _through(
            lambda p, q: call.function(p, q, None, *rest, **kwargs), x, weight, in_rows=x.value.dim() == spatial + 2
        )
        if bias.value is None:
            return product
        dtype = product.value.dtype  # as autocast has it
        return total(product, linear(lambda t: t.to(dtype).view(-1, *[1] * spatial), bias))

    return rule


STACKED_BYTES = 2**24
"""The largest stack on a CPU: the system gives larger ones fresh memory each time, which costs more than it saves."""


def _through(
    f: Callable[[Tensor, Tensor], Tensor], x: Coefficients, weight: Coefficients, in_rows: bool
) -> Coefficients:
    """f(x, W), bilinear, with the samples of x in rows: all coefficients of x go through W in one call."""
    size = (2 + len(x.first)) * x.value.numel() * x.value.element_size()
    if not in_rows or (x.value.device.type == "cpu" and size > STACKED_BYTES):
        return bilinear(f, x, weight)
    rows, apart = stacked([x.value, *x.first, x.second])
    y0, *y1, y2 = apart(f(rows, weight.value))
    assert y0 is not None
    for p, v in enumerate(weight.first):
        if v is None:
            continue
        if p == 0 and x.first[0] is not None:  # neighbors among the rows: one copy serves both products
            n = len(x.value)
            first, second = f(rows.split([2 * n, len(rows) - 2 * n])[0], v).split([n, n])
            y1[p], y2 = add(y1[p], first), add(y2, scaled(2, second))
            continue
        y1[p] = add(y1[p], f(x.value, v))
        if (moving := x.first[p]) is not None:
            y2 = add(y2, scaled(2, f(moving, v)))
    if weight.second is not None:
        y2 = add(y2, f(x.value, weight.second))
    return Coefficients(y0, tuple(y1), y2)


def embedding_rule(call: Call) -> Any:
    """Linear in the table; the row of ``padding_idx`` is a constant."""
    if (wrong := refusals.CALLS[F.embedding](*call.args, **call.kwargs)) is not None:
        raise HigherOrderError(f"{call.layer()} {wrong}")
    indices, weight = call.argument(0, "input"), call.argument(1, "weight")
    padding = call.argument(2, "padding_idx")
    value = call.function(*call.args, **call.kwargs)
    row = None if padding is None else padding % len(weight)

    def looked_up(table: Tensor | None) -> Tensor | None:
        if table is None:
            return None
        found = table[indices]
        return found if row is None else found.masked_fill((indices == row).unsqueeze(-1), 0)

    x = call.of(weight)
    return Coefficients(value, tuple(map(looked_up, x.first)), looked_up(x.second))


def low_level_embedding_rule(call: Call) -> Any:
    """torch.embedding, whose arguments have another order, and a ``padding_idx`` of -1 for none."""
    padding = call.argument(2, "padding_idx", -1)
    kwargs = {
        "padding_idx": None if padding < 0 else padding,
        "scale_grad_by_freq": call.argument(3, "scale_grad_by_freq", False),
        "sparse": call.argument(4, "sparse", False),
    }
    return embedding_rule(call.other(F.embedding, (call.argument(1, "indices"), call.argument(0, "weight")), kwargs))


def where_rule(call: Call) -> Any:
    if len(call.args) != 3:
        return NotImplemented
    condition, a, b = call.args
    x, y = call.of(a), call.of(b)
    value = call.function(condition, a, b)

    def chosen(p: Tensor | None, q: Tensor | None) -> Tensor | None:
        if p is None and q is None:
            return None
        return torch.where(condition, 0 if p is None else p, 0 if q is None else q).to(value.dtype)

    first = tuple(chosen(p, q) for p, q in zip(x.first, y.first, strict=True))
    return Coefficients(value, first, chosen(x.second, y.second))


def tensor_where_rule(call: Call) -> Any:
    """x.where(condition, y)."""
    if len(call.args) != 3:
        return NotImplemented
    return where_rule(call.other(torch.where, (call.args[1], call.args[0], call.args[2]), {}))


def masked_fill_rule(call: Call) -> Any:
    x, mask, value = call.args[0], call.argument(1, "mask"), call.argument(2, "value")
    if isinstance(value, Tensor) and has_coefficients(value):
        return where_rule(call.other(torch.where, (mask, value, x), {}))
    filled = call.function(*call.args, **call.kwargs)
    return Coefficients(filled, *linear(lambda t: t.masked_fill(mask, 0), call.of(x))[1:])


def pad_rule(call: Call) -> Any:
    padding, mode = call.argument(1, "pad"), call.argument(2, "mode", "constant")
    x = call.of(call.argument(0, "input"))
    value = call.function(*call.args, **call.kwargs)
    return Coefficients(value, *linear(lambda t: F.pad(t, padding, mode), x)[1:])


def addmm_rule(call: Call) -> Any:
    """beta c + alpha a @ b."""
    if call.kwargs.keys() - {"beta", "alpha"} or len(call.args) != 3:
        return NotImplemented
    c, a, b = map(call.of, call.args)
    beta, alpha = call.kwargs.get("beta", 1), call.kwargs.get("alpha", 1)
    product = products.matmul(a, b)
    dtype = product.value.dtype  # as autocast has it
    start = linear(lambda t: beta * t.to(dtype), c)
    return total(start, product if alpha == 1 else linear(lambda t: alpha * t, product))


def norm_rule(call: Call) -> Any:
    """The p-norm, over all or some dimensions, for p = 1, infinity, or at least 2."""
    name = call.function.__name__
    order = call.argument(1, "p" if name == "norm" else "ord", 2)
    order = 2 if order is None or order == "fro" else order
    known = isinstance(order, int | float) and (order == 1 or order >= 2)  # others are not smooth at 0
    if not known or call.kwargs.get("dtype") is not None:
        return NotImplemented
    x = call.of(call.argument(0, "x" if name == "linalg_vector_norm" else "input"))
    dim, keepdim = call.argument(2, "dim"), call.argument(3, "keepdim", False)
    is_matrix = x.value.dim() == 2 if dim is None else not isinstance(dim, int) and len(dim) == 2
    if name == "linalg_norm" and is_matrix and call.argument(1, "ord") not in (None, "fro"):
        return NotImplemented  # the norm of an operator
    if x.value.is_complex() or (dim is None and keepdim):
        return NotImplemented
    if order != 2:
        across = {} if dim is None else {"dim": dim, "keepdim": keepdim}
        with call.inside():
            size = call.argument(0, "x").abs()
            if order == 1:
                return size.sum(**across)
            if order == math.inf:
                return size.amax(**across)
            return elementwise(without_pole(power(1 / order)), call.of(size.pow(order).sum(**across)))
    squares = elementwise(FORMULAS["square"], x)
    summed = linear(lambda t: t.sum() if dim is None else t.sum(dim, keepdim=keepdim), squares)
    return elementwise(safe_sqrt, summed)


def composed(body: Callable[..., Any]) -> Rule:
    """A function written with others, which have rules."""

    def rule(call: Call) -> Any:
        with call.inside():
            return body(*call.args, **call.kwargs)

    return rule


def _mish(input: Tensor, inplace: bool = False) -> Tensor:
    return input * torch.tanh(F.softplus(input))


def _hardswish(input: Tensor, inplace: bool = False) -> Tensor:
    return input * (input + 3).clamp(0, 6) / 6


def _prelu(input: Tensor, weight: Tensor) -> Tensor:
    each = weight.view(-1, *[1] * (input.dim() - 2)) if weight.numel() > 1 and input.dim() > 1 else weight
    return torch.where(input > 0, input, each * input)


def _logsumexp(input: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
    largest = input.detach().amax(dim, keepdim=True)
    largest = largest.masked_fill(largest.isinf(), 0)
    found = (input - largest).exp().sum(dim, keepdim=True).log() + largest
    return found if keepdim else found.sum(dim)


def _var(
    input: Tensor, dim: Any = None, unbiased: bool = True, keepdim: bool = False, *, correction: Any = None
) -> Any:
    if isinstance(dim, bool):
        dim, unbiased = None, dim
    difference = input - input.mean(dim, keepdim=True)
    summed = (difference * difference).sum(dim, keepdim=keepdim)
    count = input.numel() // max(summed.numel(), 1)
    return summed / max(0, count - (int(unbiased) if correction is None else correction))


def std_rule(call: Call) -> Coefficients:
    with call.inside():
        return elementwise(safe_sqrt, call.of(torch.var(*call.args, **call.kwargs)))


def std_mean_rule(call: Call) -> tuple[Coefficients, Coefficients]:
    with call.inside():
        variance, mean = map(call.of, torch.var_mean(*call.args, **call.kwargs))
    return elementwise(safe_sqrt, variance), mean


def xlogy_rule(call: Call) -> Any:
    x, y = call.args[0], call.argument(1, "other")
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return NotImplemented
    with call.inside():
        return x * torch.where((x == 0) & (y <= 0), 1, y).log()


def _cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    lengths = [torch.linalg.vector_norm(x, dim=dim, keepdim=True).clamp_min(eps) for x in (x1, x2)]
    return ((x1 / lengths[0]) * (x2 / lengths[1])).sum(dim)


def _pairwise_distance(x1: Tensor, x2: Tensor, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False) -> Tensor:
    return torch.linalg.vector_norm(x1 - x2 + eps, p, dim=-1, keepdim=keepdim)


def _triplet_margin_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float = 1.0,
    p: float = 2,
    eps: float = 1e-6,
    swap: bool = False,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
) -> Tensor:
    near, far = F.pairwise_distance(anchor, positive, p, eps), F.pairwise_distance(anchor, negative, p, eps)
    if swap:
        far = torch.minimum(far, F.pairwise_distance(positive, negative, p, eps))
    return losses.reduced((margin + near - far).clamp_min(0), losses.reduction_of(size_average, reduce, reduction))


def _cosine_embedding_loss(
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 0,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
) -> Tensor:
    dim, eps = target.dim(), 1e-12
    lengths = (input1.square().sum(dim) + eps) * (input2.square().sum(dim) + eps)
    cosine = (input1 * input2).sum(dim) / lengths.sqrt()
    zero = torch.zeros_like(cosine)
    each = torch.where(target == 1, 1 - cosine, zero) + torch.where(target == -1, (cosine - margin).clamp_min(0), zero)
    return losses.reduced(each, losses.reduction_of(size_average, reduce, reduction))


def _glu(input: Tensor, dim: int = -1) -> Tensor:
    a, b = input.chunk(2, dim)
    return a * torch.sigmoid(b)


def _huber(input: Tensor, target: Tensor, delta: float) -> Tensor:
    difference = input - target
    size = difference.abs()
    return torch.where(size <= delta, 0.5 * difference * difference, delta * (size - 0.5 * delta))


def _huber_loss(input: Tensor, target: Tensor, reduction: str = "mean", delta: float = 1.0, weight: Any = None) -> Any:
    each = _huber(input, target, delta)
    return losses.reduced(each if weight is None else each * weight, reduction)


def _smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> Tensor:
    reduction = losses.reduction_of(size_average, reduce, reduction)
    each = (input - target).abs() if beta == 0 else _huber(input, target, beta) / beta
    return losses.reduced(each, reduction)


def _soft_margin_loss(
    input: Tensor, target: Tensor, size_average: Any = None, reduce: Any = None, reduction: str = "mean"
) -> Tensor:
    return losses.reduced(F.softplus(-target * input), losses.reduction_of(size_average, reduce, reduction))


def padded_sequence_rule(call: Call) -> Any:
    """Packed sequences, padded: linear up to the value of the padding."""
    data, batch_sizes, batch_first, _, *length = call.args
    value, lengths = call.function(*call.args)
    moved = linear(lambda t: call.function(t, batch_sizes, batch_first, 0.0, *length)[0], call.of(data))
    return moved._replace(value=value), lengths


def gradient_rule(call: Call) -> Any:
    """Gradients inside the step: constants if they have no graph."""
    if call.argument(4, "create_graph", False):
        raise HigherOrderError(
            f"A gradient is taken inside the step (torch.autograd.grad in {call.layer()}), as in a gradient penalty, a "
            "physics-informed loss or meta-learning. Taylor coefficients cannot pass it. Use method='autograd', which "
            "differentiates the step's own gradients too."
        )
    return call.function(*call.args, **call.kwargs)


def recurrent_rule(cell: recurrent.Cell) -> Rule:
    """A recurrent layer by its formula. Under autocast the result has the dtype of a fused kernel, if any."""
    rule = composed(recurrent.recurrent(cell))

    def with_dtype(call: Call) -> Any:
        found = rule(call)
        device = call.args[0].device.type
        is_fused = torch.is_autocast_enabled(device) and (device == "cuda" or _is_for_onednn(call))
        if not is_fused or call.args[0].dtype == torch.float64:
            return found
        with call.inside():
            return tuple(part.to(torch.get_autocast_dtype(device)) for part in found)

    return with_dtype


def _is_for_onednn(call: Call) -> bool:
    """oneDNN has a kernel for LSTMs without a projection, on padded sequences."""
    if call.function is not torch.lstm or not torch._C._get_mkldnn_enabled() or not call.args[0].numel():
        return False
    starts = call.args[1]
    return isinstance(starts, list | tuple) and starts[0].size(-1) == starts[1].size(-1)


def einsum_rule(call: Call) -> Any:
    equation, *operands = call.args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) > 2:
        return NotImplemented
    if len(operands) == 1:
        return linear(lambda t: torch.einsum(equation, t), call.of(operands[0]))
    return bilinear(lambda p, q: torch.einsum(equation, p, q), *map(call.of, operands))


_register(
    "reshape reshape_as flatten unflatten permute transpose t swapaxes swapdims movedim moveaxis adjoint "
    "contiguous clone unsqueeze squeeze sum mean sum_to_size expand expand_as broadcast_to __getitem__ chunk split "
    "split_with_sizes tensor_split unsafe_chunk unsafe_split unbind hsplit vsplit dsplit neg negative positive __neg__ "
    "__pos__ to float double half bfloat16 type type_as cpu cuda adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d avg_pool1d avg_pool2d avg_pool3d roll flip fliplr flipud rot90 index_select gather take "
    "take_along_dim unfold fold repeat repeat_interleave tile masked_select cumsum diff diag diagonal diag_embed "
    "diagflat trace tril triu narrow select ravel atleast_1d atleast_2d atleast_3d pixel_shuffle pixel_unshuffle "
    "channel_shuffle interpolate upsample upsample_nearest upsample_bilinear im2col col2im nll_loss nll_loss_nd "
    "conj resolve_conj resolve_neg grid_sample view_as_real view_as_complex",
    linear_rule,
)
_register("view view_as", view_rule)
_register(
    "cat concat concatenate stack hstack vstack dstack column_stack row_stack block_diag index_add index_copy "
    "scatter_add select_scatter slice_scatter diagonal_scatter masked_scatter",
    jointly_linear_rule,
)
_register("mul multiply mv dot vdot outer ger inner kron __mul__ __rmul__", bilinear_rule)
_register("matmul bmm mm spmm __matmul__", matmul_rule)
RULES[torch.sparse.mm] = matmul_rule
_register("add __add__ __radd__", add_rule)
_register("sub subtract __sub__", sub_rule)
RULES[Tensor.__rsub__] = reflected(torch.sub)
_register("rsub", rsub_rule)
RULES[Tensor.__rmatmul__] = reflected(torch.matmul)
_register("div divide true_divide __truediv__ __div__", div_rule)
RULES[Tensor.__rtruediv__] = RULES[Tensor.__rdiv__] = reflected(torch.div)
_register("pow __pow__", pow_rule)
for _name in FORMULAS:
    _register(_name, elementwise_rule(_name))
_register("expit", elementwise_rule("sigmoid"))
_register("softplus", softplus_rule)
_register("gelu", gelu_rule)
_register("elu", elu_rule)
_register("celu", celu_rule)
_register("linear", linear_layer_rule)
for _spatial in (1, 2, 3):
    _register(f"conv{_spatial}d conv_transpose{_spatial}d", convolution_rule(_spatial))
RULES[F.embedding] = embedding_rule
for _function in (torch.embedding, torch.ops.aten.embedding, torch.ops.aten.embedding.default):
    RULES[_function] = low_level_embedding_rule
RULES[torch.where] = where_rule
RULES[Tensor.where] = tensor_where_rule
_register("masked_fill", masked_fill_rule)
RULES[F.pad] = pad_rule
_register("addmm addmv baddbmm", addmm_rule)
RULES[torch.einsum] = einsum_rule
_register("_pack_padded_sequence", linear_rule)
_register("_pad_packed_sequence", padded_sequence_rule)
RULES[torch.autograd.grad] = gradient_rule
_register("lstm", recurrent_rule(recurrent.lstm_cell))
_register("gru", recurrent_rule(recurrent.gru_cell))
_register("rnn_tanh", recurrent_rule(recurrent.simple_cell(torch.tanh)))
_register("rnn_relu", recurrent_rule(recurrent.simple_cell(torch.relu)))

_register("softmax", softmax_rules.softmax_rule)
_register("log_softmax", softmax_rules.log_softmax_rule)
RULES[F.scaled_dot_product_attention] = softmax_rules.attention_rule
_register("dropout dropout1d dropout2d dropout3d feature_dropout", softmax_rules.dropout_rule)
RULES[torch.dropout] = softmax_rules.dropout_rule

RULES[F.layer_norm] = RULES[torch.layer_norm] = norms.norm_rule(
    norms.layer_norm, ("input", "normalized_shape", "weight", "bias", "eps", "cudnn_enable")
)
RULES[F.rms_norm] = RULES[torch.rms_norm] = norms.norm_rule(
    norms.rms_norm, ("input", "normalized_shape", "weight", "eps")
)
RULES[F.group_norm] = RULES[torch.group_norm] = norms.norm_rule(
    norms.group_norm, ("input", "num_groups", "weight", "bias", "eps", "cudnn_enabled")
)
_BATCH_NORM = ("running_mean", "running_var", "weight", "bias")
RULES[F.batch_norm] = norms.norm_rule(norms.batch_norm, ("input", *_BATCH_NORM, "training", "momentum", "eps"))
RULES[torch.batch_norm] = norms.norm_rule(
    norms.batch_norm,
    ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled"),
)

RULES[F.cross_entropy] = losses.cross_entropy_rule
RULES[F.mse_loss] = losses.mse_loss

_values: Any
_with_indices: Any
_slope: Any
for (_values, _with_indices), _spatial in gathers.POOLING.items():
    RULES[_values] = gathers.pooling_rule(_with_indices, _spatial, returns_indices=False)
    RULES[_with_indices] = gathers.pooling_rule(_with_indices, _spatial, returns_indices=True)
_register("max min sort topk median nanmedian kthvalue cummax cummin mode", gathers.by_indices_rule)
_register("maximum minimum fmax fmin", gathers._of_two)
_register("amax amin", gathers.extremum_rule)
# Not hardsigmoid: the slope of PyTorch's kernel is 1/6 in single precision. Its replacement has rules.
for _names, _slope in {
    "relu": gathers.relu_slope,
    "leaky_relu": gathers.leaky_relu_slope,
    "hardtanh": gathers.hardtanh_slope,
    "relu6": gathers.relu6_slope,
    "threshold": gathers.threshold_slope,
    "hardshrink softshrink": gathers.shrink_slope,
    "abs absolute __abs__": gathers.abs_slope,
}.items():
    _register(_names, gathers.piecewise_linear(_slope))
_register("clamp clip", gathers.clamp_rule)
_register(
    "clamp_min", lambda call: gathers.clamp_rule(call.other(torch.clamp, (call.args[0], call.argument(1, "min")), {}))
)
_register(
    "clamp_max",
    lambda call: gathers.clamp_rule(call.other(torch.clamp, (call.args[0], None, call.argument(1, "max")), {})),
)

_register("norm", norm_rule)
RULES[torch.linalg.vector_norm] = RULES[torch.linalg.norm] = RULES[torch.norm] = norm_rule
_register("mish", composed(_mish))
_register("hardswish", composed(_hardswish))
_register("prelu", composed(_prelu))
_register("logsumexp", composed(_logsumexp))
_register("var", composed(_var))
_register("std", std_rule)
_register("std_mean", std_mean_rule)
_register("xlogy", xlogy_rule)
RULES[F.glu] = composed(_glu)
_register("cosine_similarity", composed(_cosine_similarity))
_register("pairwise_distance", composed(_pairwise_distance))
RULES[F.binary_cross_entropy] = losses.binary_cross_entropy
RULES[F.huber_loss] = composed(_huber_loss)
RULES[F.smooth_l1_loss] = composed(_smooth_l1_loss)
RULES[F.triplet_margin_loss] = composed(_triplet_margin_loss)
RULES[F.cosine_embedding_loss] = composed(_cosine_embedding_loss)
RULES[F.soft_margin_loss] = composed(_soft_margin_loss)
for _name in dir(torch.fft):
    if "fft" in _name and not _name.endswith("freq") and "shift" not in _name:
        RULES[getattr(torch.fft, _name)] = linear_rule
_register("cfloat cdouble chalf", linear_rule)
_register("complex", jointly_linear_rule)

for _name in ("T", "mT", "H", "mH", "real", "imag"):
    PROPERTIES[getattr(Tensor, _name)] = linear_rule

CONSTANT |= set(
    _named(
        "size dim ndimension numel nelement element_size stride is_contiguous is_floating_point is_complex is_nonzero "
        "storage_offset data_ptr get_device is_same_size __len__ __hash__ __repr__ __str__ __format__ __bool__ __int__ "
        "__float__ __index__ __contains__ item tolist numpy __array__ requires_grad_ retain_grad register_hook detach "
        "eq ne lt le gt ge __eq__ __ne__ __lt__ __le__ __gt__ __ge__ isnan isinf isfinite isclose allclose equal "
        "argmax argmin argsort argwhere nonzero count_nonzero unique bincount histc bucketize searchsorted sign "
        "signbit round floor ceil trunc fix floor_divide __floordiv__ logical_and logical_or logical_not any all "
        "zeros_like ones_like full_like empty_like rand_like randn_like randint_like new_zeros new_ones new_full "
        "new_empty new_tensor long int short char byte bool is_inference "
        "is_shared untyped_storage result_type can_cast is_tensor backward heaviside"
    )
)

_FOR_COMPLEX = {
    linear_rule, jointly_linear_rule, bilinear_rule, matmul_rule, add_rule, sub_rule, view_rule, linear_layer_rule,
    einsum_rule, where_rule, tensor_where_rule, masked_fill_rule, addmm_rule,
    *(RULES[getattr(F, f"conv{n}d")] for n in (1, 2, 3)),
}  # fmt: skip
"""Rules that hold for complex tensors, too. All other functions of complex tensors go by forward mode."""

# What follows is looked up by the compiler, which cannot hash every function: by number.
RULE_LIST: list[Rule] = list(dict.fromkeys([*RULES.values(), *PROPERTIES.values()]))
FOR_COMPLEX = frozenset(i for i, rule in enumerate(RULE_LIST) if rule in _FOR_COMPLEX)
IS_CONSTANT, NO_RULE = -2, -1
_NUMBERS = {id(function): RULE_LIST.index(rule) for function, rule in [*RULES.items(), *PROPERTIES.items()]}
_NUMBERS |= {id(function): IS_CONSTANT for function in CONSTANT}


@torch.compiler.assume_constant_result
def rule_number(function: Any) -> int:
    """The place of a function's rule in ``RULE_LIST``, or ``IS_CONSTANT``, or ``NO_RULE``."""
    # The getter of a property is another object at each access.
    key = function.__self__ if getattr(function, "__name__", "") == "__get__" else function
    return _NUMBERS.get(id(key), NO_RULE)
