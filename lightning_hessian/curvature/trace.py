"""Hutchinson's estimate of a trace, for measuring."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lightning_hessian.curvature.operators import LinearOperator
from lightning_hessian.curvature.probes import ProbeSource


@dataclass(frozen=True)
class TraceEstimate:
    """A trace, its standard error, and the number of matrix-vector products it took.

    Example:
        >>> print(TraceEstimate(12.34, 0.5, 100))
        12.34 +- 0.5 (100 matvecs)
    """

    estimate: float
    standard_error: float
    matvecs: int

    def __str__(self) -> str:
        return f"{self.estimate:.4g} +- {self.standard_error:.2g} ({self.matvecs} matvecs)"


def hutchinson_trace(operator: LinearOperator, probes: int = 10, seed: int = 0) -> TraceEstimate:
    """Estimate tr(A) = E[v'Av], v with independent entries +-1 (Hutchinson 1990).

    The variance of one probe is 2 sum_{i != j} A_ij^2. The number of probes is fixed beforehand: stopping when the
    running mean stops moving reports tolerances that the estimate does not have.

    Args:
        operator: the symmetric matrix.
        probes: how many products to spend; at least 2, so that there is a standard error.
        seed: of the probes; the global random state is not touched.

    Returns:
        The mean of v'Av, and its standard error s / sqrt(probes) with s the samples' standard deviation.

    Raises:
        ValueError: fewer than 2 probes.

    Example:
        >>> from lightning_hessian.curvature import MatrixOperator
        >>> hutchinson_trace(MatrixOperator(torch.diag(torch.tensor([1.0, 2.0]))), probes=2).estimate
        3.0
    """
    if probes < 2:
        raise ValueError(f"probes={probes}: a standard error needs at least 2 probes.")
    source = ProbeSource(seed)
    samples = torch.empty(probes, dtype=torch.float64)
    for index in range(probes):
        v = source.rademacher(operator.size, index, operator.device, operator.dtype)
        samples[index] = torch.dot(v, operator.matvec(v)).double()
    return TraceEstimate(samples.mean().item(), samples.std().item() / math.sqrt(probes), probes)
