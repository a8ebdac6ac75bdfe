"""Hutchinson's estimates, for measuring: the trace, those of diagonal blocks, and the Frobenius norm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_hessian.curvature.operators import LinearOperator, matmat
from lightning_hessian.curvature.probes import Distribution, ProbeSource, distribution_of


@dataclass(frozen=True)
class Estimate:
    """A number, its standard error, and the number of matrix-vector products it took.

    Example:
        >>> print(Estimate(12.34, 0.5, 100))
        12.34 +- 0.5 (100 matvecs)
    """

    estimate: float
    standard_error: float
    matvecs: int

    def __str__(self) -> str:
        return f"{self.estimate:.4g} +- {self.standard_error:.2g} ({self.matvecs} matvecs)"


@dataclass(frozen=True)
class Moments:
    """What the products of a symmetric matrix A with one set of probes give.

    Args:
        trace: tr(A).
        frobenius_norm: the root of sum_ij A_ij^2.
        blocks: the traces of diagonal blocks, by name.
    """

    trace: Estimate
    frobenius_norm: Estimate
    blocks: dict[str, Estimate] = field(default_factory=dict)


def hutchinson_trace(
    operator: LinearOperator, probes: int = 10, seed: int = 0, distribution: str | Distribution = "rademacher"
) -> Estimate:
    """Estimate tr(A) = E[v'Av], v with independent entries (Hutchinson 1990).

    The variance of one probe is 2 sum_{i != j} A_ij^2 with entries +-1, and 2 sum_ij A_ij^2 with normal ones. The
    number of probes is fixed beforehand: stopping when the running mean stops moving reports tolerances that the
    estimate does not have.

    Args:
        operator: the symmetric matrix.
        probes: how many products to spend; at least 2, so that there is a standard error.
        seed: of the probes; the global random state is not touched.
        distribution: of their entries: ``"rademacher"`` (+-1), ``"gaussian"``, or a function, see
            :data:`~lightning_hessian.curvature.Distribution`.

    Returns:
        The mean of v'Av, and its standard error s / sqrt(probes) with s the samples' standard deviation.

    Raises:
        ValueError: fewer than 2 probes.

    Example:
        >>> from lightning_hessian.curvature import MatrixOperator
        >>> hutchinson_trace(MatrixOperator(torch.diag(torch.tensor([1.0, 2.0]))), probes=2).estimate
        3.0
    """
    return hutchinson_moments(operator, probes, seed, distribution=distribution).trace


def hutchinson_moments(
    operator: LinearOperator,
    probes: int = 10,
    seed: int = 0,
    blocks: Mapping[str, Sequence[slice]] | None = None,
    distribution: str | Distribution = "rademacher",
) -> Moments:
    """Estimate the trace, those of diagonal blocks, and the Frobenius norm from the same products.

    tr(A) = E[v'Av], tr(A_bb) = E[v_b'(Av)_b] and ||A||_F^2 = E[||Av||^2]. What the blocks' traces have of A outside
    of the diagonal is noise of mean zero.

    Args:
        operator: the symmetric matrix.
        probes: how many products to spend; at least 2.
        seed: of the probes.
        blocks: by name, the ranges of rows that a diagonal block is made of.
        distribution: as for :func:`hutchinson_trace`.

    Raises:
        ValueError: fewer than 2 probes.

    Example:
        >>> from lightning_hessian.curvature import MatrixOperator
        >>> matrix = MatrixOperator(torch.diag(torch.tensor([1.0, 2.0, 2.0])))
        >>> found = hutchinson_moments(matrix, blocks={"last": [slice(1, 3)]})
        >>> found.frobenius_norm.estimate, found.blocks["last"].estimate
        (3.0, 4.0)
    """
    if probes < 2:
        raise ValueError(f"probes={probes}: a standard error needs at least 2 probes.")
    source = ProbeSource(seed)
    where = operator.device, operator.dtype, distribution_of(distribution)
    v = torch.stack([source.draw(operator.size, index, *where) for index in range(probes)])
    products = matmat(operator, v)
    diagonal = v * products  # its mean is the diagonal
    named = {
        name: _mean(torch.stack([diagonal[:, part].sum(dim=1) for part in parts]).sum(dim=0))
        for name, parts in (blocks or {}).items()
    }
    squares = _mean(products.square().sum(dim=1))
    norm = math.sqrt(squares.estimate)
    # That of a square root is the square's over twice the root.
    error = squares.standard_error / (2 * norm) if norm else 0.0
    return Moments(_mean(diagonal.sum(dim=1)), Estimate(norm, error, probes), named)


def _mean(samples: Tensor) -> Estimate:
    count = len(samples)
    return Estimate(samples.double().mean().item(), samples.double().std().item() / math.sqrt(count), count)
