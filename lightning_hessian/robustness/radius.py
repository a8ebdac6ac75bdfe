"""How far can an input move before its class changes? A second-order estimate."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_hessian.arguments import whole_number
from lightning_hessian.curvature import ProbeSource, SampleHessians, gaussian, higher_order
from lightning_hessian.curvature.eigenvectors import lanczos
from lightning_hessian.curvature.vectors import normalize_rows
from lightning_hessian.robustness.attacks import Model, logits_of, runner_up, undisturbed


def radius_estimate(model: Model, x: Tensor, y: Tensor, iterations: int = 5) -> Tensor:
    r"""The L2 distance at which the margin's second-order lower bound around x reaches zero.

    .. math:: m(x + d) \ge m - a \lVert d \rVert - \tfrac{M}{2} \lVert d \rVert^2, \qquad
        r = \frac{2m}{a + \sqrt{a^2 + 2Mm}}

    with the margin m = z_y - z_k over the runner-up class k, a = ||grad_x m|| and M = ||Hessian_x m||, the largest
    absolute eigenvalue, per sample.

    A *local estimate and no certificate*: the bound holds with the largest M on the way, and this one is measured at x
    only, from below (by Lanczos), for one class k. It sees no curvature at all in a ReLU network. An attack such as
    :class:`PGD` tells from the other side.

    Args:
        model: x -> logits of shape (samples, classes). In evaluation mode during the call; left as found.
        x: floating-point inputs of shape (samples, ...).
        y: the classes, of shape (samples,).
        iterations: Hessian-vector products for M, at least 1; exact from the number of a sample's entries on.

    Returns:
        r >= 0, of shape (samples,), in the units of x: 0 where the sample is misclassified, infinity where the margin
        neither slopes nor curves.

    Raises:
        ValueError: ``iterations`` is too small; x is not floating-point; y or the logits do not fit.
        HigherOrderError: an operator cannot be differentiated twice.

    Source:
        Singla & Feizi 2020 (arXiv 2006.00731), who bound M over all inputs and so certify.

    Example:
        >>> model = lambda x: torch.stack([4 - x.square().sum(1), 0 * x.sum(1)], 1)  # class 0: the disc of radius 2
        >>> radius_estimate(model, torch.tensor([[0.5, 0.0], [3.0, 0.0]]), torch.tensor([0, 0])).round(decimals=3)
        tensor([1.5000, 0.0000])
    """
    whole_number("iterations", iterations, least=1)
    if not x.is_floating_point():
        raise ValueError(f"x is of type {x.dtype}, and only floating-point inputs have a gradient.")
    with undisturbed(model, x):
        # In float32 or better; clones, because what was made in inference mode has no derivatives.
        point = x.detach().clone().to(torch.promote_types(x.dtype, torch.float32)).requires_grad_()
        y = y.detach().clone()
        with higher_order(model if isinstance(model, nn.Module) else None) as context:
            logits = logits_of(model, point.to(x.dtype), y)
        _, other = runner_up(logits, y)
        own, others = (logits.gather(1, k.unsqueeze(1).long()).squeeze(1) for k in (y, other))
        # Samples do not mix in evaluation mode: the sum's derivatives are each sample's own.
        margin = own - others
        with context.explained():
            slope, curvature = _slope_and_curvature(SampleHessians(margin.sum(), [point]), iterations)
    margin = margin.detach().to(slope.dtype)
    distance = 2 * margin / (slope + (slope.square() + 2 * curvature * margin).sqrt())
    return torch.where(margin > 0, distance, 0)


def _slope_and_curvature(margins: SampleHessians, iterations: int) -> tuple[Tensor, Tensor]:
    """||grad|| and ||Hessian|| of each sample's margin, of shape (samples,)."""
    gradient = margins.gradient.detach()
    # Along the gradient the curvature is often large; the random part leaves no eigenvector out.
    noise = ProbeSource().draw(gradient.numel(), 0, gradient.device, gradient.dtype, gaussian).view_as(gradient)
    v = lanczos(margins.matvec, normalize_rows(gradient) + normalize_rows(noise) / 2, iterations)
    return torch.linalg.vector_norm(gradient, dim=1), torch.linalg.vector_norm(margins.matvec(v), dim=1)
