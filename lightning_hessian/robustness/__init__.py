"""Attacks on the inputs, and accuracy under them."""
