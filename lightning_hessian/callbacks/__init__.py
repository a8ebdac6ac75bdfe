"""Lightning callbacks."""

from lightning_hessian.callbacks.regularizer import HessianRegularizer
from lightning_hessian.callbacks.robustness import AdversarialAccuracy

__all__ = ["AdversarialAccuracy", "HessianRegularizer"]
