"""Matrix-free curvature in pure torch: operators, probes, estimators, and ``higher_order()``."""

from lightning_hessian.curvature.context import HigherOrderError, higher_order, refuse_unsound_graph
from lightning_hessian.curvature.directions import lanczos, power_iteration
from lightning_hessian.curvature.losses import watch_losses
from lightning_hessian.curvature.operators import (
    BatchedHessianOperator,
    HessianOperator,
    LinearOperator,
    MatrixOperator,
    SampleHessians,
)
from lightning_hessian.curvature.parameters import ParameterFilter, select_parameters
from lightning_hessian.curvature.probes import ProbeSource
from lightning_hessian.curvature.trace import TraceEstimate, hutchinson_trace

__all__ = [
    "BatchedHessianOperator",
    "HessianOperator",
    "HigherOrderError",
    "LinearOperator",
    "MatrixOperator",
    "ParameterFilter",
    "ProbeSource",
    "SampleHessians",
    "TraceEstimate",
    "higher_order",
    "hutchinson_trace",
    "lanczos",
    "power_iteration",
    "refuse_unsound_graph",
    "select_parameters",
    "watch_losses",
]
