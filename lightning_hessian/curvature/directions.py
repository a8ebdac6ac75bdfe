"""The direction in which a symmetric matrix stretches most, for many matrices at once.

An algorithm sees products only: ``matvec`` maps vectors of shape (samples, n) to A_i v_i, row by row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

BatchedMatvec = Callable[[Tensor], Tensor]
Search = Literal["power", "lanczos"]
SEARCHES = get_args(Search)


def unit(v: Tensor) -> Tensor:
    """Each row divided by its length; a row of zeros stays one."""
    length = torch.linalg.vector_norm(v, dim=1, keepdim=True)
    return v / torch.where(length > 0, length, 1)


def power_iteration(matvec: BatchedMatvec, start: Tensor, iterations: int) -> Tensor:
    """v <- Av / ||Av||, which turns towards the eigenvectors of largest absolute eigenvalue.

    Where +lambda and -lambda tie, v ends in the span of both, and ||Av|| still tends to lambda (v'Av does not).

    Args:
        matvec: the products A_i v_i.
        start: shape (samples, n); need not be of length 1.
        iterations: how many products to spend, at least 0.

    Returns:
        Unit vectors, of shape (samples, n).

    Example:
        >>> scale = torch.tensor([[1.0, -2.0]])
        >>> power_iteration(lambda v: scale * v, torch.ones(1, 2), 20).abs().round(decimals=3)
        tensor([[0., 1.]])
    """
    v = unit(start)
    for _ in range(iterations):
        product = matvec(v)
        # Where A v = 0 there is no better direction to be had from it.
        v = torch.where(product.any(dim=1, keepdim=True), unit(product), v)
    return v


def lanczos(matvec: BatchedMatvec, start: Tensor, iterations: int) -> Tensor:
    """A times the Ritz vector of largest |Ritz value| in span(v, Av, ..., A^(k-1) v), normalised.

    The products with the basis are known, so this last power step is free, and one iteration is a power iteration.
    Every basis vector is orthogonalised against all before it, twice.

    Args:
        matvec: the products A_i v_i.
        start: shape (samples, n); need not be of length 1.
        iterations: k, how many products to spend, at least 0.

    Returns:
        Unit vectors, of shape (samples, n).

    Source:
        Lanczos 1950; Golub and Van Loan, Matrix Computations, chapter 10.

    Example:
        >>> scale = torch.tensor([[1.0, -2.0, 0.5]])
        >>> lanczos(lambda v: scale * v, torch.ones(1, 3), 3).abs().round(decimals=3)
        tensor([[0., 1., 0.]])
    """
    q = unit(start)
    if iterations == 0:
        return q
    basis = q.new_empty(len(q), min(iterations, q.size(1)), q.size(1))
    products = torch.empty_like(basis)
    for k in range(basis.size(1)):
        basis[:, k], products[:, k] = q, matvec(q)
        q, before = products[:, k], torch.linalg.vector_norm(products[:, k], dim=1, keepdim=True)
        for _ in range(2):
            q = q - torch.einsum("skn,sk->sn", basis[:, : k + 1], torch.einsum("skn,sn->sk", basis[:, : k + 1], q))
        # What is left of a product inside the span is rounding: a row of zeros ends this sample's basis.
        left = torch.linalg.vector_norm(q, dim=1, keepdim=True) > 100 * torch.finfo(q.dtype).eps * before
        q = unit(torch.where(left, q, 0))
    small = torch.einsum("sin,sjn->sij", basis, products)
    exact = torch.promote_types(small.dtype, torch.float32)  # there is no eigh for half precision
    ritz_values, ritz_vectors = (part.to(small.dtype) for part in torch.linalg.eigh(small.to(exact)))
    largest = ritz_values.abs().argmax(dim=1)
    chosen = ritz_vectors.gather(2, largest[:, None, None].expand(-1, basis.size(1), 1)).squeeze(2)
    product = torch.einsum("skn,sk->sn", products, chosen)
    return torch.where(product.any(dim=1, keepdim=True), unit(product), basis[:, 0])
