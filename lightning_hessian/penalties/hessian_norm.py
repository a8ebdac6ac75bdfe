"""The operator norm of the weight Hessian."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

from torch import Tensor

from lightning_hessian.arguments import choice, positive_or_none, whole_number
from lightning_hessian.curvature import ParameterFilter
from lightning_hessian.penalties.base import Needs, WeightPenalty
from lightning_hessian.penalties.differences import DifferenceContext, SecondDifference
from lightning_hessian.penalties.norm_estimators import AutogradNorm, CentralDifferenceNorm, NormEstimator, PowerVector
from lightning_hessian.penalties.step_context import StepContext

Method = Literal["autograd", "central_difference"]


class HessianNorm(WeightPenalty):
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
        *,
        parameters: ParameterFilter = None,
        step: float | None = None,
    ) -> None:
        super().__init__(parameters)
        whole_number("iterations", iterations, 1, "the power iterations of a step")
        choice("method", method, get_args(Method))
        positive_or_none("step", step, "how far the parameters move")
        if step is not None and method != "central_difference":
            raise ValueError(f"step={step} is that of method='central_difference', not {method!r}.")
        self.iterations = iterations
        self.method = method
        self.step = step
        self._vector = PowerVector()

    @property
    def needs(self) -> Needs:
        return self.estimator.needs

    def value(self, context: StepContext) -> Tensor:
        return self.estimator.value(context)

    def differences(self, context: DifferenceContext) -> list[SecondDifference]:
        return self.estimator.differences(context)

    def with_fixed_direction(self, context: StepContext) -> Callable[[StepContext], Tensor]:
        return self.estimator.with_fixed_direction(context)

    def state_dict(self) -> dict[str, Any]:
        """v by the names of the parameters, and the sign of v'Hv; empty before the first step."""
        return self._vector.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._vector.load_state_dict(state)

    @property
    def estimator(self) -> NormEstimator:
        """The object that computes the value in the way that ``method`` names."""
        shared: dict[str, Any] = {"selected": self.selected, "iterations": self.iterations, "vector": self._vector}
        if self.method == "autograd":
            return AutogradNorm(**shared)
        return CentralDifferenceNorm(**shared, step=self.step)

    def __repr__(self) -> str:
        return f"HessianNorm(iterations={self.iterations}, method={self.method!r})"
