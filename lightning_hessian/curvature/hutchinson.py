"""Hutchinson estimates for measurements: the trace, the traces of diagonal blocks, and the Frobenius norm.

Penalties in training compute v'Hv by :class:`HessianOperator` (operators.py).
"""

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
    """An estimate, its standard error, and the number of matrix-vector products used.

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
    """Estimates from the products of a symmetric matrix A with one set of probes.

    Args:
        trace: tr(A).
        frobenius_norm: sqrt(sum_ij A_ij^2).
        blocks: the traces of diagonal blocks, by name.
    """

    trace: Estimate
    frobenius_norm: Estimate
    blocks: dict[str, Estimate] = field(default_factory=dict)


def hutchinson_trace(
    operator: LinearOperator, probes: int = 10, seed: int = 0, distribution: str | Distribution = "rademacher"
) -> Estimate:
    """Estimate tr(A) = E[v'Av], where v has independent entries (Hutchinson 1990).

    The variance of one probe is 2 sum_{i != j} A_ij^2 with entries +-1, and 2 sum_ij A_ij^2 with normal entries. The
    number of probes is fixed in advance: stopping once the running mean settles would report a tolerance that the
    estimate does not have.

    Args:
        operator: the symmetric matrix.
        probes: the number of products. The standard error needs at least 2.
        seed: the seed of the probes. The global random state does not change.
        distribution: the distribution of the entries: ``"rademacher"`` (+-1), ``"gaussian"``, or a function (see
            :data:`~lightning_hessian.curvature.Distribution`).

    Returns:
        The mean of v'Av and its standard error s / sqrt(probes), where s is the samples' standard deviation.

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
    """Estimate the trace, the traces of diagonal blocks, and the Frobenius norm from the same products.

    tr(A) = E[v'Av], tr(A_bb) = E[v_b'(Av)_b] and ||A||_F^2 = E[||Av||^2]. Off-diagonal entries of A add
    only zero-mean noise to the traces of the blocks.

    Args:
        operator: the symmetric matrix.
        probes: the number of products, at least 2.
        seed: the seed of the probes.
        blocks: maps the name of each diagonal block to its ranges of rows.
        distribution: as in :func:`hutchinson_trace`.

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
        raise ValueError(f"probes={probes} is too few: a standard error needs at least 2 probes. Increase `probes`.")
    source = ProbeSource(seed)
    where = operator.device, operator.dtype, distribution_of(distribution)
    v = torch.stack([source.draw(operator.size, index, *where) for index in range(probes)])
    products = matmat(operator, v)
    diagonal = v * products  # has the diagonal as its mean
    named = {
        name: _mean(torch.stack([diagonal[:, part].sum(dim=1) for part in parts]).sum(dim=0))
        for name, parts in (blocks or {}).items()
    }
    squares = _mean(products.square().sum(dim=1))
    norm = math.sqrt(squares.estimate)
    # Delta method: d sqrt(x) = dx / (2 sqrt(x)).
    error = squares.standard_error / (2 * norm) if norm else 0.0
    return Moments(_mean(diagonal.sum(dim=1)), Estimate(norm, error, probes), named)


def _mean(samples: Tensor) -> Estimate:
    count = len(samples)
    return Estimate(samples.double().mean().item(), samples.double().std().item() / math.sqrt(count), count)
