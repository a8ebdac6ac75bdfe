"""Dominant eigenvectors of many symmetric matrices at once.

The algorithms use matrix-vector products only: ``matvec`` maps vectors of shape (samples, n) to A_i v_i, row by row.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_hessian.curvature.krylov import BatchedMatvec, krylov
from lightning_hessian.curvature.vectors import normalize_rows

Search = Literal["power", "lanczos"]
SEARCHES = get_args(Search)


def power_iteration(matvec: BatchedMatvec, start: Tensor, iterations: int) -> Tensor:
    """Iterate v <- Av / ||Av||, which converges to the eigenvectors of largest absolute eigenvalue.

    If +lambda and -lambda tie, v ends in the span of both. ||Av|| still converges to lambda, but v'Av does not.

    Args:
        matvec: the products A_i v_i.
        start: starting vectors, of shape (samples, n). They need not be normalized.
        iterations: the number of products, at least 0.

    Returns:
        Unit vectors, of shape (samples, n).

    Example:
        >>> scale = torch.tensor([[1.0, -2.0]])
        >>> power_iteration(lambda v: scale * v, torch.ones(1, 2), 20).abs().round(decimals=3)
        tensor([[0., 1.]])
    """
    v = normalize_rows(start)
    for _ in range(iterations):
        product = matvec(v)
        # Where A v = 0 the product gives no direction, so v stays.
        v = torch.where(product.any(dim=1, keepdim=True), normalize_rows(product), v)
    return v


def lanczos(matvec: BatchedMatvec, start: Tensor, iterations: int) -> Tensor:
    """Return A times the Ritz vector of largest |Ritz value| in span(v, Av, ..., A^(k-1) v), normalized.

    The products with the basis are already known, so this final power step costs no product. With one iteration the
    result equals one power iteration.

    Args:
        matvec: the products A_i v_i.
        start: starting vectors, of shape (samples, n). They need not be normalized.
        iterations: k, the number of products, at least 0.

    Returns:
        Unit vectors, of shape (samples, n).

    Source:
        Lanczos 1950; Golub and Van Loan, Matrix Computations, chapter 10.

    Example:
        >>> scale = torch.tensor([[1.0, -2.0, 0.5]])
        >>> lanczos(lambda v: scale * v, torch.ones(1, 3), 3).abs().round(decimals=3)
        tensor([[0., 1., 0.]])
    """
    if iterations == 0:
        return normalize_rows(start)
    space = krylov(matvec, start, iterations)
    ritz_values, ritz_vectors = space.ritz()
    largest = ritz_values.abs().argmax(dim=1)
    chosen = ritz_vectors.gather(2, largest[:, None, None].expand(-1, ritz_vectors.size(1), 1)).squeeze(2).to(start)
    product = torch.einsum("skn,sk->sn", space.basis, torch.einsum("sij,sj->si", space.projected, chosen))
    product = product + space.residual * chosen[:, -1:]
    return torch.where(product.any(dim=1, keepdim=True), normalize_rows(product), space.basis[:, 0])
