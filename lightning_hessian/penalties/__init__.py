"""Penalties on curvature: pure torch, one file each."""

from lightning_hessian.penalties.base import Penalty, StepContext
from lightning_hessian.penalties.hessian_trace import HessianTrace

__all__ = ["HessianTrace", "Penalty", "StepContext"]
