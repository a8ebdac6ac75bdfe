"""Lightning callbacks."""

from lightning_hessian.callbacks.regularizer import HessianRegularizer

__all__ = ["HessianRegularizer"]
