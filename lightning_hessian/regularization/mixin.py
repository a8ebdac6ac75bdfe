"""The same penalty inside a hand-written ``training_step``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_hessian.penalties import InputPenalty
from lightning_hessian.regularization.callback import HessianRegularizer, enlist, penalties_of, start
from lightning_hessian.regularization.checks import total_steps, warn_of_long_warmup
from lightning_hessian.regularization.fit import RegularizedFit
from lightning_hessian.regularization.states import save_states, states_in
from lightning_hessian.step.lightning_loop import LightningLoop

Output = TypeVar("Output")


class HessianRegularizationMixin(LightningModule):
    """Adds ``self.regularized(...)`` to a LightningModule, for manual optimization or for a part of the loss only.

    Set ``self.regularizer`` to a :class:`HessianRegularizer` (or a list of them). Do not pass it to the Trainer as a
    callback as well. Checkpoints hold what its penalties keep from step to step (the vector of :class:`HessianNorm`).

    These hooks must call ``super()`` where a module overrides them: ``on_save_checkpoint``, ``on_load_checkpoint``,
    ``on_before_backward`` (it sees whether the loss has other terms), ``on_after_backward`` and
    ``configure_callbacks`` (its callback warns if the first epoch passes without a call of ``self.regularized``).

    Raises:
        MisconfigurationException: when fitting starts or in ``self.regularized``: ``self.regularizer`` is not a
            HessianRegularizer.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_hessian import HessianRegularizationMixin, HessianRegularizer, HessianTrace
        >>> class Net(HessianRegularizationMixin):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.automatic_optimization = False
        ...         self.layer = nn.Linear(4, 2)
        ...         self.regularizer = HessianRegularizer(HessianTrace(), strength=1e-3)
        ...     def training_step(self, batch, batch_idx):
        ...         x, y = batch
        ...         optimizer = self.optimizers()
        ...         optimizer.zero_grad()
        ...         self.manual_backward(
        ...             self.regularized(lambda: nn.functional.cross_entropy(self.layer(x), y))
        ...         )
        ...         optimizer.step()
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
    """

    regularizer: HessianRegularizer | list[HessianRegularizer] | None = None
    _regularized_fit: RegularizedFit | None = None
    _regularized_by: tuple[HessianRegularizer, ...] = ()

    def on_before_backward(self, loss: Tensor) -> None:
        super().on_before_backward(loss)
        if self._regularized_fit is not None:
            self._regularized_fit.total = loss.detach()

    def on_after_backward(self) -> None:
        super().on_after_backward()
        if self._regularized_fit is not None:
            self._regularized_fit.log_skipped()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        save_states([one for regularizer in self._regularizers() for one in regularizer._in_fit], checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            self._fit_now(self._regularizers()).resume(states_in(checkpoint))

    def configure_callbacks(self) -> list[Callback]:
        others = super().configure_callbacks()
        return [*([others] if isinstance(others, Callback) else others), _FitOfMixin()]

    def _regularizers(self) -> list[HessianRegularizer]:
        if self.regularizer is None:
            return []
        given = self.regularizer if isinstance(self.regularizer, list) else [self.regularizer]
        for one in given:
            if not isinstance(one, HessianRegularizer):
                raise MisconfigurationException(
                    f"{type(self).__name__}.regularizer={self.regularizer!r} must be a HessianRegularizer or a list of "
                    "them. They hold a penalty and its strength: `self.regularizer = "
                    "HessianRegularizer(HessianTrace(), strength=1e-3)`."
                )
        return given

    def _fit_now(self, regularizers: Sequence[HessianRegularizer]) -> RegularizedFit:
        """The fit by the present Trainer, with the penalties of these regularizers."""
        fit = self._regularized_fit
        loop = LightningLoop(self.trainer, self)
        if fit is None or fit.loop != loop:
            fit, self._regularized_by = RegularizedFit(self, loop), ()
            self._regularized_fit = fit
        if self._regularized_by != tuple(regularizers):
            enlist(fit, regularizers)
            self._regularized_by = tuple(regularizers)
        return fit

    def regularized(self, loss: Callable[..., Output], inputs: Tensor | Sequence[Tensor] | None = None) -> Output:
        """Compute the loss and add strength * penalty to it.

        Args:
            loss: a function that runs the forward pass and returns the loss (a scalar tensor, or a dict with "loss").
                The forward pass must happen inside it, so that its layers are made differentiable three times.
                Without ``inputs`` it takes no argument.
            inputs: the inputs for penalties on the inputs: one tensor or several of shape (samples, ...), such as the
                batch's images or embeddings. ``loss`` gets them as its arguments.

        Returns:
            What ``loss`` returns, with the penalties added to the loss.

        Raises:
            MisconfigurationException: ``self.regularizer`` is not set, or the penalty cannot be computed here.
        """
        regularizers = self._regularizers()
        if not regularizers:
            raise MisconfigurationException(
                f"{type(self).__name__}.regularizer is not set, so there is no penalty to add. Set it in `__init__`: "
                "`self.regularizer = HessianRegularizer(HessianTrace(), strength=1e-3)`."
            )
        fit = self._fit_now(regularizers)
        if not fit.has_started:
            start(fit, regularizers, lambda: total_steps(self.trainer))
            for one in regularizers:
                warn_of_long_warmup(lambda: self.trainer.estimated_stepping_batches, one._first_step, one.warmup_steps)
        if inputs is None:
            on_inputs = [p for p in penalties_of(regularizers) if isinstance(p, InputPenalty) and p.layer is None]
            if on_inputs:
                raise MisconfigurationException(
                    f"The penalty {on_inputs[0].name} differentiates by the inputs, which the mixin does not see. Hand "
                    "them over: `self.regularized(lambda x: loss(x), inputs=x)`."
                )
            return fit(lambda _: loss())
        given = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
        return fit(lambda tensors: loss(*tensors), given, all_inputs=True)


class _FitOfMixin(Callback):
    """Ends the fit of a module of the mixin, and warns where the module has a regularizer and does not use it."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._has_looked = False
            self.teardown(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, HessianRegularizationMixin)
        pl_module._regularizers()  # refuses what is none

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, HessianRegularizationMixin)
        is_used = pl_module._regularized_fit is not None and pl_module._regularized_fit.has_started
        if not self._has_looked and pl_module._regularizers() and not is_used:
            name = type(pl_module).__name__
            rank_zero_warn(
                f"{name}.regularizer is set, and the first epoch has passed without a call of `self.regularized`, so "
                f"{name} trains without the penalty. Compute the loss by `self.regularized(lambda: ...)` in "
                "`training_step`, or set `self.regularizer = None`."
            )
        self._has_looked = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, HessianRegularizationMixin)
        pl_module._regularized_fit, pl_module._regularized_by = None, ()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")
