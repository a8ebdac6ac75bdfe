"""Penalties and the curvature monitor in the Trainer of Hugging Face's transformers."""

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "lightning_hessian.huggingface needs transformers and accelerate: pip install 'lightning-hessian[huggingface]'."
    ) from error

from lightning_hessian.huggingface.attachment import attach

__all__ = ["attach"]
