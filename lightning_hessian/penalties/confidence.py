"""The confidence penalty: the negative entropy of the predicted distribution."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_hessian.curvature.losses import LossCall
from lightning_hessian.penalties.base import Needs, Penalty
from lightning_hessian.penalties.step_context import StepContext


class ConfidencePenalty(Penalty):
    r"""The mean over predictions of the negative entropy of the predicted class distribution p_i.

    .. math:: -\frac{1}{N} \sum_i H(p_i) = \frac{1}{N} \sum_i \sum_c p_{ic} \log p_{ic}

    The training loss is then L - strength * mean H: the entropy is rewarded, and confident predictions are penalized.
    The value lies between -log(C), where all C classes are equally likely, and 0. Units: nats.

    The distribution is detected in the step's call of a loss function: softmax of the logits for cross entropy, exp for
    NLL, and for binary cross entropy one Bernoulli distribution per output. If the loss is none of these, it is the
    softmax of what the step returns under "logits". Predictions with an ignored target (``ignore_index``) do not count.
    The penalty needs no second derivative, so it costs little more than a plain step.

    Raises:
        ValueError: in the step: no distribution over classes is found.

    Source:
        Pereyra et al. 2017, "Regularizing Neural Networks by Penalizing Confident Output Distributions"
        (arXiv 1701.06548). Their beta is the strength; 0.1 is usual.

    Example:
        >>> from torch.nn.functional import cross_entropy
        >>> from lightning_hessian import ConfidencePenalty, StepContext
        >>> w, x = torch.zeros(3, 2, requires_grad=True), torch.ones(5, 3)
        >>> context = StepContext.evaluate(lambda x: cross_entropy(x @ w, torch.ones(5, dtype=torch.long)), x, {"w": w})
        >>> round(ConfidencePenalty()(context).item(), 4)  # -log(2)
        -0.6931
    """

    name = "negative_entropy"
    needs = Needs(derivatives=1, losses=True, float16=True, whole_parameters=False)
    default_strength = 0.1

    def value(self, context: StepContext) -> Tensor:
        found = [_negative_entropies(call) for call in context.losses.calls_in(context.loss)]
        entropies = [one for one in found if one is not None]
        if not entropies:
            if found or not context.outputs:
                raise ValueError(
                    "ConfidencePenalty needs a predicted distribution over classes, but the loss comes from no call of "
                    "cross_entropy, nll_loss, binary_cross_entropy or binary_cross_entropy_with_logits. Use one of "
                    'these, or return {"loss": ..., "logits": ...} from a step that computes its loss by itself.'
                )
            shapes = [tuple(z.shape) for z in context.outputs]
            if any(len(shape) < 2 or shape[1] < 2 for shape in shapes):
                raise ValueError(
                    'ConfidencePenalty takes what the step returns under "logits" as logits of shape (n, classes), and '
                    f"found {shapes}. Return these, or call binary_cross_entropy_with_logits in the step."
                )
            entropies = [_categorical(F.log_softmax(_in_float32(z), dim=1)) for z in context.outputs]
        return torch.cat([one.flatten() for one in entropies]).mean()


def _negative_entropies(call: LossCall) -> Tensor | None:
    """sum_c p_c log p_c of each prediction that counts in the call; None if it predicts no distribution."""
    z = _in_float32(call.arguments["input"])
    if call.function is F.binary_cross_entropy_with_logits:
        return _p_log_p(F.logsigmoid(z)) + _p_log_p(F.logsigmoid(-z))
    if call.function is F.binary_cross_entropy:
        log_p, log_q = (p.clamp(min=torch.finfo(p.dtype).tiny).log() for p in (z, 1 - z))
        return _p_log_p(log_p) + _p_log_p(log_q)
    if call.function not in (F.cross_entropy, F.nll_loss):
        return None
    target = call.arguments["target"]
    classes = 0 if z.dim() == 1 else 1
    entropies = _categorical(z if call.function is F.nll_loss else F.log_softmax(z, classes), classes)
    return entropies if target.is_floating_point() else entropies[target != call.arguments["ignore_index"]]


def _categorical(log_p: Tensor, classes: int = 1) -> Tensor:
    return _p_log_p(log_p).sum(classes)


def _p_log_p(log_p: Tensor) -> Tensor:
    # Bounded, because 0 * log(0) is 0 here, and so is its gradient.
    return log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)


def _in_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor
