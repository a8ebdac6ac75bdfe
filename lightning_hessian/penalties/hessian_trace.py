"""The trace of the weight Hessian."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_hessian.checks import choice, count_or_all, is_number
from lightning_hessian.curvature import HessianOperator, ParameterFilter, select_parameters
from lightning_hessian.penalties.base import Penalty, StepContext

Method = Literal["autograd"]
Drop = Literal["tensor", "element"]

MOST_EXACT = 10_000
"""The most parameters for which ``probes=-1`` is accepted."""


class HessianTrace(Penalty):
    r"""tr(H), H the Hessian of the batch-mean loss with respect to the parameters: flat minima.

    Hutchinson's estimate, with fresh probes each step (one fixed probe can be gamed by the network):

    .. math:: \mathrm{tr}(H) = E[v'Hv], \quad v_i = \pm 1 \text{ independent}, \qquad
        \mathrm{Var}[v'Hv] = 2 \sum_{i \ne j} H_{ij}^2 .

    It is the Hessian of the loss that the step computes, in the mode the model is in (so in training mode batch norm
    normalises by the batch, and dropout is active). The trace can be negative; see ``clamp``.

    Args:
        probes: how many v to average over (1 or 2 do for training), or -1 for the exact trace by all unit vectors,
            for models of at most 10,000 chosen parameters.
        method: ``"autograd"``: v'Hv by differentiating twice, with an exact gradient.
        keep: the probability q in (0, 1] of keeping a part of v, the dropout scheme of the SEHT paper, rescaled
            so that the estimate stays unbiased. (The paper does not rescale and estimates q tr(H).)
        drop: what is kept or dropped. ``"tensor"``: whole parameter tensors, at least one kept; saves time, because
            fewer tensors are differentiated. ``"element"``: single entries, scaled by 1/sqrt(q); saves no time,
            Var = (1/q - 1) sum_i H_ii^2 + 2 sum_{i != j} H_ij^2.
        parameters: restrict the trace to these: a glob on names (``"*.weight"``), a list of globs, or a predicate
            ``(name, parameter) -> bool``. By default all that require a gradient.
        clamp: a lower bound on the value that enters the loss, for example 0; below it the penalty has no gradient.
            The logged value is the raw one.

    Raises:
        ValueError: an argument is out of its range.

    Source:
        Liu, Yu, Lin 2022, "Regularizing Deep Neural Networks with Stochastic Estimators of Hessian Trace"
        (arXiv 2208.05924); Hutchinson 1990.

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
    ) -> None:
        count_or_all("probes", probes, "the exact trace")
        choice("method", method, get_args(Method))
        if not is_number(keep) or not 0 < float(keep) <= 1:
            raise ValueError(f"keep={keep!r} is a probability and must lie in (0, 1].")
        choice("drop", drop, get_args(Drop))
        if probes == -1 and keep < 1:
            raise ValueError(f"probes=-1 asks for the exact trace and keep={keep} for a random part of it: choose one.")
        if clamp is not None and not (is_number(clamp) and math.isfinite(clamp)):
            raise ValueError(f"clamp={clamp!r} must be a finite number, the lower bound of the penalty, or None.")
        self.probes = probes
        self.method = method
        self.keep = keep
        self.drop = drop
        self.parameters = parameters
        self.clamp = clamp

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
        chosen = list(select_parameters(context.parameters, self.parameters).values())
        if self.probes == -1:
            return _exact_trace(HessianOperator(context.loss, chosen, differentiable=True))
        if self.keep < 1 and self.drop == "tensor":
            return self._over_kept_tensors(context, chosen)
        hessian = HessianOperator(context.loss, chosen, differentiable=True)
        probes = [self._probe(context, hessian, index) for index in range(self.probes)]
        return torch.stack([hessian.quadratic_form(v) for v in probes]).mean()

    def _probe(self, context: StepContext, hessian: HessianOperator, index: int) -> Tensor:
        where = (hessian.device, hessian.dtype)
        if self.keep < 1:
            return context.probes.sparse_rademacher(hessian.size, self.keep, index, *where)
        return context.probes.rademacher(hessian.size, index, *where)

    def _over_kept_tensors(self, context: StepContext, chosen: list[Tensor]) -> Tensor:
        draws = [context.probes.kept_tensors(len(chosen), self.keep, i) for i in range(self.probes)]
        # One first gradient serves all probes; it stops at the tensors that no probe keeps.
        needed = sorted({tensor for kept, _ in draws for tensor in kept})
        hessian = HessianOperator(context.loss, [chosen[i] for i in needed], differentiable=True)
        terms = []
        for index, (kept, factor) in enumerate(draws):
            only = [needed.index(i) for i in kept]
            size = sum(hessian.sizes[i] for i in only)
            v = context.probes.rademacher(size, index, hessian.device, hessian.dtype)
            terms.append(factor * hessian.quadratic_form(v, only))
        return torch.stack(terms).mean()

    def term(self, value: Tensor) -> Tensor:
        return value if self.clamp is None else value.clamp(min=self.clamp)

    def __repr__(self) -> str:
        return f"HessianTrace(probes={self.probes}, method={self.method!r}, keep={self.keep}, drop={self.drop!r})"


def _exact_trace(hessian: HessianOperator) -> Tensor:
    """sum_i e_i'He_i, one row at a time."""
    diagonal = []
    for gradient, tensor in zip(hessian.gradient, hessian.tensors, strict=True):
        if not gradient.requires_grad:
            continue
        for i, entry in enumerate(gradient.reshape(-1)):
            (row,) = torch.autograd.grad(entry, tensor, create_graph=True, allow_unused=True, materialize_grads=True)
            diagonal.append(row.reshape(-1)[i])
    return torch.stack(diagonal).sum() if diagonal else hessian.gradient[0].new_zeros(())
