"""Curvature measurements during training."""
