"""Callbacks for Lightning's Trainer."""

from lightning_hessian.callbacks.monitor import CurvatureMonitor
from lightning_hessian.callbacks.regularizer import HessianRegularizer
from lightning_hessian.callbacks.robustness import AdversarialAccuracy

__all__ = ["AdversarialAccuracy", "CurvatureMonitor", "HessianRegularizer"]
