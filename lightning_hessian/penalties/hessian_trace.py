"""The trace of the weight Hessian."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

from torch import Tensor

from lightning_hessian.arguments import choice, count_or_all, is_number, positive_or_none
from lightning_hessian.curvature import Distribution, ParameterFilter, select_parameters
from lightning_hessian.curvature.probes import distribution_of
from lightning_hessian.penalties.base import Needs, WeightPenalty
from lightning_hessian.penalties.differences import DifferenceContext, SecondDifference
from lightning_hessian.penalties.step_context import StepContext
from lightning_hessian.penalties.trace_estimators import (
    AutogradTrace,
    CentralDifferenceTrace,
    Drop,
    ExactTrace,
    GaussNewtonTrace,
    TraceEstimator,
    TraceProbes,
    TwoPassTrace,
    filter_sizes,
    no_sizes,
)

Method = Literal["autograd", "two_pass", "central_difference", "gauss_newton"]
Scale = Literal["none", "parameter"]

MOST_EXACT = 10_000
"""The most parameters for which ``probes=-1`` is accepted."""


class HessianTrace(WeightPenalty):
    r"""tr(H), H the Hessian of the batch-mean loss with respect to the parameters: flat minima.

    Hutchinson's estimate, with fresh probes each step (one fixed probe can be gamed by the network):

    .. math:: \mathrm{tr}(H) = E[v'Hv], \quad E[v v'] = I .

    With entries +-1 (the default), Var[v'Hv] = 2 sum_{i != j} H_ij^2; with normal ones, 2 sum_ij H_ij^2.

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
          S_i S_i' = \partial^2 L / \partial z_i^2, \quad E[u u'] = I.

      For piecewise-linear networks without batch norm G = H. The outputs are seen where the step calls cross entropy,
      binary cross entropy with logits, or MSE. It is another number than tr(H), and its name in logs is
      ``gauss_newton_trace``.

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
        distribution: of the probes' entries: ``"rademacher"`` (+-1, the least variance), ``"gaussian"``, or a function,
            see :data:`~lightning_hessian.curvature.Distribution`.
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

    def __init__(
        self,
        probes: int = 1,
        method: Method = "autograd",
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
            raise ValueError(f"probes=-1 asks for the exact trace and keep={keep} for a random part of it: choose one.")
        if clamp is not None and not (is_number(clamp) and math.isfinite(clamp)):
            raise ValueError(f"clamp={clamp!r} must be a finite number, the lower bound of the penalty, or None.")
        positive_or_none("step", step, "by how much each entry moves")
        if probes == -1 and method != "autograd":
            raise ValueError(f"probes=-1, the exact trace, is for method='autograd', not {method!r}.")
        if clamp is not None and method in ("two_pass", "central_difference"):
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
        self.clamp = clamp
        self.scale = scale
        self.distribution = distribution
        self.step = step

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
                f"probes=-1 would take {size:,} Hessian-vector products a step, one for each parameter. "
                f"It is meant for at most {MOST_EXACT:,}: use probes=1, which is unbiased, or choose fewer "
                "`parameters`."
            )

    def value(self, context: StepContext) -> Tensor:
        return self.estimator.value(context)

    def differences(self, context: DifferenceContext) -> list[SecondDifference]:
        return self.estimator.differences(context)

    def term(self, value: Tensor) -> Tensor:
        return value if self.clamp is None else value.clamp(min=self.clamp)

    def with_fixed_direction(self, context: StepContext) -> Callable[[StepContext], Tensor]:
        if self.scale == "none":
            return self
        estimator = self.estimator
        sizes = estimator.sizes(list(self.selected(context).values()))
        fixed = replace(estimator, sizes=lambda tensors: sizes)
        return lambda other: self.term(fixed.value(other))

    @property
    def estimator(self) -> TraceEstimator:
        """The object that computes the value in the way that ``method`` names."""
        distribution = distribution_of(self.distribution)
        probes = TraceProbes(count=self.probes, distribution=distribution, keep=self.keep, drop=self.drop)
        sizes = filter_sizes if self.scale == "parameter" else no_sizes
        if self.method == "central_difference":
            return CentralDifferenceTrace(selected=self.selected, probes=probes, sizes=sizes, step=self.step)
        if self.probes == -1:
            return ExactTrace(selected=self.selected, probes=probes, sizes=sizes)
        ways: dict[str, type[Any]] = {
            "autograd": AutogradTrace,
            "two_pass": TwoPassTrace,
            "gauss_newton": GaussNewtonTrace,
        }
        return ways[self.method](selected=self.selected, probes=probes, sizes=sizes)

    def __repr__(self) -> str:
        return f"HessianTrace(probes={self.probes}, method={self.method!r}, keep={self.keep}, drop={self.drop!r})"
