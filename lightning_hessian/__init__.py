"""Curvature regularization for PyTorch Lightning."""

from lightning_hessian.attacks import FGSM, PGD
from lightning_hessian.callbacks import AdversarialAccuracy, CurvatureMonitor, HessianRegularizer
from lightning_hessian.curvature import HigherOrderError, ProbeSource, higher_order, watch_losses
from lightning_hessian.mixin import HessianRegularizationMixin
from lightning_hessian.penalties import (
    HessianNorm,
    HessianTrace,
    InputGradientNorm,
    InputHessianNorm,
    InputPenalty,
    JacobianNorm,
    Penalty,
    StepContext,
)
from lightning_hessian.radius import radius_estimate
from lightning_hessian.suggestion import StrengthSuggestion, suggest_strength
from lightning_hessian.verification import Verification, verify

__all__ = [
    "AdversarialAccuracy",
    "CurvatureMonitor",
    "FGSM",
    "HessianNorm",
    "HessianRegularizationMixin",
    "HessianRegularizer",
    "HessianTrace",
    "HigherOrderError",
    "InputGradientNorm",
    "InputHessianNorm",
    "InputPenalty",
    "JacobianNorm",
    "PGD",
    "Penalty",
    "ProbeSource",
    "StepContext",
    "StrengthSuggestion",
    "Verification",
    "higher_order",
    "radius_estimate",
    "suggest_strength",
    "verify",
    "watch_losses",
]
