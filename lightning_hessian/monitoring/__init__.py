"""Curvature measured while a model trains."""
