"""Matrix-free curvature in pure PyTorch: operators, probes, estimators and ``higher_order()``."""

from lightning_hessian.curvature.eigenvectors import lanczos, power_iteration
from lightning_hessian.curvature.errors import HigherOrderError
from lightning_hessian.curvature.higher_order import higher_order
from lightning_hessian.curvature.hutchinson import Estimate, Moments, hutchinson_moments, hutchinson_trace
from lightning_hessian.curvature.losses import watch_losses
from lightning_hessian.curvature.operators import (
    BatchedHessianOperator,
    HessianOperator,
    LinearOperator,
    MatrixOperator,
    SampleHessians,
)
from lightning_hessian.curvature.parameters import ParameterFilter, padding_rows, select_parameters
from lightning_hessian.curvature.probes import Distribution, ProbeSource, gaussian, rademacher
from lightning_hessian.curvature.refusals import refuse_unsound_graph
from lightning_hessian.curvature.spectrum import (
    Eigenpairs,
    ExtremeEigenvalues,
    SpectralDensity,
    extreme_eigenvalues,
    spectral_density,
    subspace_overlap,
)

__all__ = [
    "BatchedHessianOperator",
    "Distribution",
    "Eigenpairs",
    "Estimate",
    "ExtremeEigenvalues",
    "HessianOperator",
    "HigherOrderError",
    "LinearOperator",
    "MatrixOperator",
    "Moments",
    "ParameterFilter",
    "ProbeSource",
    "SampleHessians",
    "SpectralDensity",
    "extreme_eigenvalues",
    "gaussian",
    "higher_order",
    "hutchinson_moments",
    "hutchinson_trace",
    "lanczos",
    "padding_rows",
    "power_iteration",
    "rademacher",
    "refuse_unsound_graph",
    "select_parameters",
    "spectral_density",
    "subspace_overlap",
    "watch_losses",
]
