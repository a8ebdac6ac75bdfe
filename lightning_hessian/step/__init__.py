"""Run one training step repeatedly, without side effects."""
