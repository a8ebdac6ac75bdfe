"""Second-order Taylor coefficients along theta + t v, pushed through a forward pass."""

from lightning_hessian.curvature.taylor.mode import taylor_mode

__all__ = ["taylor_mode"]
