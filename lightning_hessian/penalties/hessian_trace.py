"""The trace of the weight Hessian."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from torch import Tensor

from lightning_hessian.arguments import choice, count_or_all, is_number, positive_or_none
from lightning_hessian.curvature import Distribution, ParameterFilter, select_parameters
from lightning_hessian.curvature.probes import distribution_of
from lightning_hessian.curvature.taylor import taylor_mode
from lightning_hessian.penalties.base import Needs, WeightPenalty
from lightning_hessian.penalties.differences import DifferenceContext, SecondDifference
from lightning_hessian.penalties.step_context import ForwardContext, StepContext
from lightning_hessian.penalties.trace_estimators import (
    AutogradTrace,
    CentralDifferenceTrace,
    Drop,
    ExactTrace,
    GaussNewtonTrace,
    Sizes,
    TaylorTrace,
    TraceEstimator,
    TraceProbes,
    TwoPassTrace,
    filter_sizes,
    no_sizes,
)

Method = Literal["taylor", "autograd", "two_pass", "central_difference", "gauss_newton"]
Scale = Literal["none", "parameter"]

MOST_EXACT = 10_000
"""Maximum number of parameters for ``probes=-1``."""


class HessianTrace(WeightPenalty):
    r"""tr(H), where H is the Hessian of the batch-mean loss with respect to the parameters. It favors flat minima.

    Hutchinson's estimator, with new probes each step, because a network could adapt to a fixed probe:

    .. math:: \mathrm{tr}(H) = E[v'Hv], \quad E[v v'] = I .

    With entries +-1 (the default), Var[v'Hv] = 2 sum_{i != j} H_ij^2; with Gaussian ones, 2 sum_ij H_ij^2.

    H is the Hessian of the loss that the step computes, in the model's current mode. So in training mode batch norm
    uses the batch's statistics, and dropout is active. The trace can be negative; see ``clamp``.

    The methods, with the cost of a step in plain steps, by operation count:

    - ``"taylor"`` (4.3): v'Hv is the loss's second Taylor coefficient along theta + t v,

      .. math:: L(\theta + t v) = L + t \, g'v + \tfrac{t^2}{2} v'Hv + O(t^3),

      carried through the forward pass, and one ordinary backward pass gives its exact gradient. Compiled models stay
      compiled. See :class:`~lightning_hessian.curvature.taylor.taylor_mode` for what it refuses.
    - ``"autograd"`` (9): the same value and gradient, by double differentiation.
    - ``"two_pass"`` (2): replaces the step's loss by its mean over theta + s v and theta - s v, two ordinary passes,

      .. math:: \tfrac12 [L(\theta + s v) + L(\theta - s v)] = L + \tfrac{s^2}{2} v'Hv + O(s^4), \qquad
          s = \sqrt{2 \cdot \text{strength}},

      so it runs wherever ordinary training runs: compiled models, fused attention, float16, sharded parameters.
      What the step logs and updates (task loss, metrics, batch norm's running statistics) comes from its first run, at
      theta + s v. For strengths above about 1e-4 recompute the running statistics before evaluation
      (``torch.optim.swa_utils.update_bn``).
    - ``"central_difference"`` (3): the same difference with a separate step e,

      .. math:: v'Hv = [L(\theta + e v) + L(\theta - e v) - 2 L(\theta)] / e^2 + O(e^2).

    - ``"gauss_newton"`` (about 3): tr(G), where G is the part of H from the loss's curvature in the outputs. It is
      never negative.

      .. math:: \mathrm{tr}(G) = E_u \lVert \textstyle\sum_i J_i' S_i u_i \rVert^2, \qquad
          S_i S_i' = \partial^2 L / \partial z_i^2, \quad E[u u'] = I.

      For piecewise-linear networks without batch norm G = H. The outputs are detected in the step's calls of cross
      entropy, binary cross entropy with logits, or MSE. tr(G) differs from tr(H), so its log name is
      ``gauss_newton_trace``.

    With kinks (ReLU, max-pooling) the two difference methods estimate the trace of the loss *smoothed* over the step,
    which includes the kinks. autograd and taylor ignore kinks.

    Args:
        probes: number of probes v to average over (1 or 2 suffice for training). -1: the exact trace from all unit
            vectors, for at most 10,000 selected parameters (autograd and taylor, which take it by autograd).
        method: see above.
        keep: probability q in (0, 1] of keeping a part of v, the dropout scheme of the SEHT paper, rescaled so that
            the estimate is unbiased. (The paper does not rescale and estimates q tr(H).)
        drop: the parts to keep or drop. ``"tensor"``: whole parameter tensors, at least one is kept. It saves time with
            autograd, which differentiates fewer tensors. ``"element"``: single entries, scaled by 1/sqrt(q). It saves
            no time; Var = (1/q - 1) sum_i H_ii^2 + 2 sum_{i != j} H_ij^2.
        parameters: restrict the trace to these: a glob on names (``"*.weight"``), a list of globs, or a predicate
            ``(name, parameter) -> bool``. Default: all that require a gradient.
        clamp: lower bound of the value in the loss, for example 0; below it the gradient is zero. The logged value is
            not clamped. Not with the two difference methods.
        scale: ``"parameter"`` measures tr(D H D) instead: curvature along *relative* changes. D is the size of each
            filter (root mean square over all dimensions but the first; for biases and other vectors the absolute value
            of each entry), a constant under differentiation. The result is invariant to rescaling a layer that is
            followed by a norm.
        distribution: of the probes' entries: ``"rademacher"`` (+-1, lowest variance), ``"gaussian"``, or a function,
            see :data:`~lightning_hessian.curvature.Distribution`.
        step: e of ``"central_difference"``, the displacement of each entry (with ``scale="parameter"``, relative to its
            size). None: eps^(1/4) / 2 with the dtype's machine epsilon eps, times the root mean square of the selected
            parameters unless ``scale="parameter"``.

    Raises:
        ValueError: an argument is out of range.

    Source:
        Liu, Yu, Lin 2022, "Regularizing Deep Neural Networks with Stochastic Estimators of Hessian Trace"
        (arXiv 2208.05924); Hutchinson 1990. Taylor mode: Griewank and Walther 2008, "Evaluating Derivatives". Two
        passes: Zhang et al. 2023, "Noise Stability Optimization for Flat Minima" (arXiv 2306.08553). Filter-wise
        scale: Kwon et al. 2021, "ASAM" (arXiv 2102.11600). Gauss-Newton: Dauphin et al. 2024 (arXiv 2401.10809).

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

    def __init__(
        self,
        probes: int = 1,
        method: Method = "taylor",
        *,
        keep: float = 1.0,
        drop: Drop = "tensor",
        parameters: ParameterFilter = None,
        clamp: float | None = None,
        scale: Scale = "none",
        distribution: str | Distribution = "rademacher",
        step: float | None = None,
    ) -> None:
        super().__init__(parameters)
        count_or_all("probes", probes, "the exact trace")
        choice("method", method, get_args(Method))
        if not is_number(keep) or not 0 < float(keep) <= 1:
            raise ValueError(f"keep={keep!r} is a probability and must lie in (0, 1].")
        choice("drop", drop, get_args(Drop))
        choice("scale", scale, get_args(Scale))
        distribution_of(distribution)
        if probes == -1 and keep < 1:
            raise ValueError(f"probes=-1 is the exact trace, but keep={keep} drops a random part of it: choose one.")
        if clamp is not None and not (is_number(clamp) and math.isfinite(clamp)):
            raise ValueError(f"clamp={clamp!r} must be a finite number, the lower bound of the penalty, or None.")
        positive_or_none("step", step, "by how much each entry moves")
        if probes == -1 and method not in ("taylor", "autograd"):
            raise ValueError(f"probes=-1, the exact trace, is for method='taylor', not {method!r}.")
        if clamp is not None and method in ("two_pass", "central_difference"):
            raise ValueError(
                f"clamp={clamp} bounds the penalty term, but method={method!r} has none: its loss is a combination of "
                "passes. Use method='taylor', or 'gauss_newton', which is never negative."
            )
        if keep < 1 and method == "gauss_newton":
            raise ValueError(
                f"keep={keep} drops parts of a probe over the parameters, but the probes of gauss_newton are over the "
                "outputs. Use keep=1 or method='taylor'."
            )
        if step is not None and method != "central_difference":
            raise ValueError(f"step={step} is only for method='central_difference', not {method!r}.")
        self.probes = probes
        self.method = method
        self.keep = keep
        self.drop = drop
        self.clamp = clamp
        self.scale = scale
        self.distribution = distribution
        self.step = step
        self._fixed_sizes: Sizes = None

    @property
    def name(self) -> str:
        return self.estimator.name

    @property
    def needs(self) -> Needs:
        return self.estimator.needs

    def check(self, parameters: Mapping[str, Tensor]) -> None:
        super().check(parameters)
        size = sum(parameter.numel() for parameter in select_parameters(parameters, self.parameters).values())
        if self.probes == -1 and size > MOST_EXACT:
            raise ValueError(
                f"probes=-1 would take {size:,} Hessian-vector products per step, one for each parameter, but the "
                f"limit is {MOST_EXACT:,}. Use probes=1, which is unbiased, or select fewer `parameters`."
            )

    def value(self, context: StepContext) -> Tensor:
        return self.estimator.value(context)

    def forward_mode(self, context: ForwardContext) -> taylor_mode:
        estimator = self.estimator
        assert isinstance(estimator, TaylorTrace)
        return estimator.forward_mode(context)

    def differences(self, context: DifferenceContext) -> list[SecondDifference]:
        return self.estimator.differences(context)

    def term(self, value: Tensor) -> Tensor:
        return value if self.clamp is None else value.clamp(min=self.clamp)

    def with_fixed_direction(self, context: StepContext) -> HessianTrace:
        if self.scale == "none":
            return self
        fixed = copy.copy(self)
        fixed._fixed_sizes = self.estimator.sizes(list(self.selected(context).values()))
        return fixed

    @property
    def estimator(self) -> TraceEstimator:
        """The object that computes the value in the way that ``method`` names."""
        distribution = distribution_of(self.distribution)
        probes = TraceProbes(count=self.probes, distribution=distribution, keep=self.keep, drop=self.drop)
        sizes = filter_sizes if self.scale == "parameter" else no_sizes
        if (fixed := self._fixed_sizes) is not None:
            sizes = lambda tensors: fixed  # noqa: E731
        if self.method == "central_difference":
            return CentralDifferenceTrace(selected=self.selected, probes=probes, sizes=sizes, step=self.step)
        if self.probes == -1:
            return ExactTrace(selected=self.selected, probes=probes, sizes=sizes)
        estimators: dict[str, type[Any]] = {
            "taylor": TaylorTrace,
            "autograd": AutogradTrace,
            "two_pass": TwoPassTrace,
            "gauss_newton": GaussNewtonTrace,
        }
        return estimators[self.method](selected=self.selected, probes=probes, sizes=sizes)

    def __repr__(self) -> str:
        shown = [f"probes={self.probes}, method={self.method!r}, keep={self.keep}, drop={self.drop!r}"]
        shown += [] if self.parameters is None else [f"parameters={self.parameters!r}"]
        shown += [] if self.clamp is None else [f"clamp={self.clamp!r}"]
        shown += [] if self.scale == "none" else [f"scale={self.scale!r}"]
        return f"HessianTrace({', '.join(shown)})"
