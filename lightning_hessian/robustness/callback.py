"""The callback that measures a classifier's accuracy under attack."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_hessian.arguments import whole_number
from lightning_hessian.curvature.containers import tensors_in
from lightning_hessian.robustness import radius
from lightning_hessian.robustness.attacks import FGSM, PGD, Attack, GradientAttack, logits_of, undisturbed
from lightning_hessian.step.batches import InputChoice, part_of, select_inputs

TargetChoice = str | int | Callable[[Any], Tensor] | None
"""The batch's tensor of classes: a key or an attribute's name, an index, a function of the batch, or None for the first
integer tensor of shape (samples,)."""

MASKED = 0.05
"""Gradients count as masked if a margin loss leaves an accuracy this much lower than cross-entropy does."""


class AdversarialAccuracy(Callback):
    """Measure clean and robust accuracy in validation and test, without changing training.

    Logged at the end of the epoch, as means over the samples of all ranks: ``robust/clean/accuracy``;
    ``robust/<attack name>/accuracy`` for each attack (such as ``robust/pgd_linf_0.1/accuracy``), on the same samples;
    optionally ``robust/radius_estimate``, in the units of the inputs. Only the first dataloader is measured. The logits
    are ``module(x)`` in evaluation mode, without autocast because it rounds small gradients to zero.

    Modes, gradients, buffers and random state are restored, so training is bitwise unchanged.

    Args:
        attacks: one or several, such as ``PGD(0.1)``, or other callables ``(model, x, y) -> inputs`` with a ``name``.
            PGDs of the same name log their steps and restarts too: ``pgd_linf_0.1_40x2``. Masked gradients can fool a
            single gradient attack, so add a PGD with ``loss="cw"`` or ``"dlr"``. A warning reports if it succeeds far
            more often.
        every_n_epochs: in ``fit``, measure only in the validation of every n-th epoch. ``trainer.validate`` and
            ``trainer.test`` always measure.
        max_samples: measure only this many samples, the first ones, across all ranks. None: all. Each PGD step costs a
            forward and a backward pass.
        radius_estimate: also log the mean of :func:`~lightning_hessian.radius_estimate` (a local second-order
            estimate, not a certificate) over the samples where it is finite.
        inputs: the batch's tensor x: a key, an index, or a function of the batch. Default: the first floating-point
            tensor.
        targets: the batch's classes y, chosen likewise. Default: the first integer tensor of shape (samples,).

    Raises:
        ValueError: an argument is out of range, or two attacks have the same name.
        MisconfigurationException: the module defines no ``forward``, or the batch has no such inputs or targets.

    Example:
        >>> import lightning as L
        >>> from lightning_hessian.robustness.attacks import FGSM, PGD
        >>> trainer = L.Trainer(
        ...     callbacks=[AdversarialAccuracy([FGSM(0.1), PGD(0.1, steps=10)], max_samples=1000)],
        ...     logger=False, enable_checkpointing=False,
        ... )
    """

    def __init__(
        self,
        attacks: GradientAttack | Sequence[GradientAttack] | Attack | Sequence[Attack],
        *,
        every_n_epochs: int = 1,
        max_samples: int | None = None,
        radius_estimate: bool = False,
        inputs: InputChoice = None,
        targets: TargetChoice = None,
    ) -> None:
        self.attacks = list(attacks) if isinstance(attacks, Sequence) else [attacks]
        classes = [attack for attack in self.attacks if isinstance(attack, type)]
        if classes:
            raise ValueError(
                f"attacks={attacks!r}: {classes[0].__name__} is a class. Pass an object with the radius of the attack, "
                f"such as {classes[0].__name__}(0.1)."
            )
        if not self.attacks or not all(isinstance(attack, Attack) for attack in self.attacks):
            raise ValueError(
                f"attacks={attacks!r} must be an attack such as PGD(0.1), or a list of at least one of them."
            )
        names = self._names = _names(self.attacks)
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"attacks has more than one named {', '.join(repeated)}, so they would log under the same name. Keep "
                "one of each."
            )
        whole_number("every_n_epochs", every_n_epochs, least=1)
        if max_samples is not None:
            whole_number("max_samples", max_samples, least=1)
        self.every_n_epochs = every_n_epochs
        self.max_samples = max_samples
        self.radius_estimate = radius_estimate
        self.inputs = inputs
        self.targets = targets
        self._means: dict[str, MeanMetric] = {}
        self._left: int | None = None
        self._looked_for_randomness = False
        self._warned_of_masking = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "predict" and getattr(pl_module.forward, "__func__", None) is LightningModule.forward:
            raise MisconfigurationException(
                f"AdversarialAccuracy attacks the logits `module(x)`, but {type(pl_module).__name__} defines no "
                "`forward`. Define `def forward(self, x)` that returns the logits, of shape (samples, classes)."
            )

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._measure(pl_module, batch, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(pl_module)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def attacked(self, module: LightningModule, x: Tensor) -> tuple[nn.Module, Tensor]:
        """The attacked model and its inputs. Radii and bounds are in the units of these inputs; a subclass may convert
        to other units."""
        return module, x

    def _begin(self, trainer: Trainer, module: LightningModule) -> None:
        in_fit = trainer.state.fn == TrainerFn.FITTING
        self._means = {}
        if trainer.sanity_checking or (in_fit and (trainer.current_epoch + 1) % self.every_n_epochs):
            return
        keys = [_key("clean"), *map(_key, self._names)]
        if self.radius_estimate:
            keys.append("robust/radius_estimate")
        # The same keys on every rank, even on one without samples, because computing and logging are collective.
        with torch.inference_mode(False):  # the metrics are updated outside of inference mode
            self._means = {key: MeanMetric().to(module.device) for key in keys}
        if self.max_samples is not None:
            share, rest = divmod(self.max_samples, trainer.world_size)
            self._left = share + (trainer.global_rank < rest)

    def _measure(self, module: LightningModule, batch: Any, dataloader_idx: int) -> None:
        if not self._means or dataloader_idx != 0 or self._left == 0:
            return
        x, y = self._samples_of(batch)
        if self._left is not None:
            x, y = x[: self._left], y[: self._left]
            self._left -= len(x)
        with undisturbed(module, x):
            with torch.no_grad():
                model, x = self.attacked(module, x.clone())
                y = y.clone()
                logits = logits_of(model, x, y)
                self._look_for_randomness(module, model, x, y, logits)
            self._means[_key("clean")].update((logits.argmax(dim=1) == y).float())
            for attack, name in zip(self.attacks, self._names, strict=True):
                adversarial = attack(model, x, y)
                with torch.no_grad():
                    right = logits_of(model, adversarial, y).argmax(dim=1) == y
                self._means[_key(name)].update(right.float())
            if self.radius_estimate:
                estimate = radius.radius_estimate(model, x, y).float()
                # A single sample with zero gradient and Hessian would make the mean infinite.
                self._means["robust/radius_estimate"].update(estimate[estimate.isfinite()])

    def _log(self, module: LightningModule) -> None:
        if not self._means:
            return
        values = {key: mean.compute() for key, mean in self._means.items()}
        self._means = {}
        self._look_for_masking(values)
        for key, value in values.items():
            # Already the mean over all ranks. `sync_dist` only informs Lightning.
            module.log(key, value, sync_dist=True)

    def _samples_of(self, batch: Any) -> tuple[Tensor, Tensor]:
        try:
            x, *more = select_inputs(batch, self.inputs)
        except ValueError as error:
            raise MisconfigurationException(f"AdversarialAccuracy found no inputs to attack. {error}") from error
        if more:
            raise MisconfigurationException(
                f"inputs={self.inputs!r} chooses {1 + len(more)} tensors, but AdversarialAccuracy attacks one. Choose "
                "the one that `module(x)` takes."
            )
        y = self._targets_of(batch, x)
        if not isinstance(y, Tensor):
            raise MisconfigurationException(
                f"AdversarialAccuracy found no targets in the batch (targets={self.targets!r}). It needs an integer "
                f"tensor with the classes of the {len(x)} samples. Pass its key or index, or "
                "targets=lambda batch: ...; for soft or one-hot labels apply `.argmax(1)` there."
            )
        return x, y

    def _targets_of(self, batch: Any, x: Tensor) -> Any:
        if self.targets is None:
            return next((tensor for tensor in tensors_in(batch) if _holds_classes(tensor, len(x))), None)
        if callable(self.targets):
            return self.targets(batch)
        try:
            return part_of(batch, self.targets, "targets")
        except ValueError:
            return None

    def _look_for_randomness(
        self, module: LightningModule, model: nn.Module, x: Tensor, y: Tensor, logits: Tensor
    ) -> None:
        if self._looked_for_randomness:
            return
        self._looked_for_randomness = True
        difference = (logits - logits_of(model, x, y)).abs().max()
        # The order of summation in kernels may vary; dropout changes the logits far more.
        if difference > 1e-3 * logits.abs().max():
            rank_zero_warn(
                f"The predictions of {type(module).__name__} are random in evaluation mode: two passes over one batch "
                "differ. Attacks on a randomized model are unreliable, because each gradient belongs to another model. "
                "Look for F.dropout without training=self.training, or noise added in evaluation mode."
            )

    def _look_for_masking(self, values: Mapping[str, Tensor]) -> None:
        ours = [(a, name) for a, name in zip(self.attacks, self._names, strict=True) if isinstance(a, FGSM | PGD)]
        plain = {_settings_without_loss(attack): name for attack, name in ours if attack.loss == "cross_entropy"}
        for attack, name in ours:
            other = plain.get(_settings_without_loss(attack))
            if attack.loss == "cross_entropy" or other is None or self._warned_of_masking:
                continue
            by_margin, by_cross_entropy = (float(values[_key(one)]) for one in (name, other))
            if by_margin < by_cross_entropy - MASKED:
                self._warned_of_masking = True
                rank_zero_warn(
                    f"{name} leaves an accuracy of {by_margin:.3f}, but {other} leaves {by_cross_entropy:.3f}: the "
                    "gradients of the cross-entropy are masked (saturated), so the model is less robust than "
                    f"{other} suggests. Trust the lower value."
                )


def _settings_without_loss(attack: FGSM | PGD) -> str:
    return repr(dataclasses.replace(attack, loss="cross_entropy"))


def _names(attacks: Sequence[Attack]) -> list[str]:
    """The attacks' names. PGDs with the same name get their steps and restarts appended."""
    names = [attack.name for attack in attacks]
    return [
        f"{name}_{attack.steps}x{attack.restarts}" if isinstance(attack, PGD) and names.count(name) > 1 else name
        for attack, name in zip(attacks, names, strict=True)
    ]


def _key(name: str) -> str:
    return f"robust/{name}/accuracy"


def _holds_classes(tensor: Tensor, samples: int) -> bool:
    whole = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    return whole and tensor.shape == (samples,)
