"""The Trainer of transformers as a training loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from transformers import Trainer

from lightning_hessian.regularization.logs import ADDED
from lightning_hessian.step.loop import Sharding

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
_PRECISION = {
    torch.float16: "16-true",
    torch.bfloat16: "bf16-true",
    torch.float32: "32-true",
    torch.float64: "64-true",
}


class HuggingFaceLoop:
    """A Trainer as a :class:`~lightning_hessian.step.loop.TrainingLoop`.

    Args:
        trainer: the Trainer.
        callbacks: the regularizers and monitors attached to it.

    Attributes:
        is_training: whether the Trainer trains.
        batch_in_step: how many batches of the present optimizer step came before this one.
        weight: the factor of this batch's loss in the Trainer's loss of the optimizer step.
        logged: what was logged since the Trainer's last log.
    """

    is_automatic = True
    sharding: Sharding | None = None  # `refuse_trainer` has refused any

    def __init__(self, trainer: Trainer, callbacks: Sequence[object]) -> None:
        self.trainer = trainer
        self.callbacks = callbacks
        self.is_training = True
        self.batch_in_step = 0
        self.weight = 1.0
        self.logged = StepLogs()

    @property
    def model(self) -> nn.Module:
        """The model without its wrappers."""
        model = self.trainer.model
        assert model is not None
        return model

    @property
    def global_step(self) -> int:
        return self.trainer.state.global_step

    @property
    def batches_before(self) -> int:
        return self.global_step * self.trainer.args.gradient_accumulation_steps + self.batch_in_step

    @property
    def ends_optimizer_step(self) -> bool:
        return self.trainer.accelerator.sync_gradients

    @property
    def precision(self) -> str:
        half = self.trainer.accelerator.mixed_precision
        if half in _HALF:
            return "bf16-mixed" if half == "bf16" else "16-mixed"
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)
        return _PRECISION.get(dtype, "32-true")

    @property
    def gradient_scale(self) -> float | None:
        scaler = self.trainer.accelerator.scaler
        return None if scaler is None else float(scaler.get_scale())

    @property
    def rank(self) -> int:
        return self.trainer.args.process_index

    @property
    def world_size(self) -> int:
        return self.trainer.args.world_size

    @property
    def synchronizes_gradients(self) -> bool:
        return bool(getattr(self.trainer.model_wrapped, "require_backward_grad_sync", False))

    @property
    def has_static_graph(self) -> bool:
        return bool(getattr(self.trainer.accelerator.ddp_handler, "static_graph", False))

    @property
    def learning_rates(self) -> list[float]:
        optimizer = self.trainer.optimizer
        groups = [] if optimizer is None else optimizer.param_groups
        return [float(group["lr"]) for group in groups if group.get("lr") is not None]

    @property
    def loggers(self) -> Sequence[Any]:
        return ()

    def autocast_dtype(self, kind: str) -> torch.dtype | None:
        # Accelerate casts inside the model's `forward`: here autocast is off.
        return _HALF.get(self.trainer.accelerator.mixed_precision)

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        attributes = vars(self.model)
        casting = attributes.get("forward")
        uncast = attributes.get("_original_forward")
        if uncast is not None:
            attributes["forward"] = uncast
        try:
            with torch.autocast(next(self.model.parameters()).device.type, enabled=False):
                yield
        finally:
            if uncast is not None:
                attributes["forward"] = casting

    def mean(self, tensor: Tensor) -> Tensor:
        return tensor if self.world_size == 1 else self.trainer.accelerator.reduce(tensor, reduction="mean")

    def total(self, tensor: Tensor) -> Tensor:
        return tensor if self.world_size == 1 else self.trainer.accelerator.reduce(tensor, reduction="sum")

    def all(self, condition: bool) -> bool:
        if self.world_size == 1:
            return condition
        return self.total(torch.tensor(float(not condition), device=self.trainer.args.device)).item() == 0

    def log(self, name: str, value: Tensor | float, reduce: bool) -> None:
        if reduce:
            self.logged.add(name, float(value), self.weight)
        else:
            self.logged.latest[name] = float(value)

    def report(self, scalars: Mapping[str, float], step: int) -> None:
        self.trainer.log(dict(scalars))

    def take_logged(self) -> dict[str, float]:
        """What was logged since this was called last; all processes call this together."""
        logged, self.logged = self.logged, StepLogs()
        device = self.trainer.args.device
        means = {name: self.mean(torch.tensor(value, device=device)).item() for name, value in logged.means().items()}
        return means | logged.latest


class StepLogs:
    """Sums what the batches of several optimizer steps log.

    Attributes:
        steps: how many optimizer steps there were.
        latest: values of which the latest counts.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.latest: dict[str, float] = {}
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, name: str, value: float, weight: float) -> None:
        """Add a batch's value, with the weight that the batch's loss has in the loss of the optimizer step."""
        total, weights = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = total + weight * value, weights + weight

    def means(self) -> dict[str, float]:
        """The mean of each value where it was computed. Of what was added to the loss: its mean over all steps."""
        return {
            name: total / (max(self.steps, 1) if name == ADDED else weights)
            for name, (total, weights) in self._sums.items()
        }


def refuse_trainer(trainer: Trainer) -> None:
    """Refuse a Trainer in which penalties and measurements cannot work.

    Raises:
        MisconfigurationException: the error names the setting, and says what to do.
    """
    sharding = {
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "FSDP": trainer.is_fsdp_enabled or trainer.is_fsdp_xla_enabled,
        "A model that transformers distributes as it loads it": getattr(
            trainer, "is_distributed_loading_by_transformers", False
        ),
        "Megatron-LM": trainer.accelerator.distributed_type == "MEGATRON_LM",
    }
    for name, is_on in sharding.items():
        if is_on:
            raise MisconfigurationException(
                f"{name} shards the parameters, which are then not in the loss's graph, and Hessian-vector products "
                "would be zero or fail. Train on one device or with DDP (torchrun). With Lightning, HessianTrace(), "
                "HessianTrace(method='two_pass') and SharpnessAware() run under FSDP2 (ModelParallelStrategy)."
            )
    if trainer.args.n_gpu > 1:
        raise MisconfigurationException(
            f"The Trainer splits each batch over {trainer.args.n_gpu} GPUs by nn.DataParallel, which copies the "
            "parameters in each forward pass: the copies are not those that a penalty differentiates by. Start one "
            "process for each GPU (torchrun), or show one GPU only (CUDA_VISIBLE_DEVICES=0)."
        )
    if trainer.accelerator.mixed_precision not in ("no", *_HALF):
        raise MisconfigurationException(
            f"mixed_precision={trainer.accelerator.mixed_precision!r} has no second derivatives. Pass bf16=True to the "
            "TrainingArguments."
        )
