"""Strengths that adapt during training: settings, and what adapts a strength in a fit by such a setting."""

from __future__ import annotations

from lightning_hessian.regularization.curvature_budget import BudgetControl, CurvatureBudget
from lightning_hessian.regularization.gradient_share import GradientShare, ShareControl

Adaptive = GradientShare | CurvatureBudget
"""The settings."""

Control = ShareControl | BudgetControl
"""What adapts the strength of one penalty."""
