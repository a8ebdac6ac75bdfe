"""Adversarial attacks on inputs, and accuracy under attack."""
