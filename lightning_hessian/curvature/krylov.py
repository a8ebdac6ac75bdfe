"""Orthonormal bases of Krylov spaces, for many matrices (or starting vectors) at once."""

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
    """Q with orthonormal rows, T and r, such that A Q' = Q'T + r e_m', for each sample.

    Args:
        basis: Q, of shape (samples, m, n). Once a sample's Krylov space is exhausted, its further rows are zero.
        projected: T = Q A Q', of shape (samples, m, m), symmetric and tridiagonal.
        residual: r, of shape (samples, n).
    """

    basis: Tensor
    projected: Tensor
    residual: Tensor

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Return the eigenvalues of T, ascending, of shape (samples, m), and its eigenvectors as columns.

        All are NaN if T is not finite, for example after the weights have diverged.
        """
        dtype = torch.promote_types(self.projected.dtype, torch.float32)  # eigh does not support half precision
        finite = self.projected.isfinite().all()
        values, vectors = torch.linalg.eigh(torch.where(finite, self.projected, 0).to(dtype))
        return torch.where(finite, values, torch.nan), torch.where(finite, vectors, torch.nan)


def krylov(
    matvec: BatchedMatvec, start: Tensor, iterations: int, restart: Callable[[], Tensor] | None = None
) -> Krylov:
    """Bases of span(v, Av, ..., A^(m-1) v) by the Lanczos recurrence with full reorthogonalization, done twice.

    Args:
        matvec: the products A_i v_i.
        start: v, of shape (samples, n), nonzero. It need not be normalized.
        iterations: m, the number of products, at least 1. Values above n count as n.
        restart: returns vectors of the shape of ``start`` from which exhausted spaces continue.

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
        residual = _orthogonalized(product, basis[:, : k + 1])
        if k + 1 == m:
            break
        residual_norm, product_norm = (torch.linalg.vector_norm(v, dim=1, keepdim=True) for v in (residual, product))
        # If the product lies in the span, the residual is rounding error.
        continues = residual_norm > 100 * torch.finfo(q.dtype).eps * product_norm
        projected[:, k, k + 1] = projected[:, k + 1, k] = torch.where(continues, residual_norm, 0).squeeze(1)
        q = normalize_rows(torch.where(continues, residual, 0))
        if restart is not None and not continues.all():
            q = torch.where(continues, q, normalize_rows(_orthogonalized(restart(), basis[:, : k + 1])))
    return Krylov(basis, projected, residual)


def _orthogonalized(v: Tensor, basis: Tensor) -> Tensor:
    for _ in range(2):
        v = v - torch.einsum("skn,sk->sn", basis, torch.einsum("skn,sn->sk", basis, v))
    return v
