"""Penalties added to the loss of a LightningModule."""
