"""Curvature penalties in pure torch, one file each."""

from lightning_hessian.penalties.base import InputPenalty, Needs, Penalty, WeightPenalty
from lightning_hessian.penalties.confidence import ConfidencePenalty
from lightning_hessian.penalties.differences import AscentDifference, DifferenceContext, SecondDifference
from lightning_hessian.penalties.hessian_norm import HessianNorm
from lightning_hessian.penalties.hessian_trace import HessianTrace
from lightning_hessian.penalties.input_gradient_norm import InputGradientNorm
from lightning_hessian.penalties.input_hessian_norm import InputHessianNorm
from lightning_hessian.penalties.jacobian_norm import JacobianNorm
from lightning_hessian.penalties.sharpness_aware import SharpnessAware
from lightning_hessian.penalties.step_context import ForwardContext, StepContext

__all__ = [
    "AscentDifference",
    "ConfidencePenalty",
    "DifferenceContext",
    "ForwardContext",
    "HessianNorm",
    "HessianTrace",
    "InputGradientNorm",
    "InputHessianNorm",
    "InputPenalty",
    "JacobianNorm",
    "Needs",
    "Penalty",
    "SecondDifference",
    "SharpnessAware",
    "StepContext",
    "WeightPenalty",
]
