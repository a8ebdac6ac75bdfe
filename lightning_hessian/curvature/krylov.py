"""Orthonormal bases of Krylov spaces, for many matrices (or many starts) at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_hessian.curvature.vectors import normalize_rows

BatchedMatvec = Callable[[Tensor], Tensor]
"""Vectors of shape (samples, n) -> A_i v_i, row by row."""


@dataclass(frozen=True)
class Krylov:
    """Q, of orthonormal rows, with A Q' = Q'T + r e_m'; one of each for every sample.

    Args:
        basis: Q, of shape (samples, m, n). Where a sample's Krylov space is exhausted its further rows are zero.
        projected: T = Q A Q', of shape (samples, m, m), symmetric and tridiagonal.
        residual: r, of shape (samples, n).
    """

    basis: Tensor
    projected: Tensor
    residual: Tensor

    def ritz(self) -> tuple[Tensor, Tensor]:
        """The eigenvalues of T, ascending, of shape (samples, m), and its eigenvectors, in columns.

        NaN where T is not finite, as where weights have diverged.
        """
        dtype = torch.promote_types(self.projected.dtype, torch.float32)  # there is no eigh for half precision
        finite = self.projected.isfinite().all()
        values, vectors = torch.linalg.eigh(torch.where(finite, self.projected, 0).to(dtype))
        return torch.where(finite, values, torch.nan), torch.where(finite, vectors, torch.nan)


def krylov(
    matvec: BatchedMatvec, start: Tensor, iterations: int, restart: Callable[[], Tensor] | None = None
) -> Krylov:
    """The bases of span(v, Av, ..., A^(m-1) v) by the Lanczos recurrence with full reorthogonalization, done twice.

    Args:
        matvec: the products A_i v_i.
        start: v, of shape (samples, n), not zero; need not be of length 1.
        iterations: m, how many products to spend, at least 1; n at most.
        restart: gives vectors, of the shape of ``start``, to go on from where a space is exhausted.

    Source:
        Lanczos 1950; Golub and Van Loan, Matrix Computations, chapter 10.
    """
    q = normalize_rows(start)
    samples, n = q.shape
    m = min(iterations, n)
    basis, projected = q.new_zeros(samples, m, n), q.new_zeros(samples, m, m)
    for k in range(m):
        basis[:, k] = q
        product = matvec(q)
        projected[:, k, k] = torch.einsum("sn,sn->s", q, product)
        residual = _orthogonal(product, basis[:, : k + 1])
        if k + 1 == m:
            break
        size, before = (torch.linalg.vector_norm(v, dim=1, keepdim=True) for v in (residual, product))
        # What is left of a product inside the span is rounding.
        left = size > 100 * torch.finfo(q.dtype).eps * before
        projected[:, k, k + 1] = projected[:, k + 1, k] = torch.where(left, size, 0).squeeze(1)
        q = normalize_rows(torch.where(left, residual, 0))
        if restart is not None and not left.all():
            q = torch.where(left, q, normalize_rows(_orthogonal(restart(), basis[:, : k + 1])))
    return Krylov(basis, projected, residual)


def _orthogonal(v: Tensor, basis: Tensor) -> Tensor:
    for _ in range(2):
        v = v - torch.einsum("skn,sk->sn", basis, torch.einsum("skn,sn->sk", basis, v))
    return v
