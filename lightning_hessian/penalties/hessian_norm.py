"""The operator norm of the weight Hessian."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_hessian.arguments import choice, positive_or_none, whole_number
from lightning_hessian.curvature import (
    HessianOperator,
    ParameterFilter,
    ProbeSource,
    power_iteration,
    select_parameters,
)
from lightning_hessian.curvature.eigenvectors import unit
from lightning_hessian.curvature.parameters import check_filter
from lightning_hessian.penalties.base import Difference, Penalty, Product, StepContext, needs_own_runs

Method = Literal["autograd", "central_difference"]

FIRST_SEARCH = 5
"""Iterations to spend in addition where there is no v yet."""


class HessianNorm(Penalty):
    r"""||H||_2, H the Hessian of the batch-mean loss with respect to the parameters: its largest absolute eigenvalue.

    Power iteration that goes on from step to step: a unit vector v over the parameters is kept, and

    .. math:: \|H\|_2 \approx \|Hv\| = u'Hv, \qquad u = Hv / \|Hv\|, \qquad v \leftarrow u .

    It is the norm for the batches of all ranks together (their mean Hessian; the mean of the ranks' norms would be
    larger): products are averaged over the ranks, and each differentiates u'H_r v, which is linear in its own Hessian
    H_r, with u and v held constant. The gradient is that of ||Hv||, and exact where v has converged. ||Hv|| is a lower
    bound of the norm, and right also where +lambda and -lambda tie.

    Each batch has a Hessian of its own, so v follows a moving target, and lags where the top eigenvalue has rivals of
    nearly its size. With accumulation of gradients the iteration goes on over the micro-batches, and what is penalized
    is the mean of their norms; it also goes on over the calls of an optimizer's closure. The first step of a run
    searches with 5 iterations more, from a random vector. So does one after the chosen parameters have changed (layers
    unfrozen, a checkpoint of another model), with a warning. A step that fails leaves v alone, and so does one whose
    penalty is not finite.

    It is the Hessian of the loss that the step computes, in the mode the model is in.

    The methods, and what a step costs in plain steps by operation count:

    - ``"autograd"`` (9): Hv by differentiating twice, with an exact gradient.
    - ``"central_difference"`` (3): ordinary passes at theta, theta + e v and theta - e v, which give

      .. math:: Hv \approx [g(\theta + e v) - g(\theta - e v)] / 2e, \qquad
          \nabla |v'Hv| \approx \pm [g(\theta + e v) + g(\theta - e v) - 2 g(\theta)] / e^2,

      the sign that of v'Hv at the step before. The value is |v'Hv|, at most ||Hv|| and equal to it where v has
      converged; it does not converge where +lambda and -lambda tie. For smooth models, in 32-bit precision.

    Args:
        iterations: power iterations a step, at least 1. The last carries the gradient (autograd), or is free
            (central_difference); each one more costs a Hessian-vector product, or two passes.
        method: see above.
        parameters: restrict H to these: a glob on names (``"*.weight"``), a list of globs, or a predicate
            ``(name, parameter) -> bool``. By default all that require a gradient.
        step: e of ``"central_difference"``: how far theta moves along the unit vector v. None: a sixteenth of the
            fourth root of the precision times the length of the chosen parameters, which leaves an error of 0.1 to
            4 % of the gradient in float32 (measured on small networks, at the start of training and after it).

    Raises:
        ValueError: an argument is out of its range.

    Source:
        Power iteration kept over training steps as in Yoshida and Miyato 2017 (arXiv 1705.10941), there for the norms
        of weight matrices; Hessian-vector products: Pearlmutter 1994.

    Example:
        >>> import torch
        >>> from lightning_hessian import HessianNorm, StepContext
        >>> w = torch.tensor([1.0, -2.0], requires_grad=True)
        >>> penalty = HessianNorm()
        >>> for _ in range(10):
        ...     norm = penalty(StepContext((w**3).sum(), {"w": w}))
        >>> round(norm.item(), 4)  # |6 w_1|
        12.0
        >>> torch.autograd.grad(norm, w)[0].round(decimals=4)
        tensor([ 0., -6.])
    """

    name = "hessian_norm"

    def __init__(
        self,
        iterations: int = 1,
        method: Method = "autograd",
        parameters: ParameterFilter = None,
        step: float | None = None,
    ) -> None:
        whole_number("iterations", iterations, 1, "the power iterations of a step")
        choice("method", method, get_args(Method))
        positive_or_none("step", step, "how far the parameters move")
        if step is not None and method != "central_difference":
            raise ValueError(f"step={step} is that of method='central_difference', not {method!r}.")
        self.iterations = iterations
        self.method = method
        check_filter(parameters)
        self.parameters = parameters
        self.step = step
        self._v: dict[str, Tensor] = {}
        self._sign = 1.0

    @property
    def derivatives(self) -> int:
        return 3 if self.method == "autograd" else 1

    @property
    def by_differences(self) -> bool:
        return self.method == "central_difference"

    @property
    def needs_smoothness(self) -> bool:
        return self.by_differences

    @property
    def needs_full_precision(self) -> bool:
        # A second difference by a small step is rounding in 8 bits.
        return self.by_differences

    @property
    def needs_whole_parameters(self) -> bool:
        return True  # v is

    def check(self, parameters: Mapping[str, Tensor]) -> None:
        select_parameters(parameters, self.parameters)

    def state_dict(self) -> dict[str, Any]:
        """v by the names of the parameters, and the sign of v'Hv; empty before the first step."""
        return {"v": self._v, "sign": self._sign} if self._v else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._v = dict(state.get("v", {}))
        self._sign = state.get("sign", 1.0)

    def value(self, context: StepContext) -> Tensor:
        if self.by_differences:
            raise needs_own_runs(self.method)
        u, _, product = self._iterate(context)
        self._keep(u, self._chosen(context.parameters))
        return torch.dot(u, product)

    def held(self, context: StepContext) -> Callable[[StepContext], Tensor]:
        u, v, _ = self._iterate(context)
        return lambda other: torch.dot(u, self._hessian(other).matvec(v, create_graph=True))

    def _iterate(self, context: StepContext) -> tuple[Tensor, Tensor, Tensor]:
        """u and v, and this rank's Hv with its graph."""
        hessian = self._hessian(context)

        def matvec(v: Tensor) -> Tensor:
            return context.mean_over_ranks(hessian.matvec(v[0])).unsqueeze(0)

        start, searches = self._start(self._chosen(context.parameters), context.probes)
        v = power_iteration(matvec, start.unsqueeze(0), searches)[0]
        product = hessian.matvec(v, create_graph=True)
        # Of length 0 where the product is zero: the norm has no gradient there.
        u = unit(context.mean_over_ranks(product.detach()).unsqueeze(0))[0]
        return u, v, product

    def differences(
        self, parameters: Mapping[str, Tensor], strength: float, probes: ProbeSource, product: Product
    ) -> list[Difference]:
        chosen = self._chosen(parameters)
        step = self._default_step(list(chosen.values())) if self.step is None else float(self.step)
        start, searches = self._start(chosen, probes)
        sign = self._sign

        def matvec(v: Tensor) -> Tensor:
            nonlocal sign
            found = product(difference(v[0], 1.0))
            sign = _sign(torch.dot(v[0], found))
            return found.unsqueeze(0)

        def difference(v: Tensor, weight: float) -> Difference:
            def value(product: Tensor) -> Tensor:
                form = torch.dot(v, product)
                if self._keep(unit(product.unsqueeze(0))[0], chosen):
                    self._sign = _sign(form)
                return form.abs()

            return Difference(list(chosen.values()), lambda: list(_split(v, chosen).values()), step, weight, value)

        v = power_iteration(matvec, start.unsqueeze(0), searches)[0]
        return [difference(v, sign * strength / step**2)]

    def _default_step(self, chosen: Sequence[Tensor]) -> float:
        # The error of a second difference of gradients is O(e^2) + O(eps / e^2). The first is larger along v, where the
        # loss curves most, than along the trace's probes: their step is eight times as long.
        share = torch.finfo(chosen[0].dtype).eps ** 0.25 / 16
        return share * torch.stack([tensor.detach().square().sum() for tensor in chosen]).sum().sqrt().item()

    def _chosen(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return select_parameters(parameters, self.parameters)

    def _hessian(self, context: StepContext) -> HessianOperator:
        return HessianOperator(context.loss, self._chosen(context.parameters).values(), differentiable=True)

    def _start(self, chosen: Mapping[str, Tensor], probes: ProbeSource) -> tuple[Tensor, int]:
        """The v to begin with, flat, and how many iterations to search before the last one."""
        first = next(iter(chosen.values()))
        if self._v and _shapes(self._v) == _shapes(chosen):
            flat = torch.cat([self._v[name].reshape(-1) for name in chosen])
            return flat.to(first.device, first.dtype), self.iterations - 1
        if self._v:
            changed = sorted(set(_shapes(self._v).items()) ^ set(_shapes(chosen).items()))
            warnings.warn(
                f"HessianNorm's vector belongs to other parameters than those it is to penalize (the first that "
                f"differs: {changed[0][0]!r}): it is searched for anew.",
                stacklevel=2,
            )
        size = sum(tensor.numel() for tensor in chosen.values())
        # All ranks search for one vector.
        random = probes.shared().rademacher(size, 0, first.device, first.dtype)
        return random, self.iterations - 1 + FIRST_SEARCH

    def _keep(self, u: Tensor, chosen: Mapping[str, Tensor]) -> bool:
        """Go on from u at the next step, unless it is zero or not a number."""
        usable = u.square().sum().item() > 0
        if usable:
            self._v = _split(u, chosen)
        return usable

    def __repr__(self) -> str:
        return f"HessianNorm(iterations={self.iterations}, method={self.method!r})"


def _split(v: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A flat vector as parts of the parameters' shapes, by name."""
    parts = v.split([tensor.numel() for tensor in like.values()])
    return {name: part.view_as(tensor) for part, (name, tensor) in zip(parts, like.items(), strict=True)}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _sign(value: Tensor) -> float:
    return -1.0 if value.item() < 0 else 1.0
