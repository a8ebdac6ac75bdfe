"""Extreme eigenvalues and spectral densities from matrix-vector products."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightning_hessian.arguments import whole_number
from lightning_hessian.curvature.krylov import krylov
from lightning_hessian.curvature.operators import LinearOperator, matmat
from lightning_hessian.curvature.probes import ProbeSource

_ROUNDING = 30
"""Lower bound for residuals, in units of machine epsilon times the largest absolute eigenvalue."""


@dataclass(frozen=True)
class Eigenpairs:
    """Approximate eigenvalues and eigenvectors.

    Args:
        values: theta, of shape (k,).
        residuals: ||A y - theta y||, of shape (k,), but at least the rounding error. An eigenvalue lies within this
            distance of theta.
        vectors: y, of shape (k, n), with orthonormal rows.
    """

    values: Tensor
    residuals: Tensor
    vectors: Tensor


@dataclass(frozen=True)
class ExtremeEigenvalues:
    """Both ends of a spectrum.

    Args:
        largest: the largest eigenvalues, descending.
        smallest: the smallest eigenvalues, ascending.
        matvecs: the number of products used.
    """

    largest: Eigenpairs
    smallest: Eigenpairs
    matvecs: int


def extreme_eigenvalues(
    operator: LinearOperator, largest: int = 1, smallest: int = 1, iterations: int = 20, seed: int = 0
) -> ExtremeEigenvalues:
    """The largest and the smallest (most negative) eigenvalues by Lanczos with full reorthogonalization.

    Outlying eigenvalues converge first. The residuals measure the error. All eigenvalues are exact once there are as
    many iterations as the matrix has rows. The basis stores ``iterations`` vectors.

    Args:
        operator: the symmetric matrix.
        largest: the number of largest eigenvalues, at least 0.
        smallest: the number of smallest eigenvalues, at least 0.
        iterations: the number of products, at least ``largest`` and at least ``smallest``.
        seed: the seed of the starting vector.

    Raises:
        ValueError: ``largest`` or ``smallest`` exceeds the size of the matrix or the number of iterations.

    Source:
        Lanczos 1950; Golub and Van Loan, Matrix Computations, chapter 10.

    Example:
        >>> from lightning_hessian.curvature import MatrixOperator
        >>> ends = extreme_eigenvalues(MatrixOperator(torch.diag(torch.tensor([1.0, 5.0, -2.0]))))
        >>> [round(value.item(), 4) for value in (ends.largest.values[0], ends.smallest.values[0])]
        [5.0, -2.0]
    """
    check_eigenvalues(largest, smallest, iterations, operator.size)
    generator = ProbeSource(seed).generator(0, operator.device)
    shape = (1, operator.size)
    draw = partial(torch.randn, shape, generator=generator, device=operator.device, dtype=operator.dtype)
    space = krylov(partial(matmat, operator), draw(), iterations, restart=draw)
    values, vectors = space.ritz()
    # A y - theta y = (last entry of the eigenvector of T) r.
    residuals = vectors[0, -1].abs() * torch.linalg.vector_norm(space.residual).to(values)
    residuals = residuals.clamp(min=_ROUNDING * torch.finfo(operator.dtype).eps * values.abs().max().item())

    def pairs(chosen: Tensor) -> Eigenpairs:
        ritz = vectors[0, :, chosen].T.to(space.basis) @ space.basis[0]
        return Eigenpairs(values[0, chosen], residuals[chosen], ritz)

    order = torch.arange(values.size(1), device=values.device)
    return ExtremeEigenvalues(pairs(order.flip(0)[:largest]), pairs(order[:smallest]), values.size(1))


def check_eigenvalues(largest: int, smallest: int, iterations: int, size: int | None = None) -> None:
    """Check the numbers of eigenvalues asked of :func:`extreme_eigenvalues`.

    Raises:
        ValueError: they cannot be computed for a matrix of this size, or of any size if it is None.
    """
    whole_number("largest", largest, 0, "the number of largest eigenvalues")
    whole_number("smallest", smallest, 0, "the number of smallest eigenvalues")
    whole_number("iterations", iterations, 1, "the number of Lanczos products")
    most = max(largest, smallest)
    if most > iterations:
        raise ValueError(
            f"{most} eigenvalues at one end of the spectrum are more than iterations={iterations} products can "
            f"resolve. Set `iterations` to at least {2 * most}; outliers converge first."
        )
    if size is not None and most > size:
        raise ValueError(
            f"{most} eigenvalues are asked for, and the matrix has {size}: one for each parameter. Reduce `largest` "
            "and `smallest`."
        )


@dataclass(frozen=True)
class SpectralDensity:
    """The distribution of a matrix's eigenvalues: one weighted set of points per Lanczos run.

    Args:
        nodes: Ritz values, of shape (runs, m).
        weights: their weights, of shape (runs, m). They sum to 1 in each run.
        matvecs: the number of products used.
    """

    nodes: Tensor
    weights: Tensor
    matvecs: int

    def on_grid(self, grid: Tensor, width: float) -> Tensor:
        """Return the density on a grid. A Gaussian with standard deviation ``width`` smooths each node.

        It integrates to 1. Times n and the length of an interval, it gives the number of eigenvalues there.
        """
        distances = (grid.unsqueeze(1) - self.nodes.reshape(1, -1)) / width
        weights = self.weights.reshape(-1) / len(self.weights)
        return (torch.exp(-distances.square() / 2) * weights).sum(dim=1) / (width * math.sqrt(2 * math.pi))


def spectral_density(operator: LinearOperator, runs: int = 4, iterations: int = 30, seed: int = 0) -> SpectralDensity:
    """The spectral density by stochastic Lanczos quadrature.

    Each run starts from a random v with entries +-1. The Gauss quadrature of v's spectral measure has the Ritz values
    as nodes and the squared first entries of T's eigenvectors as weights. The density is the mean over v.

    Args:
        operator: the symmetric matrix.
        runs: the number of vectors v.
        iterations: the number of products per run.
        seed: the seed of the vectors v.

    Raises:
        ValueError: ``runs`` or ``iterations`` is below 1.

    Source:
        Golub and Welsch 1969; Lin, Saad, Yang 2016, "Approximating Spectral Densities of Large Matrices";
        Ghorbani, Krishnan, Xiao 2019 (arXiv 1901.10159).

    Example:
        >>> from lightning_hessian.curvature import MatrixOperator
        >>> density = spectral_density(MatrixOperator(torch.eye(4)), runs=2)
        >>> grid = torch.linspace(0.5, 1.5, 1001)
        >>> round(torch.trapezoid(density.on_grid(grid, 0.05), grid).item(), 4)
        1.0
    """
    whole_number("runs", runs, 1)
    whole_number("iterations", iterations, 1)
    source = ProbeSource(seed)
    starts = [source.draw(operator.size, run, operator.device, operator.dtype) for run in range(runs)]
    space = krylov(partial(matmat, operator), torch.stack(starts), iterations)
    nodes, vectors = space.ritz()
    return SpectralDensity(nodes, vectors[:, 0].square(), nodes.numel())


def subspace_overlap(a: Tensor, b: Tensor) -> float:
    """||A B'||_F^2 / k, the overlap of two k-dimensional subspaces: 1 if they are equal, 0 if orthogonal.

    The expected overlap of two random subspaces in n dimensions is k / n.

    Args:
        a: a basis of one subspace, of shape (k, n), with orthonormal rows.
        b: a basis of the other subspace, of the same form.

    Source:
        Wu et al. 2020, "Dissecting Hessian" (arXiv 2010.04261); Gur-Ari et al. 2018 (arXiv 1812.04754).

    Example:
        >>> subspace_overlap(torch.eye(3)[:2], torch.eye(3)[1:])
        0.5
    """
    return (a @ b.T).square().sum().item() / len(a)
