"""Matrix-free curvature in pure torch: operators, probes, estimators, and ``higher_order()``."""

from lightning_hessian.curvature.context import HigherOrderError, higher_order, refuse_unsound_graph
from lightning_hessian.curvature.operators import (
    BatchedHessianOperator,
    HessianOperator,
    LinearOperator,
    MatrixOperator,
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
    "TraceEstimate",
    "higher_order",
    "hutchinson_trace",
    "refuse_unsound_graph",
    "select_parameters",
]
