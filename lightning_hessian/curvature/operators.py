"""Symmetric linear operators that are known by their products with vectors only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_hessian.curvature.errors import derivatives_explained
from lightning_hessian.curvature.graph import without_hooks
from lightning_hessian.curvature.parameters import refuse_complex
from lightning_hessian.curvature.refusals import refuse_unsound_graph, without_lost_derivatives
from lightning_hessian.curvature.vectors import pack, pack_rows, unpack, unpack_rows


class LinearOperator(Protocol):
    """A symmetric n x n matrix A, known by v -> Av. Vectors are flat, of shape (n,)."""

    @property
    def size(self) -> int:
        """n."""

    @property
    def device(self) -> torch.device:
        """Where vectors live."""

    @property
    def dtype(self) -> torch.dtype:
        """Their type."""

    def matvec(self, v: Tensor) -> Tensor:
        """Av, of shape (n,)."""


class MatrixOperator:
    """A dense symmetric matrix as an operator.

    Example:
        >>> MatrixOperator(torch.diag(torch.tensor([1.0, 2.0]))).matvec(torch.ones(2))
        tensor([1., 2.])
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.size = matrix.size(0)
        self.device = matrix.device
        self.dtype = matrix.dtype

    def matvec(self, v: Tensor) -> Tensor:
        return self.matrix @ v


class _TensorOperator:
    """What the Hessians share: their rows and columns are the entries of a list of tensors, one after the other."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = list(tensors)
        self.size = sum(tensor.numel() for tensor in self.tensors)
        self.device = self.tensors[0].device
        self.dtype = self.tensors[0].dtype

    def split(self, v: Tensor) -> list[Tensor]:
        """Cut a flat vector into views of the tensors' shapes."""
        return unpack(v, self.tensors)


class HessianOperator(_TensorOperator):
    """H = d^2 loss / d tensors^2, from the graph of one loss: Hv = d(g'v) / d tensors, reverse over reverse.

    Where the loss does not depend on a tensor, or only linearly, the rows and columns are zero.

    Args:
        loss: a scalar with its graph, computed inside :class:`higher_order` if the products are to be differentiated.
        tensors: with respect to what; leaves or intermediate results of the graph.
        differentiable: whether :meth:`quadratic_form`, or a product, will be differentiated, which not every graph
            allows.

    Raises:
        ValueError: the loss has no graph.
        HigherOrderError: the graph has an operator whose derivatives would be silently wrong.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> HessianOperator((x**3).sum(), [x]).matvec(torch.ones(2))
        tensor([ 6., 12.])
    """

    def __init__(self, loss: Tensor, tensors: Iterable[Tensor], differentiable: bool = False) -> None:
        super().__init__(tensors)
        for tensor in self.tensors:
            refuse_complex(tensor, f"A tensor of shape {tuple(tensor.shape)}")
        if not loss.requires_grad:
            raise ValueError(
                "The loss has no graph, so it has no derivatives. Compute it from the parameters with gradients "
                "enabled, and without `.detach()`, `.item()` or `torch.no_grad()` on the way."
            )
        self.custom = refuse_unsound_graph(loss, derivatives=3 if differentiable else 2)
        self.gradient = _differentiate([loss], self.tensors, custom=self.custom, create_graph=True)
        if self.custom and differentiable:  # a backward may call other custom functions
            self.custom = refuse_unsound_graph(self.gradient, derivatives=2)

    def matvec(self, v: Tensor, create_graph: bool = False) -> Tensor:
        products = vector_jacobian_product(self.gradient, self.tensors, self.split(v), create_graph, self.custom)
        return pack(products, self.dtype)

    def quadratic_form(self, v: Tensor, only: Sequence[int] | None = None) -> Tensor:
        """v'Hv as a scalar that can be differentiated.

        Args:
            v: flat, of the length of all tensors, or of those in ``only``.
            only: restrict to these tensors (by position); the graph behind the others is not walked.
        """
        kept = range(len(self.tensors)) if only is None else only
        tensors = [self.tensors[i] for i in kept]
        parts = unpack(v, tensors)
        products = vector_jacobian_product([self.gradient[i] for i in kept], tensors, parts, True, self.custom)
        dots = [torch.dot(a.reshape(-1), b.reshape(-1)).to(self.dtype) for a, b in zip(products, parts, strict=True)]
        return torch.stack(dots).sum()


class BatchedHessianOperator(_TensorOperator):
    """H of the mean loss over a fixed list of batches, each weighted by its number of samples.

    A product goes through every batch and keeps the graph of one at a time, so memory does not grow with the number
    of batches; the graph of a single batch is kept from product to product. Vectors are in float32 or better.

    Args:
        loss: ``loss(batch)`` returns the batch's mean loss with its graph.
        tensors: with respect to what.
        batches: the batches; they must stay the same within an estimate, so hand over a list.
        samples: ``samples(batch)``, the number of samples; by default all batches count the same.
        sum_over_ranks: the sum of a tensor over all processes, where each has batches of its own.

    Raises:
        ValueError: there is no batch, or none of them has a sample.

    Example:
        >>> x = torch.tensor([1.0], requires_grad=True)
        >>> BatchedHessianOperator(lambda scale: scale * (x**2).sum(), [x], [1.0, 3.0]).matvec(torch.ones(1))
        tensor([4.])
    """

    def __init__(
        self,
        loss: Callable[[Any], Tensor],
        tensors: Iterable[Tensor],
        batches: Sequence[Any],
        samples: Callable[[Any], int] = lambda batch: 1,
        sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(tensors)
        if not batches:
            raise ValueError("There is no batch to measure the Hessian on. Hand over at least one.")
        self.dtype = torch.promote_types(self.dtype, torch.float32)
        self.loss = loss
        self.batches = batches
        self.sum_over_ranks = sum_over_ranks
        counts = [samples(batch) for batch in batches]
        total = self._summed(torch.tensor(float(sum(counts)), device=self.device)).item()
        if total == 0:
            raise ValueError("The batches hold no sample, so their mean loss does not exist. Look at the dataset.")
        self.weights = [count / total for count in counts]
        self._only: HessianOperator | None = None

    def matvec(self, v: Tensor) -> Tensor:
        return self.matmat(v.unsqueeze(0)).squeeze(0)

    def matmat(self, rows: Tensor) -> Tensor:
        """Hv for each of the rows, of shape (k, n), at the price of one graph for each batch."""
        total = torch.zeros_like(rows)
        with torch.enable_grad():
            for batch, weight in zip(self.batches, self.weights, strict=True):
                hessian = self._only or HessianOperator(self.loss(batch), self.tensors)
                if len(self.batches) == 1:
                    self._only = hessian
                for row, v in zip(total, rows, strict=True):
                    row += weight * hessian.matvec(v)
                del hessian
        return self._summed(total)

    def _summed(self, local: Tensor) -> Tensor:
        return local if self.sum_over_ranks is None else self.sum_over_ranks(local)


def matmat(operator: LinearOperator, rows: Tensor) -> Tensor:
    """Av for each of the rows, all at once where the operator can."""
    at_once = getattr(operator, "matmat", None)
    return at_once(rows) if at_once is not None else torch.stack([operator.matvec(v) for v in rows])


class SampleHessians:
    """H_i = d^2 l_i / d x_i^2 of all samples: one product of the summed loss's Hessian is H_i v_i in every row.

    That holds where no sample's loss depends on another's input, so not through batch norm in training mode.

    Args:
        summed_loss: sum_i l_i with its graph, computed inside :class:`higher_order`.
        inputs: x, one tensor or several, each of shape (samples, ...); a vector has the entries of all.
        differentiable: whether the products will be differentiated, which not every graph allows.

    Raises:
        ValueError: the loss depends on none of the inputs.
        HigherOrderError: the graph has an operator whose derivatives would be silently wrong.

    Example:
        >>> x = torch.tensor([[1.0], [2.0]], requires_grad=True)
        >>> SampleHessians((x**3).sum(), [x]).matvec(torch.ones(2, 1))
        tensor([[ 6.],
                [12.]])
    """

    def __init__(self, summed_loss: Tensor, inputs: Sequence[Tensor], differentiable: bool = False) -> None:
        self.inputs = list(inputs)
        derivatives = 3 if differentiable else 2
        self._custom = refuse_unsound_graph(summed_loss, derivatives)
        self._gradients = input_gradients(summed_loss, self.inputs, derivatives)

    @property
    def gradient(self) -> Tensor:
        """Of each sample's loss by its input, of shape (samples, n), with its graph."""
        return pack_rows(self._gradients)

    def matvec(self, v: Tensor, create_graph: bool = False) -> Tensor:
        """H_i v_i, of shape (samples, n)."""
        parts = unpack_rows(v, self.inputs)
        return pack_rows(vector_jacobian_product(self._gradients, self.inputs, parts, create_graph, self._custom))


def input_gradients(value: Tensor, inputs: Sequence[Tensor], derivatives: int = 1) -> list[Tensor]:
    """The gradients of a scalar by the inputs; with a graph if more than one derivative will be taken.

    Raises:
        ValueError: the scalar depends on none of the inputs: its derivatives would be zero in silence.
        HigherOrderError: it passes through an operator whose derivatives would be silently wrong.
    """
    several = derivatives > 1
    custom = refuse_unsound_graph(value, derivatives) if several else []
    found = _differentiate([value], list(inputs), custom=custom, create_graph=several, materialize_grads=False)
    if all(gradient is None for gradient in found):
        raise ValueError(
            f"The loss does not depend on the inputs (of shape {', '.join(str(tuple(x.shape)) for x in inputs)}): the "
            "step detaches them, computes with them under `torch.no_grad()`, or uses another tensor of the batch. "
            "Choose the right one with `inputs=`, or a layer behind which gradients flow with `layer=`."
        )
    return [torch.zeros_like(x) if gradient is None else gradient for gradient, x in zip(found, inputs, strict=True)]


def vector_jacobian_product(
    outputs: Sequence[Tensor],
    tensors: Sequence[Tensor],
    v: Sequence[Tensor],
    create_graph: bool = False,
    custom: Sequence[Any] = (),
) -> Sequence[Tensor]:
    """d(sum_k outputs_k'v_k) / d tensors, part by part; Hv where the outputs are a loss's gradient by the tensors.

    ``custom`` are the nodes of custom functions in the outputs' graph.
    """
    # What has no graph is constant: of a gradient, its rows of H are zero.
    curved = [(output, part) for output, part in zip(outputs, v, strict=True) if output.requires_grad]
    if not curved:
        return [torch.zeros_like(tensor) for tensor in tensors]
    return _differentiate([output for output, _ in curved], tensors, [part for _, part in curved], custom, create_graph)


def _differentiate(
    outputs: Sequence[Tensor],
    tensors: Sequence[Tensor],
    seeds: Sequence[Tensor] | None = None,
    custom: Sequence[Any] = (),
    create_graph: bool = False,
    materialize_grads: bool = True,
) -> list[Tensor]:
    """d(sum_k outputs_k'seeds_k) / d tensors; the graph of the outputs is kept.

    Raises:
        HigherOrderError: an operator on the way has no derivative, or is marked @once_differentiable.
    """
    if custom and create_graph:
        # A backward that cuts the graph shows itself where what it is given has one.
        seeds = [torch.ones_like(output) for output in outputs] if seeds is None else seeds
        seeds = [seed if seed.requires_grad else seed.detach().requires_grad_() for seed in seeds]
    # Hooks are for the gradient that is trained on. Never `backward(create_graph=True)`: it ties parameters and
    # gradients into a cycle that is not freed.
    looking = without_lost_derivatives(custom) if create_graph else nullcontext()
    with without_hooks(tensors), derivatives_explained(), looking:
        found = torch.autograd.grad(
            list(outputs),
            list(tensors),
            None if seeds is None else list(seeds),
            create_graph=create_graph,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=materialize_grads,
        )
    return list(found)
