"""Sharpness-aware minimization (SAM): the loss at the worst point near the weights, to first order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_hessian.arguments import choice, is_number
from lightning_hessian.curvature import ParameterFilter
from lightning_hessian.curvature.sharding import dot, local
from lightning_hessian.penalties.base import Needs, WeightPenalty
from lightning_hessian.penalties.differences import AscentDifference, DifferenceContext
from lightning_hessian.penalties.step_context import StepContext

Ascent = Literal["rank", "global"]


class SharpnessAware(WeightPenalty):
    r"""The sharpness L(theta + e) - L(theta), where e is the step of length rho along the gradient g of L.

    .. math:: e = \rho \, g / \lVert g \rVert_2, \qquad
        \text{adaptive:}\quad e = \rho \, T^2 g / \lVert T g \rVert_2, \quad T = \operatorname{diag}(|\theta|) .

    Its gradient is g(theta + e) - g(theta), with e constant. So with ``strength=1``, the default for this penalty,
    the training step is that of SAM (with ``adaptive=True``, of ASAM): the gradient of L(theta + e). A strength below 1
    interpolates between the plain step and SAM. A step costs two ordinary passes, which run wherever training runs:
    compiled, in float16, or sharded by FSDP2.

    The second pass leaves no trace: it has the dropout masks of the first, and does not change the running statistics
    of batch norm. With gradient accumulation each micro-batch takes an ascent step of its own, and their gradients are
    averaged (m-sharpness). Under DDP each process does so for its batch, as in the papers, or all take the same.

    Args:
        rho: the length of the ascent step, positive. Usual values are 0.05 to 0.2, and 0.2 to 2 if ``adaptive``.
        adaptive: measure the step relative to the size of each weight (ASAM).
        ascent: under DDP, along the gradient of the process's own batch (``"rank"``), or of all batches together
            (``"global"``, one more all-reduce). With FSDP2 it is always the latter.
        parameters: restrict the ascent to these: a glob on names (``"*.weight"``), a list of globs, or a predicate
            ``(name, parameter) -> bool``. Default: all that require a gradient.

    Raises:
        ValueError: an argument is out of range.

    Source:
        Foret et al. 2020 (SAM, arXiv 2010.01412); Kwon et al. 2021 (ASAM, arXiv 2102.11600).

    Example:
        >>> import lightning as L
        >>> from lightning_hessian import HessianRegularizer, SharpnessAware
        >>> trainer = L.Trainer(
        ...     callbacks=[HessianRegularizer(SharpnessAware(rho=0.05))],
        ...     logger=False, enable_checkpointing=False,
        ... )
    """

    name = "sharpness"
    needs = Needs(derivatives=1, differences=True, whole_parameters=False)
    default_strength = 1.0
    scales_with_interval = False  # above 1, the step extrapolates beyond SAM's

    def __init__(
        self,
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        ascent: Ascent = "rank",
        parameters: ParameterFilter = None,
    ) -> None:
        super().__init__(parameters)
        if not is_number(rho) or not 0 < float(rho) < math.inf:
            raise ValueError(f"rho={rho!r} must be a positive number: the length of the ascent step. 0.05 is a start.")
        if not isinstance(adaptive, bool):
            raise ValueError(f"adaptive={adaptive!r} must be true or false.")
        choice("ascent", ascent, get_args(Ascent))
        self.rho = float(rho)
        self.adaptive = adaptive
        self.ascent = ascent

    def value(self, context: StepContext) -> Tensor:
        """Raise an error, because the loss is already computed."""
        raise ValueError(
            f"{self!r} runs the step at other parameters, but this loss is already computed. Use HessianRegularizer or "
            "the mixin."
        )

    def differences(self, context: DifferenceContext) -> list[AscentDifference]:
        tensors = list(self.selected(context).values())

        def displacement(g: Sequence[Tensor]) -> list[Tensor]:
            scaled = [x * local(t).abs() for x, t in zip(g, tensors, strict=True)] if self.adaptive else g
            norm = dot(scaled, scaled, like=tensors[0]).sqrt()
            factor = torch.where(norm > 0, self.rho / norm, 0)
            if self.adaptive:
                scaled = [x * local(t).abs() for x, t in zip(scaled, tensors, strict=True)]
            return list(torch._foreach_mul(list(scaled), factor))

        return [
            AscentDifference(
                tensors=tensors,
                displacement=displacement,
                weight=context.strength,
                over_ranks=self.ascent == "global",
            )
        ]

    def __repr__(self) -> str:
        return f"SharpnessAware(rho={self.rho:g}, adaptive={self.adaptive})"
