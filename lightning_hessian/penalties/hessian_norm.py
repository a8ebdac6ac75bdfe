"""The operator norm of the weight Hessian."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

from torch import Tensor

from lightning_hessian.arguments import choice, positive_or_none, whole_number
from lightning_hessian.curvature import ParameterFilter, select_parameters
from lightning_hessian.curvature.taylor import taylor_mode
from lightning_hessian.penalties.base import Needs, WeightPenalty
from lightning_hessian.penalties.differences import DifferenceContext, SecondDifference
from lightning_hessian.penalties.norm_estimators import (
    AutogradNorm,
    CentralDifferenceNorm,
    NormEstimator,
    PowerVector,
    TaylorNorm,
)
from lightning_hessian.penalties.step_context import ForwardContext, StepContext

Method = Literal["taylor", "autograd", "central_difference"]


class HessianNorm(WeightPenalty):
    r"""||H||_2, the largest absolute eigenvalue of the weight Hessian H of the batch-mean loss.

    Power iteration, with a unit vector v over the parameters that is kept from step to step:

    .. math:: \|H\|_2 \approx |v'Hv|, \qquad v \leftarrow Hv / \|Hv\| .

    The gradient is exact for a constant v, and becomes the norm's as v converges. |v'Hv| is a lower bound of the norm.
    With several ranks, H is the mean Hessian of all ranks' batches; the mean of the ranks' norms would be larger.
    Products are averaged over ranks, and each rank differentiates +-v'H_r v, which is linear in its own Hessian H_r,
    with the sign of v'Hv.

    Each batch has its own Hessian, so v tracks a moving target and lags if other eigenvalues are nearly as large as the
    top one. The iteration also continues across micro-batches of gradient accumulation (the penalty is then the mean of
    their norms) and across calls of an optimizer's closure. The first step of a run adds 5 iterations, from a random
    vector. So does the first step after the selected parameters change (layers unfrozen, a checkpoint of another
    model), with a warning. A step that fails, or whose penalty is not finite, leaves v unchanged.

    H is the Hessian of the loss that the step computes, in the model's current mode.

    The methods, with the cost of a step in plain steps, by operation count:

    - ``"taylor"`` (5): v'Hv is the loss's second Taylor coefficient along v, as in
      :class:`~lightning_hessian.HessianTrace`. Its derivative by v is 2 Hv, so that the step's ordinary backward pass
      gives the next v, too. The first step, and ``iterations`` above 1, go by autograd.
    - ``"autograd"`` (9): the value is ||Hv|| = u'Hv, u = Hv / ||Hv||, by double differentiation, with u and v
      constant. It lies between |v'Hv| and the norm, and is correct even if +lambda and -lambda tie; v'Hv is not.
    - ``"central_difference"`` (3): ordinary passes at theta, theta + e v and theta - e v give

      .. math:: Hv \approx [g(\theta + e v) - g(\theta - e v)] / 2e, \qquad
          \nabla |v'Hv| \approx \pm [g(\theta + e v) + g(\theta - e v) - 2 g(\theta)] / e^2,

      with the sign of v'Hv from the latest product (of the previous step, if ``iterations=1``). The value is |v'Hv|,
      at most ||Hv|| and equal to it once v has converged. v does not converge if +lambda and -lambda tie. For smooth
      models, in 32-bit precision.

    Args:
        iterations: power iterations per step, at least 1. The last one carries the gradient (autograd) or is free
            (central_difference). Each additional one costs a Hessian-vector product, or two passes.
        method: see above.
        parameters: restrict H to these: a glob on names (``"*.weight"``), a list of globs, or a predicate
            ``(name, parameter) -> bool``. Default: all that require a gradient.
        step: e of ``"central_difference"``, the displacement of theta along the unit vector v. None:
            eps^(1/4) / 16 times the L2 norm of the selected parameters, with the dtype's machine epsilon eps. The
            gradient's error is then 0.1 to 4 % in float32 (on small networks, at the start of training and after it).

    Raises:
        ValueError: an argument is out of range.

    Source:
        Power iteration across training steps: Yoshida and Miyato 2017 (arXiv 1705.10941), there for the norms of weight
        matrices. Hessian-vector products: Pearlmutter 1994.

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
        method: Method = "taylor",
        *,
        parameters: ParameterFilter = None,
        step: float | None = None,
    ) -> None:
        super().__init__(parameters)
        whole_number("iterations", iterations, 1, "the power iterations per step")
        choice("method", method, get_args(Method))
        positive_or_none("step", step, "how far the parameters move")
        if step is not None and method != "central_difference":
            raise ValueError(f"step={step} is only for method='central_difference', not {method!r}.")
        self.iterations = iterations
        self.method = method
        self.step = step
        self._vector = PowerVector()

    @property
    def needs(self) -> Needs:
        return self.estimator.needs

    def needs_on(self, parameters: Mapping[str, Tensor]) -> Needs:
        selected = select_parameters(parameters, self.parameters)
        if self.needs.taylor and not self._vector.fits(selected):  # layers were unfrozen
            return Needs(derivatives=3)
        return self.needs

    def value(self, context: StepContext) -> Tensor:
        return self.estimator.value(context)

    def forward_mode(self, context: ForwardContext) -> taylor_mode:
        estimator = self.estimator
        assert isinstance(estimator, TaylorNorm)
        return estimator.forward_mode(context)

    def differences(self, context: DifferenceContext) -> list[SecondDifference]:
        return self.estimator.differences(context)

    def with_fixed_direction(self, context: StepContext) -> Callable[[StepContext], Tensor]:
        if isinstance(self.estimator, TaylorNorm):
            fixed = copy.copy(self)
            fixed._vector = self.estimator.vector_at(context)
            return fixed
        return self.estimator.with_fixed_direction(context)

    def state_dict(self) -> dict[str, Any]:
        """v by parameter name, and the sign of v'Hv. Empty before the first step."""
        return self._vector.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._vector.load_state_dict(state)

    @property
    def estimator(self) -> NormEstimator:
        """The object that computes the value in the way that ``method`` names."""
        shared: dict[str, Any] = {"selected": self.selected, "iterations": self.iterations, "vector": self._vector}
        if self.method == "taylor" and self.iterations == 1:
            return TaylorNorm(**shared)
        if self.method in ("taylor", "autograd"):
            return AutogradNorm(**shared)
        return CentralDifferenceNorm(**shared, step=self.step)

    def __repr__(self) -> str:
        return f"HessianNorm(iterations={self.iterations}, method={self.method!r})"
