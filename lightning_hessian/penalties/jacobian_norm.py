"""The squared Frobenius norm of the Jacobian of the outputs with respect to the inputs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_hessian.arguments import count_or_all
from lightning_hessian.curvature import gaussian
from lightning_hessian.curvature.operators import input_gradients
from lightning_hessian.curvature.vectors import normalize_rows, pack_rows
from lightning_hessian.penalties.base import InputPenalty, Needs
from lightning_hessian.penalties.step_context import StepContext
from lightning_hessian.step.batches import InputChoice


class JacobianNorm(InputPenalty):
    r"""The mean over samples of ||J_i||_F^2. J_i is the Jacobian of sample i's C outputs with respect to its input.

    .. math:: \frac{1}{B} \sum_i \|J_i\|_F^2 = \frac{1}{B} \sum_i C \, E_u \|u' J_i\|^2, \qquad
        u \text{ uniform on the unit sphere of } R^C

    The outputs are detected in the step's call of a loss function (cross entropy, binary cross entropy with logits,
    MSE, NLL), or are what the step returns under "logits". There is no factor of 1/2, unlike in Hoffman et al. Units:
    (output / input)^2.

    Batch norm in training mode couples the samples. The penalty then uses a separate forward pass with the running
    statistics from before the step.

    Args:
        projections: number of vectors u per sample and step, or -1 for the exact norm from all C unit vectors.
        inputs: tensors of the batch to use as input, see :class:`InputPenalty`.
        layer: layer whose output to use as input, see :class:`InputPenalty`.

    Raises:
        ValueError: an argument is out of range.

    Source:
        Hoffman, Roberts, Yaida 2019, "Robust Learning with Jacobian Regularization" (arXiv 1908.02729).

    Example:
        >>> from torch.nn.functional import mse_loss
        >>> from lightning_hessian import JacobianNorm, StepContext
        >>> w, x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True), torch.ones(5, 2)
        >>> context = StepContext.evaluate(lambda x: mse_loss(x @ w, torch.zeros(5, 2)), x, {"w": w})
        >>> JacobianNorm(projections=-1)(context).item()  # 1 + 4 + 9 + 16
        30.0
    """

    name = "jacobian_norm"
    needs = Needs(derivatives=2, losses=True)

    def __init__(self, projections: int = 1, inputs: InputChoice = None, layer: str | None = None) -> None:
        super().__init__(inputs, layer)
        count_or_all("projections", projections, "the exact norm")
        self.projections = projections

    def value(self, context: StepContext) -> Tensor:
        self.check_inputs(context)
        outputs = self._outputs(context)
        squares = []
        for u in self._directions(outputs, context):
            gradients = input_gradients((outputs * u).sum(), context.inputs, derivatives=2)
            squares.append(torch.stack([gradient.square().sum() for gradient in gradients]).sum() / context.samples)
        # E[u u'] = I / C for a random u. The sum over all unit vectors is the exact norm.
        return torch.stack(squares).sum() if self.projections == -1 else outputs.size(1) * torch.stack(squares).mean()

    def _directions(self, outputs: Tensor, context: StepContext) -> Iterator[Tensor]:
        if self.projections == -1:
            yield from torch.eye(outputs.size(1), device=outputs.device, dtype=outputs.dtype)
        for index in range(self.projections):
            normal = context.probes.draw(outputs.numel(), index, outputs.device, outputs.dtype, gaussian)
            yield normalize_rows(normal.view_as(outputs))

    def _outputs(self, context: StepContext) -> Tensor:
        if not context.outputs:
            raise ValueError(
                "JacobianNorm differentiates the step's outputs but found none: the loss comes from none of the usual "
                "loss functions of torch.nn.functional (cross_entropy, nll_loss, mse_loss, "
                'binary_cross_entropy_with_logits, ...) or their modules. Return {"loss": ..., "logits": ...} from the '
                "step."
            )
        return pack_rows([context.by_sample(output) for output in context.outputs])

    def __repr__(self) -> str:
        return f"JacobianNorm(projections={self.projections})"
