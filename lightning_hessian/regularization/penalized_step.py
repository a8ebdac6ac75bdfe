"""Stands in for a module's ``training_step`` during a fit. The penalties are added in fit.py."""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_hessian.regularization.fit import RegularizedFit


class PenalizedStep:
    """Stands in for a module's ``training_step``.

    Args:
        module: the module.
        fit: adds the penalties.
    """

    def __init__(self, module: LightningModule, fit: RegularizedFit) -> None:
        self.fit = fit
        self.module = module
        self.instance_attribute = self.module.__dict__.get("training_step")
        self.original = self.module.training_step
        # Lightning looks at the signature to see what to pass.
        functools.update_wrapper(self, self.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        refuse_empty_batch((args, kwargs))
        if not self.fit.has_started:
            self.fit.start()  # Lightning's tuners train before `on_fit_start`, with the callbacks set aside
        # Whatever Lightning hands over, the batch in it is found: a step takes it first, or by its name.
        batch = args[0] if args else kwargs.get("batch")

        def step(batch: Any) -> Any:
            if args:
                return self.original(batch, *args[1:], **kwargs)
            return self.original(**{**kwargs, "batch": batch} if "batch" in kwargs else kwargs)

        return self.fit(step, batch)

    def __reduce__(self) -> Any:
        # A copy of the module made in the middle of a fit has its own, plain training step.
        if isinstance(self.original, MethodType):
            return _bound, (self.original.__func__, self.module)
        return _itself, (self.original,)


def install(module: LightningModule, fit: RegularizedFit) -> None:
    """Put a penalized step in the place of the module's own."""
    remove(module)
    module.training_step = PenalizedStep(module, fit)  # type: ignore[method-assign]


def remove(module: LightningModule) -> None:
    """Give a module its own training step back, if it has a penalized one."""
    step = module.training_step
    if not isinstance(step, PenalizedStep):
        return
    if step.instance_attribute is None:
        del module.training_step
    else:
        module.training_step = step.instance_attribute  # type: ignore[method-assign]


def _bound(function: Any, module: LightningModule) -> Any:
    return MethodType(function, module)


def _itself(step: Any) -> Any:
    return step


def refuse_empty_batch(batch: Any) -> None:
    """Refuse a batch without an entry.

    Raises:
        MisconfigurationException: the batch is empty.
    """
    sizes: list[int] = []
    apply_to_collection(batch, Tensor, lambda tensor: sizes.append(tensor.numel()))
    if sizes and not any(sizes):
        raise MisconfigurationException(
            "The batch is empty: none of its tensors has an entry, so its mean loss and the loss's curvature do not "
            "exist. Look at the dataset and the sampler, or pass drop_last=True to the DataLoader."
        )
