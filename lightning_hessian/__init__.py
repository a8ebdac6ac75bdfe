"""Curvature regularization for PyTorch Lightning."""

from lightning_hessian.curvature import HigherOrderError, ProbeSource, higher_order, watch_losses
from lightning_hessian.monitoring.callback import CurvatureMonitor
from lightning_hessian.penalties import (
    ConfidencePenalty,
    ForwardContext,
    HessianNorm,
    HessianTrace,
    InputGradientNorm,
    InputHessianNorm,
    InputPenalty,
    JacobianNorm,
    Needs,
    Penalty,
    SharpnessAware,
    StepContext,
    WeightPenalty,
)
from lightning_hessian.regularization.callback import HessianRegularizer
from lightning_hessian.regularization.curvature_budget import CurvatureBudget
from lightning_hessian.regularization.gradient_share import GradientShare
from lightning_hessian.regularization.mixin import HessianRegularizationMixin
from lightning_hessian.regularization.suggest import StrengthSuggestion, suggest_strength
from lightning_hessian.regularization.verify import Verification, verify
from lightning_hessian.robustness.attacks import FGSM, PGD
from lightning_hessian.robustness.callback import AdversarialAccuracy
from lightning_hessian.robustness.radius import radius_estimate

__version__ = "0.1.0"

__all__ = [
    "AdversarialAccuracy",
    "ConfidencePenalty",
    "CurvatureBudget",
    "CurvatureMonitor",
    "FGSM",
    "ForwardContext",
    "GradientShare",
    "HessianNorm",
    "HessianRegularizationMixin",
    "HessianRegularizer",
    "HessianTrace",
    "HigherOrderError",
    "InputGradientNorm",
    "InputHessianNorm",
    "InputPenalty",
    "JacobianNorm",
    "Needs",
    "PGD",
    "Penalty",
    "ProbeSource",
    "SharpnessAware",
    "StepContext",
    "StrengthSuggestion",
    "Verification",
    "WeightPenalty",
    "higher_order",
    "radius_estimate",
    "suggest_strength",
    "verify",
    "watch_losses",
]
