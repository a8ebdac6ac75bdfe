"""What :func:`attach` does to a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback

from lightning_hessian.huggingface.loop import HuggingFaceLoop, refuse_trainer
from lightning_hessian.monitoring.callback import CurvatureMonitor
from lightning_hessian.monitoring.measurement import first_batches
from lightning_hessian.regularization.callback import HessianRegularizer, enlist, start
from lightning_hessian.regularization.checks import warn_of_long_warmup
from lightning_hessian.regularization.fit import RegularizedFit
from lightning_hessian.regularization.penalized_step import refuse_empty_batch
from lightning_hessian.regularization.states import save_states, states_in

_FILE = "lightning_hessian.pt"
"""In the Trainer's checkpoints, beside the optimizer."""


def attach(trainer: Trainer, *callbacks: HessianRegularizer | CurvatureMonitor) -> None:
    r"""Let a Trainer of transformers train on loss + strength * penalty, and measure the curvature.

    Call it once, before ``trainer.train()``. It takes the callbacks that Lightning's Trainer takes, with the same
    settings, and any subclass of ``transformers.Trainer`` whose training step calls ``self.compute_loss``. The penalty
    is added to what ``compute_loss`` returns, in training only; so label smoothing, ``compute_loss_func``, autocast,
    DDP, clipping and schedulers work unchanged.

    With gradient accumulation each batch has a penalty of its own, that of its mean loss. It has the weight that the
    batch's loss has in the Trainer's loss: its share of the labels (``num_items_in_batch``), or one divided by the
    number of batches.

    The Trainer's logs have ``curvature/<penalty name>``, the raw value, and ``train/penalty``, what was added to
    ``loss``; both are means since the last log. ``loss - train/penalty`` is the task loss. A :class:`CurvatureMonitor`
    logs ``curvature/trace`` and others, in entries of their own. Checkpoints hold what penalties keep from step to step
    and the monitor's history.

    Args:
        trainer: the Trainer.
        callbacks: regularizers and monitors.

    Raises:
        ValueError: a callback is neither a HessianRegularizer nor a CurvatureMonitor, or there is none.
        MisconfigurationException: DeepSpeed, FSDP, nn.DataParallel or 8-bit floats; or ``attach`` was called before.
            When training starts: float16 where it does not work, ``parameters`` that match nothing, and what else the
            callbacks refuse.

    Example:
        >>> import tempfile, torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments
        >>> from lightning_hessian import HessianRegularizer, HessianTrace
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=1))
        >>> data = [{"input_ids": torch.arange(5), "labels": torch.arange(5)} for _ in range(4)]
        >>> args = TrainingArguments(tempfile.mkdtemp(), max_steps=1, report_to="none", disable_tqdm=True, use_cpu=True)
        >>> trainer = Trainer(model, args, train_dataset=data)
        >>> attach(trainer, HessianRegularizer(HessianTrace(), strength=1e-3))
    """
    for one in callbacks:
        if not isinstance(one, HessianRegularizer | CurvatureMonitor):
            raise ValueError(
                f"attach() takes HessianRegularizer and CurvatureMonitor objects, and got {one!r}. Hand callbacks of "
                "transformers to the Trainer itself; a penalty goes into HessianRegularizer(penalty, strength)."
            )
    if not callbacks:
        raise ValueError("attach() has nothing to attach. Pass HessianRegularizer(HessianTrace(), strength=1e-3).")
    if any(isinstance(one, Attachment) for one in trainer.callback_handler.callbacks):
        raise MisconfigurationException(
            "attach() was called for this Trainer before. Each penalty must see the loss without the others: hand all "
            "callbacks to one call."
        )
    refuse_trainer(trainer)
    trainer.add_callback(Attachment(trainer, callbacks))


class Attachment(TrainerCallback):
    """Stands between a Trainer and what is attached to it.

    Args:
        trainer: the Trainer. Its ``compute_loss``, its ``log`` and how it saves and loads its optimizer get wrapped.
        callbacks: regularizers and monitors.
    """

    def __init__(self, trainer: Trainer, callbacks: Sequence[HessianRegularizer | CurvatureMonitor]) -> None:
        self.trainer = trainer
        self.callbacks = callbacks
        self.regularizers = [one for one in callbacks if isinstance(one, HessianRegularizer)]
        self.monitors = [one for one in callbacks if isinstance(one, CurvatureMonitor)]
        self._loop: HuggingFaceLoop | None = None
        self._fit: RegularizedFit | None = None
        self._loss_was_computed = False
        self._epochs = 0
        self._resumed: Mapping[str, Any] = {}
        self._compute_loss: Callable[..., Any] = trainer.compute_loss
        self._log: Callable[..., None] = trainer.log
        self._save: Callable[[str], None] = trainer._save_optimizer_and_scheduler
        self._load: Callable[[str | None], None] = trainer._load_optimizer_and_scheduler
        # As attributes of the object, so that subclasses may override them, and call `super()`, as they like.
        wrapped = {
            "compute_loss": self.compute_loss,
            "log": self.log,
            "_save_optimizer_and_scheduler": self.save,
            "_load_optimizer_and_scheduler": self.load,
        }
        vars(trainer).update(wrapped)

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's loss, in training with the penalties."""
        fit, loop = self._fit, self._loop
        if fit is None or loop is None or not (loop.is_training and loop.model.training and torch.is_grad_enabled()):
            return self._compute_loss(model, inputs, *args, **kwargs)
        self._loss_was_computed = True
        refuse_empty_batch(inputs)
        share = self._share(inputs, kwargs.get("num_items_in_batch"))
        loop.weight = 1 / self.trainer.current_gradient_accumulation_steps if share is None else share
        try:
            if share == 0 or not fit.acts_now():  # without a label a mean loss does not exist
                return self._compute_loss(model, inputs, *args, **kwargs)
            return _inside(model, lambda model: self._penalized(fit, share or 1.0, model, inputs, args, kwargs))
        finally:
            loop.batch_in_step += 1

    def _penalized(
        self, fit: RegularizedFit, share: float, model: nn.Module, inputs: Any, args: Any, kwargs: Any
    ) -> Any:
        """The batch's share of the Trainer's loss, with the penalties of its mean loss."""

        def step(batch: Any) -> Any:
            found = self._compute_loss(model, batch, *args, **kwargs)
            if isinstance(found, Tensor):
                return found / share
            loss, outputs = found
            return {"loss": loss / share, "outputs": outputs}

        found = fit(step, inputs)
        if isinstance(found, Tensor):
            return found * share
        return found["loss"] * share, found["outputs"]

    def _share(self, inputs: Any, items: Tensor | int | None) -> float | None:
        """The batch's share of what the loss is averaged over; None where the Trainer divides the loss itself."""
        trainer = self.trainer
        batches = trainer.current_gradient_accumulation_steps
        is_scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
        if is_scaled is None:
            by_model = trainer.model_accepts_loss_kwargs and items is not None
            is_scaled = by_model or trainer.compute_loss_func is not None
        if not is_scaled or batches == 1:
            return None
        # The Trainer's own count, as it has counted the items of all batches together.
        own = None if items is None else trainer._get_num_items_in_batch([inputs], trainer.args.device)
        return 1 / batches if own is None else float(own) / float(items)  # type: ignore[arg-type]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the loss of training what the penalties log."""
        if "loss" in logs and self._loop is not None:
            logs = logs | self._loop.take_logged()
        self._log(logs, *args, **kwargs)

    def save(self, output_dir: str) -> None:
        """Save the optimizer, and beside it what penalties and monitors keep."""
        self._save(output_dir)
        states: dict[str, Any] = {"monitors": [one.state_dict() for one in self.monitors]}
        save_states([one for regularizer in self.regularizers for one in regularizer._in_fit], states)
        if self.trainer.args.should_save:
            torch.save(states, Path(output_dir) / _FILE)

    def load(self, checkpoint: str | None) -> None:
        """Load the optimizer, and what penalties and monitors go on from."""
        self._load(checkpoint)
        path = None if checkpoint is None else Path(checkpoint) / _FILE
        self._resumed = torch.load(path, map_location="cpu") if path is not None and path.is_file() else {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._loop = loop = HuggingFaceLoop(self.trainer, self.callbacks)
        self._loss_was_computed = False
        self._fit = None
        if self.regularizers:
            fit = RegularizedFit(loop.model, loop)
            fit.resume(states_in(self._resumed))
            enlist(fit, self.regularizers)
            start(fit, self.regularizers, lambda: state.max_steps)
            for one in self.regularizers:
                warn_of_long_warmup(lambda: state.max_steps, one._first_step, one.warmup_steps)
            self._fit = fit
        epoch = state.epoch or 0.0
        self._epochs = int(epoch)
        kept = self._resumed.get("monitors", [])
        for index, monitor in enumerate(self.monitors):
            monitor._check(loop.precision, is_first_process=args.process_index == 0)
            batches = partial(self._fixed_batches, monitor)
            monitor._begin(loop, loop.model, monitor.loss or self._mean_loss, batches)
            if index < len(kept):
                monitor.load_state_dict(kept[index])
            with _in_training_mode(loop.model):
                monitor._measure_first(state.global_step, int(epoch) if epoch == int(epoch) else None)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self._loop is not None
        self._loop.batch_in_step = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self._loop is not None
        self._loop.logged.steps += 1
        if self._fit is not None:
            if not self._loss_was_computed:
                raise MisconfigurationException(
                    f"{type(self.trainer).__name__} has trained a step without a call of `self.compute_loss`, where "
                    "the penalty is added, so it would train without the penalty. Compute the loss in `compute_loss`, "
                    "and call `self.compute_loss(...)` in `training_step`."
                )
            self._fit.log_skipped()
        self._measure(state.global_step, lambda n_epochs, n_steps: n_steps and state.global_step % n_steps == 0)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._epochs += 1
        self._measure(state.global_step, lambda n_epochs, n_steps: not n_steps and self._epochs % n_epochs == 0)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self._loop is not None
        self._loop.is_training = False
        self._fit = None
        for monitor in self.monitors:
            monitor._end()

    def _measure(self, step: int, is_due: Callable[[int, int | None], Any]) -> None:
        assert self._loop is not None
        for monitor in self.monitors:
            if is_due(monitor.every_n_epochs, monitor.every_n_steps):
                with _in_training_mode(self._loop.model):
                    monitor._measure(step)

    def _mean_loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss of a batch by itself."""
        loss = self._compute_loss(model, batch)
        return loss if isinstance(loss, Tensor) else loss[0]

    def _fixed_batches(self, monitor: CurvatureMonitor) -> list[Any]:
        trainer = self.trainer
        if monitor.batches == "val":
            if trainer.eval_dataset is None:
                raise MisconfigurationException(
                    "CurvatureMonitor(batches='val') finds no such data: the Trainer has no eval_dataset. Pass "
                    "batches='train'."
                )
            found: Any = trainer.get_eval_dataloader()
        else:
            found = trainer.callback_handler.train_dataloader
        # Accelerate's wrapper would take this for a pass of the training.
        loader = getattr(found, "base_dataloader", found)
        return first_batches(loader, monitor.n_batches, monitor.seed, trainer.args.device, trainer._prepare_inputs)


@contextmanager
def _in_training_mode(model: nn.Module) -> Iterator[None]:
    """The mode of the training step, which the Trainer sets in each."""
    was_training = model.training
    model.train()
    try:
        yield
    finally:
        model.train(was_training)


def _inside(model: nn.Module, run: Callable[[nn.Module], Any]) -> Any:
    """``run(model)``; under DDP with the module in it, as one forward pass of the wrapper.

    DDP prepares each backward pass in the forward pass before. A penalty may need several of the module's.
    """
    if not isinstance(model, DistributedDataParallel):
        return run(model)
    module: nn.Module = model.module
    attributes = vars(module)
    own = attributes.get("forward")

    def restore() -> None:
        if own is None:
            attributes.pop("forward", None)
        else:
            attributes["forward"] = own

    def forward(*_: Any, **__: Any) -> Any:
        restore()
        return run(module)

    attributes["forward"] = forward
    try:
        return model()
    finally:
        restore()
