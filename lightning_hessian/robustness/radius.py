"""Second-order estimate of how far an input can move before its class changes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_hessian.arguments import whole_number
from lightning_hessian.curvature import ProbeSource, SampleHessians, gaussian, higher_order
from lightning_hessian.curvature.eigenvectors import lanczos
from lightning_hessian.curvature.vectors import normalize_rows
from lightning_hessian.robustness.attacks import Model, logits_of, runner_up, undisturbed


def radius_estimate(model: Model, x: Tensor, y: Tensor, iterations: int = 5) -> Tensor:
    r"""The L2 distance from x at which the margin's second-order lower bound reaches zero.

    .. math:: m(x + d) \ge m - a \lVert d \rVert - \tfrac{M}{2} \lVert d \rVert^2, \qquad
        r = \frac{2m}{a + \sqrt{a^2 + 2Mm}}

    for each sample, where m = z_y - z_k is the margin over the runner-up class k, a = ||grad_x m||, and M is the
    largest absolute eigenvalue of Hessian_x m.

    This is a *local estimate, not a certificate*. The bound holds with the largest M along the way, but this M is a
    lower estimate (Lanczos) at x only, and k is a single class. A ReLU network shows no curvature at all. An attack
    such as :class:`PGD` gives an upper bound of the true distance.

    Args:
        model: x -> logits of shape (samples, classes). It runs in evaluation mode, and its state is restored.
        x: floating-point inputs of shape (samples, ...).
        y: the classes, of shape (samples,).
        iterations: Hessian-vector products for M, at least 1. M is exact from the number of a sample's entries on.

    Returns:
        r >= 0, of shape (samples,), in the units of x: 0 if the sample is misclassified, infinity if the margin's
        gradient and Hessian are zero.

    Raises:
        ValueError: ``iterations`` is too small; x is not floating-point; y or the logits are invalid.
        HigherOrderError: an operator is not twice differentiable.

    Source:
        Singla & Feizi 2020 (arXiv 2006.00731), who obtain a certificate by bounding M over all inputs.

    Example:
        >>> model = lambda x: torch.stack([4 - x.square().sum(1), 0 * x.sum(1)], 1)  # class 0: the disc of radius 2
        >>> radius_estimate(model, torch.tensor([[0.5, 0.0], [3.0, 0.0]]), torch.tensor([0, 0])).round(decimals=3)
        tensor([1.5000, 0.0000])
    """
    whole_number("iterations", iterations, least=1)
    if not x.is_floating_point():
        raise ValueError(
            f"x is of type {x.dtype}, but only floating-point inputs have a gradient. Convert it to floating point."
        )
    with undisturbed(model, x):
        # In float32 or higher precision. Clones, because inference tensors have no derivatives.
        point = x.detach().clone().to(torch.promote_types(x.dtype, torch.float32)).requires_grad_()
        y = y.detach().clone()
        with higher_order(model if isinstance(model, nn.Module) else None) as context:
            logits = logits_of(model, point.to(x.dtype), y)
        _, other = runner_up(logits, y)
        own, others = (logits.gather(1, k.unsqueeze(1).long()).squeeze(1) for k in (y, other))
        # Samples are independent in evaluation mode, so the sum's derivatives are those of each sample.
        margin = own - others
        with context.explained():
            slope, curvature = _slope_and_curvature(SampleHessians(margin.sum(), [point]), iterations)
    margin = margin.detach().to(slope.dtype)
    distance = 2 * margin / (slope + (slope.square() + 2 * curvature * margin).sqrt())
    return torch.where(margin > 0, distance, 0)


def _slope_and_curvature(margins: SampleHessians, iterations: int) -> tuple[Tensor, Tensor]:
    """||grad|| and ||Hessian|| of each sample's margin, of shape (samples,)."""
    gradient = margins.gradient.detach()
    # Start along the gradient, where curvature is often large. The random part covers every eigenvector.
    noise = ProbeSource().draw(gradient.numel(), 0, gradient.device, gradient.dtype, gaussian).view_as(gradient)
    v = lanczos(margins.matvec, normalize_rows(gradient) + normalize_rows(noise) / 2, iterations)
    return torch.linalg.vector_norm(gradient, dim=1), torch.linalg.vector_norm(margins.matvec(v), dim=1)
