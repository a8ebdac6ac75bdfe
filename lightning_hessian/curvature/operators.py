"""Symmetric linear operators, defined by their matrix-vector products."""

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
    """A symmetric n x n matrix A, defined by v -> Av. Vectors are flat, of shape (n,)."""

    @property
    def size(self) -> int:
        """n."""

    @property
    def device(self) -> torch.device:
        """The device of the vectors."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the vectors."""

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


class ScaledOperator:
    """D A D with a diagonal matrix D: A in scaled coordinates.

    Args:
        operator: A.
        scales: the diagonal of D, of shape (n,).

    Example:
        >>> matrix = MatrixOperator(torch.diag(torch.tensor([1.0, 2.0])))
        >>> ScaledOperator(matrix, torch.tensor([3.0, 1.0])).matvec(torch.ones(2))
        tensor([9., 2.])
    """

    def __init__(self, operator: LinearOperator, scales: Tensor) -> None:
        self.operator = operator
        self.scales = scales
        self.size = operator.size
        self.device = operator.device
        self.dtype = operator.dtype

    def matvec(self, v: Tensor) -> Tensor:
        return self.matmat(v.unsqueeze(0)).squeeze(0)

    def matmat(self, rows: Tensor) -> Tensor:
        """Return D A D v for each row v."""
        return self.scales * matmat(self.operator, self.scales * rows)


class _TensorOperator:
    """Base of the Hessians. Their rows and columns are the concatenated entries of a list of tensors."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = list(tensors)
        self.size = sum(tensor.numel() for tensor in self.tensors)
        self.device = self.tensors[0].device
        self.dtype = self.tensors[0].dtype

    def split(self, v: Tensor) -> list[Tensor]:
        """Split a flat vector into parts of the tensors' shapes."""
        return unpack(v, self.tensors)


class HessianOperator(_TensorOperator):
    """H = d^2 loss / d tensors^2, from the graph of one loss: Hv = d(g'v) / d tensors, reverse over reverse.

    Rows and columns of a tensor are zero if the loss does not depend on it, or only linearly.

    Args:
        loss: a scalar with its graph. Compute it inside :class:`higher_order` if you will differentiate the products.
        tensors: the tensors to differentiate by: leaf tensors or intermediate results of the graph.
        differentiable: whether you will differentiate :meth:`quadratic_form` or a product. Not every graph allows it.

    Raises:
        ValueError: the loss has no graph.
        HigherOrderError: the graph contains an operator whose derivatives would be silently wrong.

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
        if self.custom and differentiable:  # a custom backward may call further custom functions
            self.custom = refuse_unsound_graph(self.gradient, derivatives=2)

    def matvec(self, v: Tensor, create_graph: bool = False) -> Tensor:
        products = vector_jacobian_product(self.gradient, self.tensors, self.split(v), create_graph, self.custom)
        return pack(products, self.dtype)

    def quadratic_form(self, v: Tensor, only: Sequence[int] | None = None) -> Tensor:
        """Return v'Hv as a differentiable scalar.

        Args:
            v: a flat vector with the entries of all tensors, or of those in ``only``.
            only: the positions of the tensors to restrict H to. The backward pass skips the graph of the others.
        """
        kept = range(len(self.tensors)) if only is None else only
        tensors = [self.tensors[i] for i in kept]
        parts = unpack(v, tensors)
        products = vector_jacobian_product([self.gradient[i] for i in kept], tensors, parts, True, self.custom)
        dots = [torch.dot(a.reshape(-1), b.reshape(-1)).to(self.dtype) for a, b in zip(products, parts, strict=True)]
        return torch.stack(dots).sum()


class BatchedHessianOperator(_TensorOperator):
    """H of the mean loss over a fixed list of batches, each weighted by its number of samples.

    Each product visits every batch and keeps one graph at a time, so memory does not grow with the number of batches.
    If there is only one batch, its graph stays alive between products. Vectors are in float32 or wider.

    Args:
        loss: ``loss(batch)`` returns the batch's mean loss with its graph.
        tensors: the tensors to differentiate by.
        batches: the batches. They must not change within an estimate, so pass a list.
        samples: ``samples(batch)`` returns the number of samples. By default all batches have equal weight.
        sum_over_ranks: sums a tensor over all processes, if each process has its own batches.

    Raises:
        ValueError: there is no batch, or no batch contains a sample.

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
            raise ValueError("There is no batch to measure the Hessian on. Pass at least one.")
        self.dtype = torch.promote_types(self.dtype, torch.float32)
        self.loss = loss
        self.batches = batches
        self.sum_over_ranks = sum_over_ranks
        counts = [samples(batch) for batch in batches]
        total = self._summed(torch.tensor(float(sum(counts)), device=self.device)).item()
        if total == 0:
            raise ValueError("The batches contain no sample, so their mean loss does not exist. Check the dataset.")
        self.weights = [count / total for count in counts]
        self._single_batch_hessian: HessianOperator | None = None

    def matvec(self, v: Tensor) -> Tensor:
        return self.matmat(v.unsqueeze(0)).squeeze(0)

    def matmat(self, rows: Tensor) -> Tensor:
        """Return Hv for each row v; rows have shape (k, n). It builds one graph per batch for all rows."""
        total = torch.zeros_like(rows)
        with torch.enable_grad():
            for batch, weight in zip(self.batches, self.weights, strict=True):
                hessian = self._single_batch_hessian or HessianOperator(self.loss(batch), self.tensors)
                if len(self.batches) == 1:
                    self._single_batch_hessian = hessian
                for row, v in zip(total, rows, strict=True):
                    row += weight * hessian.matvec(v)
                del hessian
        return self._summed(total)

    def _summed(self, local: Tensor) -> Tensor:
        return local if self.sum_over_ranks is None else self.sum_over_ranks(local)


def matmat(operator: LinearOperator, rows: Tensor) -> Tensor:
    """Return Av for each row v, in one call if the operator supports it."""
    at_once = getattr(operator, "matmat", None)
    return at_once(rows) if at_once is not None else torch.stack([operator.matvec(v) for v in rows])


class SampleHessians:
    """H_i = d^2 l_i / d x_i^2 of all samples. One product with the summed loss's Hessian gives all H_i v_i as rows.

    This requires that no sample's loss depends on another sample's input, so no batch norm in training mode.

    Args:
        summed_loss: sum_i l_i with its graph, computed inside :class:`higher_order`.
        inputs: x, one or several tensors, each of shape (samples, ...). A vector has the entries of all.
        differentiable: whether you will differentiate the products. Not every graph allows it.

    Raises:
        ValueError: the loss depends on none of the inputs.
        HigherOrderError: the graph contains an operator whose derivatives would be silently wrong.

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
        """The gradients d l_i / d x_i, of shape (samples, n), with their graph."""
        return pack_rows(self._gradients)

    def matvec(self, v: Tensor, create_graph: bool = False) -> Tensor:
        """Return H_i v_i, of shape (samples, n)."""
        parts = unpack_rows(v, self.inputs)
        return pack_rows(vector_jacobian_product(self._gradients, self.inputs, parts, create_graph, self._custom))


def input_gradients(value: Tensor, inputs: Sequence[Tensor], derivatives: int = 1) -> list[Tensor]:
    """Return the gradients of a scalar by the inputs, with a graph if ``derivatives`` is above 1.

    Raises:
        ValueError: the scalar depends on none of the inputs. Its derivatives would silently be zero.
        HigherOrderError: the graph contains an operator whose derivatives would be silently wrong.
    """
    several = derivatives > 1
    custom = refuse_unsound_graph(value, derivatives) if several else []
    found = _differentiate([value], list(inputs), custom=custom, create_graph=several, materialize_grads=False)
    if all(gradient is None for gradient in found):
        raise ValueError(
            f"The loss does not depend on the inputs (of shape {', '.join(str(tuple(x.shape)) for x in inputs)}): the "
            "step detaches them, computes with them under `torch.no_grad()`, or uses another tensor of the batch. "
            "Select the tensor that it uses with `inputs=`, or with `layer=` a layer through which gradients flow."
        )
    return [torch.zeros_like(x) if gradient is None else gradient for gradient, x in zip(found, inputs, strict=True)]


def vector_jacobian_product(
    outputs: Sequence[Tensor],
    tensors: Sequence[Tensor],
    v: Sequence[Tensor],
    create_graph: bool = False,
    custom: Sequence[Any] = (),
) -> Sequence[Tensor]:
    """Return d(sum_k outputs_k'v_k) / d tensors. If the outputs are a loss's gradient by the tensors, this is Hv.

    ``custom`` lists the nodes of custom functions in the outputs' graph.
    """
    # An output without a graph is constant. In a gradient, its rows of H are zero.
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
    """Return d(sum_k outputs_k'seeds_k) / d tensors, and keep the graph of the outputs.

    Raises:
        HigherOrderError: an operator in the graph has no derivative, or is marked @once_differentiable.
    """
    if custom and create_graph:
        # A backward that cuts the graph can be detected only if its incoming gradient has a graph.
        seeds = [torch.ones_like(output) for output in outputs] if seeds is None else seeds
        seeds = [seed if seed.requires_grad else seed.detach().requires_grad_() for seed in seeds]
    # Hooks are meant for the training gradient only. Never use `backward(create_graph=True)`: it creates a reference
    # cycle between parameters and gradients that is not freed.
    check_backwards = without_lost_derivatives(custom) if create_graph else nullcontext()
    with without_hooks(tensors), derivatives_explained(), check_backwards:
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
