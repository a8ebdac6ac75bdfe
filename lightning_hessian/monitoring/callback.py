"""The callback that measures curvature without changing training."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from lightning_hessian.arguments import choice, whole_number, writable_directory
from lightning_hessian.curvature import ParameterFilter, select_parameters, subspace_overlap
from lightning_hessian.curvature.parameters import check_filter
from lightning_hessian.curvature.spectrum import check_eigenvalues
from lightning_hessian.monitoring import images
from lightning_hessian.monitoring.measurement import Curvature, Loss, Measurement, MeasurementConfig, fixed_batches
from lightning_hessian.step.learning_rates import learning_rates
from lightning_hessian.step.lightning_loop import LightningLoop
from lightning_hessian.step.loop import TrainingLoop
from lightning_hessian.step.repeatable import BatchSkipped

Stage = Literal["train", "val", "test"]
_LOADERS = {"train": "train_dataloader", "val": "val_dataloaders", "test": "test_dataloaders"}
_COUNTS = {"train": "num_training_batches", "val": "num_val_batches", "test": "num_test_batches"}


class CurvatureMonitor(Callback):
    r"""Measure the curvature of the loss during training without changing training.

    H is the Hessian of the mean loss over a fixed set of batches, across all ranks, computed without autocast. The
    monitor measures it before the first training step and then every n epochs or steps. ``trainer.validate`` and
    ``trainer.test`` measure once, on their data, in evaluation mode. Values go to every logger at the number of steps
    taken, as ``curvature/...`` on training data and as ``curvature/val/...`` or ``curvature/test/...`` on other data:

    - ``trace``, ``trace_standard_error``, ``frobenius_norm``, ``trace/<layer>``: Hutchinson estimates, all from the
      same ``probes`` Hessian-vector products.
    - ``largest_eigenvalue``, ``smallest_eigenvalue`` (``..._2``, ...), each with ``_residual``: from Lanczos. H has an
      eigenvalue within the residual of each value.
    - ``stability``: eta lambda_max / 2, where eta is the largest learning rate of all parameter groups. Gradient
      descent is linearly unstable above 1 (with momentum beta, above 1 + beta). The threshold does not apply to
      adaptive optimizers.
    - ``overlap/<layers>``: overlap between the top eigenspaces of these layers' block of H now and at the last
      measurement.

    TensorBoard, Weights & Biases and MLflow also receive images: eigenvalues over training, traces by layer, the
    spectral density. ``history`` and checkpoints contain the measurements made during training. A Trainer accepts one
    monitor of training data and one of validation data.

    Measurements do not reach ``self.log`` or torchmetrics, and they restore modes, gradients, buffers and random
    states. So training is bitwise unchanged if a step depends only on its batch, the module's parameters and buffers,
    and the global random state. Hooks on layers and state kept elsewhere (a call counter, a list,
    ``self.logger.experiment``) do see the measurements. A step that changes a parameter raises an error. If the step
    returns None later in training, the monitor skips that measurement with a warning.

    H covers all parameters that require a gradient, or have required one since training started. So layers unfrozen
    later (Lightning's ``BackboneFinetuning``) are measured from then on, and layers frozen later are still measured.
    If the parameters in an overlap's group change, the next measurement has no overlap for it.

    A product costs about two training steps per batch. With several batches, Lanczos products cost nearly twice that,
    because the graph is kept only if there is a single batch.

    Args:
        every_n_epochs: measure at the end of every n-th training epoch.
        every_n_steps: measure after every n-th optimizer step instead (in manual optimization: every n-th batch).
        batches: data to measure on during training: ``"train"`` or ``"val"`` (the first validation dataloader).
        n_batches: number of batches, drawn once when training starts; ``seed`` controls the draw if the loader
            shuffles. If the loader has fewer, all are used.
        mode: ``"eval"``: no dropout, and batch norm uses running statistics. ``"train"``: layers as in training, with
            the same dropout masks in every measurement.
        probes: of the Hutchinson estimates, at least 2.
        eigenvalues: number of eigenvalues at each end of the spectrum.
        iterations: of Lanczos. Memory: this many vectors of the parameters' size, plus about three per probe.
        density_runs: Lanczos runs for the spectral density, each as long and with its own memory; 0 for none.
        layers: globs on parameter names; each glob is a layer whose trace is logged. Default: every layer with its own
            parameters. An empty list for none.
        overlap: dimensions of the top eigenspaces to compare, by glob on parameter names: ``{"net.0.*": 10}``.
        parameters: differentiate only with respect to these: a glob, a list of globs, or a predicate. Globs may match
            frozen parameters, here and in ``layers`` and ``overlap``; see above for when they are measured.
        figures: log images to the loggers that take them (needs matplotlib).
        png_directory: folder to save the images in as PNG files.
        loss: ``loss(module, batch)`` returns the mean loss of a batch. Needed if the training step does not return it
            (manual optimization).
        seed: of the random vectors.

    Raises:
        ValueError: an argument is out of range, or ``png_directory`` is not writable when training starts.
        MisconfigurationException: when training starts: no data, no differentiable loss, a glob without a match, more
            eigenvalues than parameters, or sharded parameters.

    Source:
        Yao et al. 2020, "PyHessian" (arXiv 1912.07145); Cohen et al. 2021, on the edge of stability (arXiv 2103.00065);
        Wu et al. 2020, "Dissecting Hessian" (arXiv 2010.04261).

    Example:
        >>> import lightning as L
        >>> monitor = CurvatureMonitor(every_n_epochs=5)
        >>> trainer = L.Trainer(callbacks=[monitor], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        *,
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        batches: Literal["train", "val"] = "train",
        n_batches: int = 1,
        mode: Literal["eval", "train"] = "eval",
        probes: int = 5,
        eigenvalues: int = 1,
        iterations: int = 15,
        density_runs: int = 0,
        layers: Sequence[str] | None = None,
        overlap: Mapping[str, int] | None = None,
        parameters: ParameterFilter = None,
        figures: bool = True,
        png_directory: str | Path | None = None,
        loss: Loss | None = None,
        seed: int = 0,
    ) -> None:
        whole_number("every_n_epochs", every_n_epochs, 1)
        if every_n_steps is not None:
            whole_number("every_n_steps", every_n_steps, 1)
        choice("batches", batches, ("train", "val"))
        whole_number("n_batches", n_batches, 1)
        choice("mode", mode, ("eval", "train"))
        whole_number("probes", probes, 2, "a standard error needs two")
        whole_number("eigenvalues", eigenvalues, 1)
        check_eigenvalues(eigenvalues, eigenvalues, iterations)
        whole_number("density_runs", density_runs, 0)
        if layers is not None and (
            not isinstance(layers, Sequence) or isinstance(layers, str) or not all(isinstance(g, str) for g in layers)
        ):
            raise ValueError(
                f"layers={layers!r} must be a list of globs on parameter names, such as ['net.0.*']; [] for none, or "
                "None for every layer."
            )
        if overlap is not None and (
            not isinstance(overlap, Mapping) or not all(isinstance(glob, str) for glob in overlap)
        ):
            raise ValueError(
                f"overlap={overlap!r} must be a dictionary from globs on parameter names to the dimensions of the top "
                "eigenspaces, such as {'net.0.*': 10}."
            )
        check_filter(parameters)
        for glob, dimension in (overlap or {}).items():
            whole_number(f"overlap[{glob!r}]", dimension, 1, "the dimension of the top eigenspace")
        whole_number("seed", seed)
        if png_directory is not None and not isinstance(png_directory, str | Path):
            raise ValueError(f"png_directory={png_directory!r} must be the path of a directory, or None.")
        if loss is not None and not callable(loss):
            raise ValueError(
                f"loss={loss!r} must be a function (module, batch) -> the mean loss of the batch, or None."
            )
        if png_directory is not None and importlib.util.find_spec("matplotlib") is None:
            raise ValueError("png_directory needs matplotlib, which is not installed: pip install matplotlib.")
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.batches: Stage = batches
        self.n_batches = n_batches
        self.mode = mode
        self.probes = probes
        self.eigenvalues = eigenvalues
        self.iterations = iterations
        self.density_runs = density_runs
        self.layers = layers
        self.overlap = dict(overlap or {})
        self.parameters = parameters
        self.figures = figures
        self.png_directory = None if png_directory is None else Path(png_directory)
        self.loss = loss
        self.seed = seed
        self.history: list[Curvature] = []
        self._measurement: Measurement | None = None
        self._spaces: dict[str, tuple[Sequence[str], Tensor]] = {}
        self._overlaps_here: dict[str, float] = {}
        self._steps_seen = 0
        self._is_first = False
        self._is_first_scheduled = True
        self._is_fitting = False

    @property
    def latest_curvature(self) -> Curvature | None:
        """The latest measurement in training that a run without interruption has, too."""
        return next((one for one in reversed(self.history) if one.scheduled), None)

    @property
    def state_key(self) -> str:
        return self._generate_state_key(batches=self.batches)

    def state_dict(self) -> dict[str, Any]:
        return {"history": [one.state_dict() for one in self.history]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._is_fitting:  # a checkpoint loaded for testing has the history of another run
            self.history = [Curvature.from_state_dict(one) for one in state_dict["history"]]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._is_fitting = stage == "fit"
        if stage == "predict":
            return
        if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
            raise MisconfigurationException(
                f"{type(trainer.strategy).__name__} shards the parameters, so they are not in the loss's graph and "
                "Hessian-vector products would be zero or fail. Measure a checkpoint with trainer.validate on one "
                "device or with strategy='ddp'."
            )
        self._check(str(trainer.precision), is_first_process=trainer.is_global_zero)
        if self.loss is None:
            self._check_step(pl_module)
        if (
            self.figures
            and any(map(images.are_taken_by, trainer.loggers))
            and importlib.util.find_spec("matplotlib") is None
        ):
            rank_zero_warn("CurvatureMonitor draws no figures: matplotlib is not installed (pip install matplotlib).")

    def _check(self, precision: str, is_first_process: bool) -> None:
        if precision == "16-true":
            raise MisconfigurationException(
                "precision='16-true': Hessian-vector products of float16 weights silently overflow or underflow. "
                "Measure a float32 copy with trainer.validate, or train with '16-mixed' or 'bf16-mixed'."
            )
        if self.png_directory is not None and is_first_process:
            writable_directory("png_directory", self.png_directory)

    def _check_step(self, module: LightningModule) -> None:
        problem = None
        if not is_overridden("training_step", module):
            problem = "defines no training_step"
        elif not module.automatic_optimization:
            problem = "uses manual optimization, so its training_step may return no loss and steps its optimizers"
        elif is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
            problem = "takes the dataloader's iterator, so measuring would consume training batches"
        if problem:
            raise MisconfigurationException(
                f"{type(module).__name__} {problem}, but CurvatureMonitor measures the loss of that step. Pass it "
                "loss=lambda module, batch: ..., which returns the mean loss of a batch."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._steps_seen = trainer.global_step
        loop = LightningLoop(trainer, pl_module)
        self._report_learning_rates(trainer)
        self._begin(loop, pl_module, self.loss, lambda: self._fixed_batches(trainer, pl_module, self.batches))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Not in `on_train_start`: the module's own hooks run after the callbacks', and Lightning may not have counted
        # the last batch before an interruption.
        if self._is_first:
            epoch = trainer.current_epoch if batch_idx == 0 else None
            self._measure_first(trainer.fit_loop.epoch_loop._batches_that_stepped, epoch)

    def _begin(
        self, loop: TrainingLoop, module: nn.Module, loss: Loss | None, batches: Callable[[], list[Any]]
    ) -> None:
        """Prepare for measurements in a training."""
        self._is_fitting = True
        self._spaces = {}
        self._measurement = self._prepared(loop, module, loss)
        self._measurement.batches = batches()
        self._is_first = True

    def _end(self) -> None:
        """Let go of the training."""
        self._measurement = None
        self._spaces = {}

    def _measure_first(self, step: int, epoch: int | None) -> None:
        """Measure before the first step that is taken: this one, in the middle of an epoch or at this one's start."""
        at_epoch = epoch is not None and epoch % self.every_n_epochs == 0
        self._go_on_from(step, due=at_epoch if self.every_n_steps is None else step % self.every_n_steps == 0)
        self._measure(step)
        self._is_first = False

    def _go_on_from(self, step: int, due: bool) -> None:
        """Keep what was measured before this step. A resumed run measures here again."""
        here = [one for one in self.history if one.step == step]
        # The old eigenspaces are gone, but not their overlaps.
        self._overlaps_here = dict(here[0].overlaps) if here else {}
        self._is_first_scheduled = due
        self.history = [one for one in self.history if one.step < step]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.every_n_steps is None or trainer.global_step == self._steps_seen:
            return  # an unchanged global step means that gradients are accumulating
        self._steps_seen = trainer.global_step
        # + 1 because Lightning counts this batch later. Loggers then show the curvature at the next loss's step.
        step = trainer.fit_loop.epoch_loop._batches_that_stepped + 1
        if step % self.every_n_steps == 0:
            self._measure(step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.every_n_steps is None and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._measure(trainer.fit_loop.epoch_loop._batches_that_stepped)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._measure_alone(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measure_alone(trainer, pl_module, "test")

    def _measure_alone(self, trainer: Trainer, module: LightningModule, stage: Stage) -> None:
        loop = LightningLoop(trainer, module)
        measurement = self._prepared(loop, module, self.loss)
        measurement.batches = self._fixed_batches(trainer, module, stage)
        try:
            curvature, _ = measurement.measure(trainer.global_step, None)
        except BatchSkipped as skipped:
            raise MisconfigurationException(_NO_LOSS) from skipped
        # Already equal on all ranks. `sync_dist` only informs Lightning.
        module.log_dict({_key(stage, name): value for name, value in curvature.scalars().items()}, sync_dist=True)
        self._draw(loop, [curvature], stage)

    def _measure(self, step: int) -> None:
        assert self._measurement is not None
        loop = self._measurement.loop
        before = self._measurement.parameters
        self._choose(self._measurement)
        unfrozen = len(self._measurement.parameters) - len(before)
        if unfrozen:
            rank_zero_info(
                f"From step {step} on CurvatureMonitor also measures {unfrozen} newly unfrozen parameter tensors."
            )
        groups = self._measurement.config.spaces
        try:
            curvature, spaces = self._measurement.measure(step, max(loop.learning_rates, default=None))
        except BatchSkipped as skipped:
            if self._is_first:
                raise MisconfigurationException(_NO_LOSS) from skipped
            rank_zero_warn(f"At step {step} nothing is measured. {_NO_LOSS}")
            return
        now = {group: (groups[group][0], space) for group, space in spaces.items()}
        overlaps = {
            group: subspace_overlap(self._spaces[group][1], space)
            for group, (names, space) in now.items()
            if group in self._spaces and self._spaces[group][0] == names
        }
        scheduled = not self._is_first or self._is_first_scheduled
        curvature = dataclasses.replace(curvature, overlaps=overlaps | self._overlaps_here, scheduled=scheduled)
        self._overlaps_here = {}
        self._spaces = now
        self.history.append(curvature)
        loop.report({_key(self.batches, name): value for name, value in curvature.scalars().items()}, step)
        self._draw(loop, self.history, self.batches)

    def _prepared(self, loop: TrainingLoop, module: nn.Module, loss: Loss | None) -> Measurement:
        """What measures the module, without its batches yet."""
        config = MeasurementConfig(
            probes=self.probes,
            eigenvalues=self.eigenvalues,
            iterations=self.iterations,
            density_runs=self.density_runs,
            layers={},
            spaces={},
            seed=self.seed,
        )
        measurement = Measurement(
            loop,
            module,
            batches=[],
            parameters={},
            config=config,
            training_mode=self.mode == "train",
            loss=loss,
        )
        try:
            self._choose(measurement)
            for glob, dimension in self.overlap.items():
                every = self._every(module)
                size = sum(every[name].numel() for name in select_parameters(every, glob, "overlap", frozen=True))
                check_eigenvalues(dimension, 0, self.iterations + dimension, size)
        except ValueError as error:
            raise MisconfigurationException(f"CurvatureMonitor cannot measure. {error}") from error
        return measurement

    def _every(self, module: nn.Module) -> dict[str, Tensor]:
        """The selected parameters, including frozen ones."""
        return select_parameters(dict(module.named_parameters()), self.parameters, frozen=True)

    def _choose(self, measurement: Measurement) -> None:
        """Select the parameters measured before and those that now require a gradient.

        Raises:
            ValueError: no parameter requires a gradient, a glob matches nothing, or there are fewer parameters than
                eigenvalues.
        """
        every = self._every(measurement.module)
        chosen = {name: p for name, p in every.items() if p.requires_grad or name in measurement.parameters}
        if not chosen:
            chosen = select_parameters(dict(measurement.module.named_parameters()), self.parameters)  # raises
        check_eigenvalues(
            self.eigenvalues, self.eigenvalues, self.iterations, sum(parameter.numel() for parameter in chosen.values())
        )

        def group(glob: str, setting: str) -> list[str]:
            return [name for name in select_parameters(every, glob, setting, frozen=True) if name in chosen]

        layers = _by_owner(chosen)
        if self.layers is not None:
            layers = {_short(glob): names for glob in self.layers if (names := group(glob, "layers"))}
        spaces = {}
        for glob, dimension in self.overlap.items():
            names = group(glob, "overlap")
            if dimension <= sum(chosen[name].numel() for name in names):
                spaces[_short(glob)] = names, dimension
        measurement.parameters = chosen
        measurement.config = dataclasses.replace(measurement.config, layers=layers, spaces=spaces)

    def _fixed_batches(self, trainer: Trainer, module: LightningModule, stage: Stage) -> list[Any]:
        in_fit = trainer.state.fn == TrainerFn.FITTING
        try:
            if stage == "val" and in_fit:
                trainer.validating = True  # batch transfer hooks may read this
                if trainer.val_dataloaders is None and trainer.enable_validation:  # no validation has run yet
                    trainer.fit_loop.epoch_loop.val_loop.setup_data()
            loaders = getattr(trainer, _LOADERS[stage])
            available: Any = getattr(trainer, _COUNTS[stage])
            if stage != "train" and isinstance(loaders, Mapping | list | tuple):
                loaders = next(iter(loaders.values() if isinstance(loaders, Mapping) else loaders), None)
            if stage != "train":
                available = next(iter(available), 0)
            if loaders is None:
                raise MisconfigurationException(
                    f"CurvatureMonitor(batches={stage!r}) finds no such data: {type(module).__name__} has no "
                    "validation dataloader or validation_step, or limit_val_batches=0 disables validation. Pass "
                    "batches='train'."
                )
            batches = fixed_batches(module, loaders, int(min(self.n_batches, available)), self.seed)
        finally:
            if in_fit:
                trainer.training = True
        if not batches:
            raise MisconfigurationException(
                f"The {stage} dataloader that CurvatureMonitor measures on has no batch. Check its data and limits."
            )
        if len(batches) < self.n_batches:
            rank_zero_warn(
                f"n_batches={self.n_batches}, and the {stage} dataloader has {len(batches)}: CurvatureMonitor measures "
                "on all of them."
            )
        return batches

    def _report_learning_rates(self, trainer: Trainer) -> None:
        rates = learning_rates(trainer)
        if not rates:
            rank_zero_info("CurvatureMonitor logs no stability, because no optimizer has a learning rate.")
        elif len(set(rates)) > 1 or len(trainer.optimizers) > 1:
            rank_zero_info(
                f"CurvatureMonitor computes the stability from the largest of the learning rates {sorted(set(rates))} "
                f"(of {len(trainer.optimizers)} optimizers), so it is an upper bound."
            )

    @rank_zero_only
    def _draw(self, loop: TrainingLoop, history: Sequence[Curvature], stage: Stage) -> None:
        loggers = [one for one in loop.loggers if images.are_taken_by(one)] if self.figures else []
        if not (loggers or self.png_directory) or importlib.util.find_spec("matplotlib") is None:
            return
        from lightning_hessian.monitoring import figures

        now = history[-1]
        if not all(math.isfinite(value) for value in now.scalars().values()):
            return  # the weights have diverged
        drawn = {}
        history = [one for one in history if all(math.isfinite(value) for value, _ in one.largest + one.smallest)]
        if len(history) > 1:
            drawn["eigenvalues"] = figures.eigenvalues_over_training(history)
        if now.layers:
            drawn["trace_by_layer"] = figures.traces_by_layer(now)
        if now.density is not None:
            drawn["spectral_density"] = figures.spectral_density(now.density, now.step)
        for name, figure in drawn.items():
            for logger in loggers:
                images.log(logger, _key(stage, name), figure, now.step)
            if self.png_directory is not None:
                prefix = "" if stage == "train" else f"{stage}_"
                figure.savefig(self.png_directory / f"{prefix}{name}_step={now.step}.png")


_NO_LOSS = (
    "The training step returned None for a batch that CurvatureMonitor measures on, so there is no loss. Pass "
    "CurvatureMonitor loss=lambda module, batch: ..., which returns the mean loss of a batch."
)


def _key(stage: Stage, name: str) -> str:
    name = re.sub(r"[^\w./ -]", "_", name)  # characters that every logger accepts
    return f"curvature/{name}" if stage == "train" else f"curvature/{stage}/{name}"


def _by_owner(parameters: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Names of the parameters that belong directly to each layer, by layer name."""
    layers: dict[str, list[str]] = {}
    for name in parameters:
        layers.setdefault(name.rpartition(".")[0] or name, []).append(name)
    return layers


def _short(glob: str) -> str:
    return glob.removesuffix(".*")
