"""The trace of the weight Hessian."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_hessian.arguments import choice, count_or_all, is_number, positive_or_none
from lightning_hessian.curvature import (
    HessianOperator,
    ParameterFilter,
    ProbeSource,
    refuse_unsound_graph,
    select_parameters,
)
from lightning_hessian.curvature.displacement import local, local_part, over_shards
from lightning_hessian.curvature.gauss_newton import random_factors
from lightning_hessian.curvature.operators import vector_jacobian_product
from lightning_hessian.curvature.parameters import check_filter
from lightning_hessian.penalties.base import Difference, Penalty, Product, StepContext, needs_own_runs

Method = Literal["autograd", "two_pass", "central_difference", "gauss_newton"]
Drop = Literal["tensor", "element"]
Scale = Literal["none", "parameter"]

MOST_EXACT = 10_000
"""The most parameters for which ``probes=-1`` is accepted."""


class HessianTrace(Penalty):
    r"""tr(H), H the Hessian of the batch-mean loss with respect to the parameters: flat minima.

    Hutchinson's estimate, with fresh probes each step (one fixed probe can be gamed by the network):

    .. math:: \mathrm{tr}(H) = E[v'Hv], \quad v_i = \pm 1 \text{ independent}, \qquad
        \mathrm{Var}[v'Hv] = 2 \sum_{i \ne j} H_{ij}^2 .

    It is the Hessian of the loss that the step computes, in the mode the model is in (so in training mode batch norm
    normalizes by the batch, and dropout is active). The trace can be negative; see ``clamp``.

    The methods, and what they cost in plain steps by operation count:

    - ``"autograd"`` (9): v'Hv by differentiating twice, with an exact gradient.
    - ``"two_pass"`` (2): the step's loss is replaced by its mean over theta + s v and theta - s v, two ordinary passes,

      .. math:: \tfrac12 [L(\theta + s v) + L(\theta - s v)] = L + \tfrac{s^2}{2} v'Hv + O(s^4), \qquad
          s = \sqrt{2 \cdot \text{strength}},

      so that it runs wherever ordinary training runs: compiled models, fused attention, float16, sharded parameters.
      What the step logs and counts (the task loss, metrics, batch norm's running statistics) is of its first run, at
      theta + s v. For strengths above about 1e-4 recompute the statistics before evaluation
      (``torch.optim.swa_utils.update_bn``).
    - ``"central_difference"`` (3): the same difference with a step of its own,

      .. math:: v'Hv = [L(\theta + e v) + L(\theta - e v) - 2 L(\theta)] / e^2 + O(e^2).

    - ``"gauss_newton"`` (about 3): tr(G), the part of H that is the loss's curvature in the outputs, never negative,

      .. math:: \mathrm{tr}(G) = E_u \lVert \textstyle\sum_i J_i' S_i u_i \rVert^2, \qquad
          S_i S_i' = \partial^2 L / \partial z_i^2, \quad u = \pm 1.

      For piecewise-linear networks without batch norm G = H. The outputs are seen where the step calls cross entropy,
      binary cross entropy with logits, or MSE.

    Where activations have kinks (ReLU, max-pooling) the two differences see them, and autograd does not: they estimate
    the trace of the loss *smoothed* over the step.

    Args:
        probes: how many v to average over (1 or 2 do for training), or -1 for the exact trace by all unit vectors,
            for models of at most 10,000 chosen parameters (autograd only).
        method: see above.
        keep: the probability q in (0, 1] of keeping a part of v, the dropout scheme of the SEHT paper, rescaled
            so that the estimate stays unbiased. (The paper does not rescale and estimates q tr(H).)
        drop: what is kept or dropped. ``"tensor"``: whole parameter tensors, at least one kept; saves time with
            autograd, because fewer tensors are differentiated. ``"element"``: single entries, scaled by 1/sqrt(q);
            saves no time, Var = (1/q - 1) sum_i H_ii^2 + 2 sum_{i != j} H_ij^2.
        parameters: restrict the trace to these: a glob on names (``"*.weight"``), a list of globs, or a predicate
            ``(name, parameter) -> bool``. By default all that require a gradient.
        clamp: a lower bound on the value that enters the loss, for example 0; below it the penalty has no gradient.
            The logged value is the raw one. Not with the two differences.
        scale: ``"parameter"`` measures tr(D H D) instead, D the size of each filter (the root mean square over all
            dimensions but the first; of biases and other vectors the absolute value of each entry), held constant
            when differentiated: curvature along *relative* changes. Rescaling a layer that is followed by a norm does
            not change it.
        step: e of ``"central_difference"``: by how much each entry moves (with ``scale="parameter"``, as a share of its
            size). None: half the fourth root of the precision times the root mean square of the chosen parameters.

    Raises:
        ValueError: an argument is out of its range.

    Source:
        Liu, Yu, Lin 2022, "Regularizing Deep Neural Networks with Stochastic Estimators of Hessian Trace"
        (arXiv 2208.05924); Hutchinson 1990. Two passes: Zhang et al. 2023, "Noise Stability Optimization for Flat
        Minima" (arXiv 2306.08553). Filter-wise scale: Kwon et al. 2021, "ASAM" (arXiv 2102.11600). Gauss-Newton:
        Dauphin et al. 2024 (arXiv 2401.10809).

    Example:
        >>> import torch
        >>> from lightning_hessian import HessianTrace, StepContext
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> penalty = HessianTrace(probes=-1)(StepContext((w**4).sum(), {"w": w}))
        >>> penalty.item()  # 12 (1^2 + 2^2)
        60.0
        >>> torch.autograd.grad(penalty, w)[0]  # 24 w
        tensor([24., 48.])
    """

    name = "hessian_trace"

    def __init__(
        self,
        probes: int = 1,
        method: Method = "autograd",
        keep: float = 1.0,
        drop: Drop = "tensor",
        parameters: ParameterFilter = None,
        clamp: float | None = None,
        scale: Scale = "none",
        step: float | None = None,
    ) -> None:
        count_or_all("probes", probes, "the exact trace")
        choice("method", method, get_args(Method))
        if not is_number(keep) or not 0 < float(keep) <= 1:
            raise ValueError(f"keep={keep!r} is a probability and must lie in (0, 1].")
        choice("drop", drop, get_args(Drop))
        choice("scale", scale, get_args(Scale))
        if probes == -1 and keep < 1:
            raise ValueError(f"probes=-1 asks for the exact trace and keep={keep} for a random part of it: choose one.")
        if clamp is not None and not (is_number(clamp) and math.isfinite(clamp)):
            raise ValueError(f"clamp={clamp!r} must be a finite number, the lower bound of the penalty, or None.")
        positive_or_none("step", step, "by how much each entry moves")
        if probes == -1 and method != "autograd":
            raise ValueError(f"probes=-1, the exact trace, is for method='autograd', not {method!r}.")
        if clamp is not None and method in _DIFFERENCES:
            raise ValueError(
                f"clamp={clamp} bounds the penalty, and method={method!r} adds none: its passes are the loss. Use "
                "method='autograd', or 'gauss_newton', which is never negative."
            )
        if keep < 1 and method == "gauss_newton":
            raise ValueError(f"keep={keep} drops parts of a probe of the parameters, and gauss_newton has none.")
        if step is not None and method != "central_difference":
            raise ValueError(f"step={step} is that of method='central_difference', not {method!r}.")
        self.probes = probes
        self.method = method
        self.keep = keep
        self.drop = drop
        check_filter(parameters)
        self.parameters = parameters
        self.clamp = clamp
        self.scale = scale
        self.step = step

    @property
    def derivatives(self) -> int:
        return {"autograd": 3, "gauss_newton": 2}.get(self.method, 1)

    @property
    def watches_losses(self) -> bool:
        return self.method == "gauss_newton"

    @property
    def by_differences(self) -> bool:
        return self.method in _DIFFERENCES

    @property
    def needs_smoothness(self) -> bool:
        return self.method == "central_difference"

    @property
    def needs_full_precision(self) -> bool:
        # A second difference by a small step is rounding in 8 bits.
        return self.method == "central_difference"

    def check(self, parameters: Mapping[str, Tensor]) -> None:
        chosen = select_parameters(parameters, self.parameters)
        size = sum(parameter.numel() for parameter in chosen.values())
        if self.probes == -1 and size > MOST_EXACT:
            raise ValueError(
                f"probes=-1 would take {size:,} Hessian-vector products a step, one for each parameter. "
                f"It is meant for at most {MOST_EXACT:,}: use probes=1, which is unbiased, or choose fewer "
                "`parameters`."
            )

    def value(self, context: StepContext) -> Tensor:
        if self.by_differences:
            raise needs_own_runs(self.method)
        return self._value(context, self._sizes(self._chosen(context.parameters)))

    def held(self, context: StepContext) -> Callable[[StepContext], Tensor]:
        if self.scale == "none":
            return self
        sizes = self._sizes(self._chosen(context.parameters))
        return lambda other: self.term(self._value(other, sizes))

    def _value(self, context: StepContext, sizes: _Sizes) -> Tensor:
        chosen = self._chosen(context.parameters)
        if self.method == "gauss_newton":
            return self._gauss_newton(context, chosen, sizes)
        if self.probes == -1:
            return _exact_trace(HessianOperator(context.loss, chosen, differentiable=True), sizes)
        draws = [self._draw(context.probes, chosen, sizes, index) for index in range(self.probes)]
        # One first gradient serves all probes; it stops at the tensors that no probe keeps.
        needed = sorted({i for kept, _ in draws for i in kept})
        hessian = HessianOperator(context.loss, [chosen[i] for i in needed], differentiable=True)
        forms = [hessian.quadratic_form(_flat(v()), [needed.index(i) for i in kept]) for kept, v in draws]
        return torch.stack(forms).mean()

    def differences(
        self, parameters: Mapping[str, Tensor], strength: float, probes: ProbeSource, product: Product
    ) -> list[Difference]:
        chosen = self._chosen(parameters)
        sizes = self._sizes(chosen)
        if self.method == "two_pass":
            step = math.sqrt(2 * strength)
        else:
            step = self._default_step(chosen) if self.step is None else float(self.step)
        weight = strength / (self.probes * step**2)
        found = []
        for index in range(self.probes):
            kept, v = self._draw(probes, chosen, sizes, index)
            found.append(Difference([chosen[i] for i in kept], v, step, weight))
        return found

    def _default_step(self, chosen: Sequence[Tensor]) -> float:
        # The error of a second difference of gradients is O(e^2) + O(eps / e^2).
        share = torch.finfo(chosen[0].dtype).eps ** 0.25 / 2
        if self.scale == "parameter":
            return share
        squares = torch.stack([local(tensor).square().sum() for tensor in chosen]).sum()
        return share * math.sqrt(over_shards(squares, chosen[0]).item() / sum(tensor.numel() for tensor in chosen))

    def _draw(
        self, probes: ProbeSource, chosen: Sequence[Tensor], sizes: _Sizes, index: int
    ) -> tuple[list[int], Callable[[], list[Tensor]]]:
        """Which tensors a probe keeps, and v over these; drawn anew at each call, so that nobody need keep it."""
        kept, factor = list(range(len(chosen))), 1.0
        if self.keep < 1 and self.drop == "tensor":
            kept, factor = probes.kept_tensors(len(chosen), self.keep, index)
        tensors = [chosen[i] for i in kept]
        counts = [tensor.numel() for tensor in tensors]
        where = (index, tensors[0].device, tensors[0].dtype)

        def v() -> list[Tensor]:
            if self.keep < 1 and self.drop == "element":
                flat = probes.sparse_rademacher(sum(counts), self.keep, *where)
            else:
                flat = probes.rademacher(sum(counts), *where)
            parts = []
            for i, part in zip(kept, flat.split(counts), strict=True):
                part = local_part(part.view(chosen[i].shape).to(chosen[i].dtype), like=chosen[i])
                part = part if sizes is None else part * sizes[i]
                parts.append(part if factor == 1 else part * math.sqrt(factor))
            return parts

        return kept, v

    def _chosen(self, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        return list(select_parameters(parameters, self.parameters).values())

    def _sizes(self, tensors: Sequence[Tensor]) -> _Sizes:
        return None if self.scale == "none" else [_size(tensor) for tensor in tensors]

    def _gauss_newton(self, context: StepContext, chosen: list[Tensor], sizes: _Sizes) -> Tensor:
        squares = []
        custom = refuse_unsound_graph(context.loss, derivatives=2)
        for index in range(self.probes):
            factors = random_factors(context.losses, context.loss, context.inputs, context.probes, index)
            z, su = zip(*factors, strict=True)
            rows = vector_jacobian_product(z, chosen, su, True, custom)
            if sizes is not None:
                rows = [row * size for row, size in zip(rows, sizes, strict=True)]
            squares += [row.square().sum() for row in rows]
        return torch.stack(squares).sum() / self.probes

    def term(self, value: Tensor) -> Tensor:
        return value if self.clamp is None else value.clamp(min=self.clamp)

    def __repr__(self) -> str:
        return f"HessianTrace(probes={self.probes}, method={self.method!r}, keep={self.keep}, drop={self.drop!r})"


_Sizes = list[Tensor] | None
"""Of each chosen tensor's parts; None where all count the same."""
_DIFFERENCES = ("two_pass", "central_difference")


def _size(tensor: Tensor) -> Tensor:
    """The root mean square of each filter, or the absolute value of each entry of a vector; a constant."""
    tensor = local(tensor)
    if tensor.dim() < 2:
        return tensor.abs()
    return tensor.square().mean(dim=tuple(range(1, tensor.dim())), keepdim=True).sqrt()


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def _exact_trace(hessian: HessianOperator, sizes: _Sizes) -> Tensor:
    """sum_i d_i^2 e_i'He_i, one row at a time."""
    diagonal = []
    for k, (gradient, tensor) in enumerate(zip(hessian.gradient, hessian.tensors, strict=True)):
        if not gradient.requires_grad:
            continue
        squares = torch.ones_like(tensor) if sizes is None else sizes[k].expand_as(tensor).square()
        for i, (entry, square) in enumerate(zip(gradient.reshape(-1), squares.reshape(-1), strict=True)):
            (row,) = vector_jacobian_product([entry], [tensor], [torch.ones_like(entry)], create_graph=True)
            diagonal.append(square * row.reshape(-1)[i])
    return torch.stack(diagonal).sum() if diagonal else hessian.gradient[0].new_zeros(())
