"""The squared norm of the input gradient: Drucker and LeCun's double backpropagation."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_hessian.curvature.operators import input_gradients
from lightning_hessian.penalties.base import InputPenalty, Needs
from lightning_hessian.penalties.step_context import StepContext


class InputGradientNorm(InputPenalty):
    r"""The mean over samples of the squared L2 norm of each sample's input gradient.

    .. math:: \frac{1}{B} \sum_i \|\nabla_{x_i} l_i\|_2^2

    It differentiates the sample's loss l_i, not the batch-mean loss. Published code that uses the latter has a value
    smaller by B^2, which depends on the batch size. There is no factor of 1/2. Units: (loss / input)^2.

    Batch norm in training mode couples the samples. The penalty then uses a separate forward pass with the running
    statistics from before the step.

    Args:
        inputs: tensors of the batch to use as input, see :class:`InputPenalty`.
        layer: layer whose output to use as input, see :class:`InputPenalty`.

    Raises:
        ValueError: an argument is out of range.

    Source:
        Drucker and LeCun 1992, "Improving generalization performance using double backpropagation"; Ross and
        Doshi-Velez 2018 (arXiv 1711.09404).

    Example:
        >>> from lightning_hessian import InputGradientNorm, StepContext
        >>> w, x = torch.tensor([2.0], requires_grad=True), torch.tensor([[1.0], [3.0]])
        >>> context = StepContext.evaluate(lambda x: (w * x**2).mean(), x, {"w": w})
        >>> InputGradientNorm()(context).item()  # mean of (2 w x)^2
        80.0
    """

    name = "input_gradient_norm"
    needs = Needs(derivatives=2, losses=True)

    def value(self, context: StepContext) -> Tensor:
        self.check_inputs(context)
        gradients = input_gradients(context.summed_loss, context.inputs, derivatives=2)
        return torch.stack([gradient.square().sum() for gradient in gradients]).sum() / context.samples

    def __repr__(self) -> str:
        return "InputGradientNorm()"
