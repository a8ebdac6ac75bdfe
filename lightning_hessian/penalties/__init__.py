"""Penalties on curvature: pure torch, one file each."""

from lightning_hessian.penalties.base import Difference, InputPenalty, Penalty, StepContext
from lightning_hessian.penalties.hessian_norm import HessianNorm
from lightning_hessian.penalties.hessian_trace import HessianTrace
from lightning_hessian.penalties.input_gradient_norm import InputGradientNorm
from lightning_hessian.penalties.input_hessian_norm import InputHessianNorm
from lightning_hessian.penalties.jacobian_norm import JacobianNorm

__all__ = [
    "Difference",
    "HessianNorm",
    "HessianTrace",
    "InputGradientNorm",
    "InputHessianNorm",
    "InputPenalty",
    "JacobianNorm",
    "Penalty",
    "StepContext",
]
