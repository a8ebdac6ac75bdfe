"""The Gauss-Newton matrix of a loss, from the calls of its loss functions."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_hessian.curvature.losses import LossCall, watch_losses
from lightning_hessian.curvature.probes import ProbeSource, rademacher


def random_factors(losses: watch_losses, loss: Tensor, probes: ProbeSource, index: int) -> list[tuple[Tensor, Tensor]]:
    r"""Pairs (z, S u) with E_u [J' S u (J' S u)'] = G, where J is the outputs' Jacobian by anything.

    .. math:: G = \sum_e J_e' S_e S_e' J_e, \qquad S_e S_e' = \frac{\partial^2 L}{\partial z_e^2}, \qquad u = \pm 1

    e counts the elements of the loss (samples, or pixels, or tokens). With a the element's weight in L and p the
    predicted probabilities,

    - cross entropy: S S' = a (diag p - p p'), S u = sqrt(a) (sqrt(p) u - p sqrt(p)'u);
    - binary cross entropy with logits: S u = sqrt(a p (1 - p)) u;
    - squared error: S u = sqrt(2 a) u.

    Class weights, ignored targets, label smoothing, reductions and factors of the step's own are in a.

    Args:
        losses: the calls of loss functions seen in the step.
        loss: the step's loss, with its graph.
        probes: where u comes from.
        index: of the probe.

    Returns:
        For each call the outputs z and S u, of z's shape and with their graph.

    Raises:
        ValueError: no loss function was seen, one has no such formula, or an element's weight is negative.

    Source:
        Schraudolph 2002; Dauphin et al. 2024 (arXiv 2401.10809) on training with its trace.
    """
    calls = losses.calls_in(loss)
    if not calls:
        raise ValueError(
            "The Gauss-Newton matrix is made of the loss's curvature in the outputs, and no loss function was seen in "
            "the step: the loss comes from none of cross_entropy, binary_cross_entropy_with_logits, mse_loss or their "
            "modules. Call one of them, or use method='autograd' or method='two_pass'."
        )
    factors = []
    for position, call in enumerate(calls):
        z = call.outputs
        generator = probes.generator(index * len(calls) + position, z.device)
        exact = torch.promote_types(z.dtype, torch.float32)
        u = rademacher(z.numel(), generator, exact).view_as(z)
        factors.append((z, _factor(call, loss, z, z.to(exact), u).to(z.dtype)))
    return factors


def _factor(call: LossCall, loss: Tensor, outputs: Tensor, z: Tensor, u: Tensor) -> Tensor:
    """S u at the call's outputs, z in float32 or better."""
    if call.function is F.cross_entropy:
        classes = 1 if z.dim() > 1 else 0
        a = _weight(call, loss, at=torch.zeros_like(z), value=math.log(z.size(classes))).unsqueeze(classes)
        log_p = z.log_softmax(classes)
        root = (log_p / 2).exp()
        return a.sqrt() * (root * u - log_p.exp() * (root * u).sum(classes, keepdim=True))
    if call.function is F.binary_cross_entropy_with_logits:
        a = _weight(call, loss, at=torch.zeros_like(z), value=math.log(2))
        return (a * z.sigmoid() * (-z).sigmoid()).sqrt() * u
    if call.function is F.mse_loss:
        other = call.arguments["target"] if outputs is call.arguments["input"] else call.arguments["input"]
        return (2 * _weight(call, loss, at=other.detach().to(z.dtype) + 1, value=1.0)).sqrt() * u
    raise ValueError(
        f"The step calls {call.function.__name__}, whose Gauss-Newton matrix is not known here: it is for "
        "cross_entropy, binary_cross_entropy_with_logits and mse_loss. Use one of these, or method='autograd' or "
        "method='two_pass'."
    )


def _weight(call: LossCall, loss: Tensor, at: Tensor, value: float) -> Tensor:
    """a, of the elements' shape: what an element adds to the loss at the outputs ``at``, where one of weight 1 has
    ``value``."""
    with torch.no_grad():
        name = "input" if call.outputs is call.arguments["input"] else "target"
        elements = call.function(**{**call.arguments, name: at, "reduction": "none"})
        a = call.weights(loss) * elements / value
    if (a < 0).any():
        raise ValueError(
            f"The call of {call.function.__name__} enters the loss with a negative factor, so its Gauss-Newton matrix "
            "is not positive. Use method='autograd' or method='two_pass'."
        )
    return a
