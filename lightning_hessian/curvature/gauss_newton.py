"""The Gauss-Newton matrix of a loss, from the recorded calls of its loss functions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_hessian.curvature.graph import depends, leaves
from lightning_hessian.curvature.losses import LossCall, watch_losses
from lightning_hessian.curvature.probes import Distribution, ProbeSource, rademacher


def random_factors(
    losses: watch_losses,
    loss: Tensor,
    inputs: Sequence[Tensor],
    probes: ProbeSource,
    index: int,
    distribution: Distribution = rademacher,
) -> list[tuple[Tensor, Tensor]]:
    r"""Return pairs (z, S u) with E_u [J' S u (J' S u)'] = G, where J is the Jacobian of z by any tensors.

    .. math:: G = \sum_e J_e' S_e S_e' J_e, \qquad S_e S_e' = \frac{\partial^2 L}{\partial z_e^2}, \qquad E[u u'] = I

    e indexes the elements of the loss (samples, pixels or tokens). Let a be an element's weight in L, and p the
    predicted probabilities:

    - cross entropy: S S' = a (diag p - p p'), S u = sqrt(a) (sqrt(p) u - p sqrt(p)'u);
    - binary cross entropy with logits: S u = sqrt(a p (1 - p)) u;
    - squared error: S u = sqrt(2 a) u, with z the difference of its two arguments.

    Class weights, ignored targets, label smoothing, reductions and the step's own factors are part of a. G ignores
    terms of the loss that do not pass through these functions.

    Args:
        losses: the recorded loss function calls of the step.
        loss: the step's loss, with its graph.
        inputs: leaf tensors of the graph that are not parameters. Targets and factors may depend on them.
        probes: the source of u.
        index: the index of the probe.
        distribution: the distribution of the entries of u.

    Returns:
        For each call, z and S u with their graphs. S u has the shape of z.

    Raises:
        ValueError: no loss function call was recorded; a function has no such formula; its targets, weights or factor
            depend on parameters; the loss is not linear in a function's result; or an element's weight is negative.

    Source:
        Schraudolph 2002; Dauphin et al. 2024 (arXiv 2401.10809), on training with the trace of G.
    """
    calls = losses.calls_in(loss)
    if not losses.was_entered:
        raise ValueError(
            "The Gauss-Newton matrix needs the loss's curvature in the outputs, and the context has no record of "
            "the loss functions called. Compute the loss inside `with watch_losses() as seen:` and pass "
            "StepContext(loss, parameters, losses=seen), or use method='autograd'."
        )
    if not calls:
        raise ValueError(
            "The Gauss-Newton matrix needs the loss's curvature in the outputs, and no loss function was seen in "
            "the step: the loss does not use cross_entropy, binary_cross_entropy_with_logits, mse_loss or their "
            "modules. Call one of them, or use method='autograd' or method='two_pass'."
        )
    factors = []
    for position, call in enumerate(calls):
        _check_supported(call, loss, inputs)
        z = call.arguments["input"] - call.arguments["target"] if call.function is F.mse_loss else call.outputs
        dtype = torch.promote_types(z.dtype, torch.float32)
        u = probes.draw(z.numel(), index * len(calls) + position, z.device, dtype, distribution).view_as(z)
        factors.append((z, _factor(call, loss, z.to(dtype), u).to(z.dtype)))
    return factors


def _check_supported(call: LossCall, loss: Tensor, inputs: Sequence[Tensor]) -> None:
    """Refuse a call that the formulas do not cover.

    They need a loss that is linear in the loss function's result, with constant targets, weights and factors.
    """
    name = call.function.__name__
    remedy = "Use method='autograd' or method='two_pass'."
    if call.function not in (F.cross_entropy, F.binary_cross_entropy_with_logits, F.mse_loss):
        raise ValueError(
            f"The step calls {name}, whose Gauss-Newton matrix is not known here. Supported are cross_entropy, "
            f"binary_cross_entropy_with_logits and mse_loss. {remedy}"
        )
    for argument, value in call.arguments.items():
        learnable = argument == "input" or (argument == "target" and call.function is F.mse_loss)
        if not learnable and isinstance(value, Tensor) and _depends_on_parameters(value, inputs):
            raise ValueError(
                f"The {_ARGUMENTS.get(argument, argument)} of {name} depend on parameters, and the Gauss-Newton matrix "
                f"requires constant ones. Detach them if they are meant to be constant. {remedy}"
            )
    factor = call.factor(loss, create_graph=True)
    if factor is None or not factor.requires_grad:
        return
    if depends(factor, on=call.result):
        raise ValueError(
            f"The loss is not linear in what {name} returns (a root, a logarithm, a focal factor), so this method's "
            f"formula for its curvature in the outputs does not apply. {remedy}"
        )
    if _depends_on_parameters(factor, inputs):
        raise ValueError(
            f"The loss multiplies what {name} returns by a factor that depends on parameters (learned weights of tasks "
            "or samples, a predicted variance, a product of losses), and the Gauss-Newton matrix requires a "
            f"constant factor. Detach it if it is meant to be constant. {remedy}"
        )


_ARGUMENTS = {"target": "targets", "weight": "class weights", "pos_weight": "class weights (pos_weight)"}


def _depends_on_parameters(tensor: Tensor, inputs: Sequence[Tensor]) -> bool:
    """Return whether a tensor depends on any trainable leaf tensor, whether or not the penalty selects it."""
    constant = {id(x) for x in inputs}
    return tensor.requires_grad and any(id(leaf) not in constant for leaf in leaves(tensor))


def _factor(call: LossCall, loss: Tensor, z: Tensor, u: Tensor) -> Tensor:
    """Return S u at the outputs z, in float32 or wider."""
    if call.function is F.cross_entropy:
        classes = 1 if z.dim() > 1 else 0
        a = _weight(call, loss, at=torch.zeros_like(z), value=math.log(z.size(classes))).unsqueeze(classes)
        log_p = z.log_softmax(classes)
        root = (log_p / 2).exp()
        return a.sqrt() * (root * u - log_p.exp() * (root * u).sum(classes, keepdim=True))
    if call.function is F.binary_cross_entropy_with_logits:
        a = _weight(call, loss, at=torch.zeros_like(z), value=math.log(2))
        return (a * z.sigmoid() * (-z).sigmoid()).sqrt() * u
    target = call.arguments["target"].detach().to(z.dtype).expand_as(z)
    return (2 * _weight(call, loss, at=target + 1, value=1.0)).sqrt() * u


def _weight(call: LossCall, loss: Tensor, at: Tensor, value: float) -> Tensor:
    """Return a, of the elements' shape.

    This divides an element's contribution to the loss at the outputs ``at`` by ``value``, the contribution of an
    element of weight 1 there.
    """
    with torch.no_grad():
        a = call.weights(loss) * call.again(input=at, reduction="none") / value
    if (a < 0).any():
        raise ValueError(
            f"The call of {call.function.__name__} enters the loss with a negative factor, so its Gauss-Newton matrix "
            "is not positive semidefinite. Use method='autograd' or method='two_pass'."
        )
    return a
