"""Measure the curvature of a LightningModule's loss on fixed batches, between steps and without side effects."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import accumulate, islice, pairwise
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_hessian.curvature import (
    BatchedHessianOperator,
    Eigenpairs,
    Estimate,
    SpectralDensity,
    extreme_eigenvalues,
    higher_order,
    hutchinson_moments,
    hutchinson_trace,
    spectral_density,
)
from lightning_hessian.curvature.modes import evaluation_mode
from lightning_hessian.curvature.operators import ScaledOperator
from lightning_hessian.curvature.vectors import pack
from lightning_hessian.penalties.trace_estimators import filter_sizes
from lightning_hessian.step.batches import samples_in
from lightning_hessian.step.isolation import random_state_kept, seed_all, without_penalties
from lightning_hessian.step.loop import TrainingLoop
from lightning_hessian.step.repeatability import check_repeatable
from lightning_hessian.step.repeatable import BatchSkipped, RepeatableStep
from lightning_hessian.step.training_step import training_step

Loss = Callable[[Any, Any], Tensor]
"""``loss(module, batch)``: the mean loss of a batch."""


@dataclass(frozen=True, kw_only=True)
class MeasurementConfig:
    """What to measure, and how accurately.

    Args:
        probes: of the Hutchinson estimates.
        eigenvalues: number of eigenvalues at each end of the spectrum.
        iterations: of Lanczos.
        density_runs: Lanczos runs for the spectral density, 0 for none.
        layers: groups of parameters whose traces to measure: group name -> parameter names.
        spaces: groups whose top eigenvectors to compute: group name -> (parameter names, number of eigenvectors).
        seed: of all random vectors.
        relative: whether to measure the trace and the largest eigenvalue along relative changes, too.
    """

    probes: int
    eigenvalues: int
    iterations: int
    density_runs: int
    layers: Mapping[str, Sequence[str]]
    spaces: Mapping[str, tuple[Sequence[str], int]]
    seed: int
    relative: bool = False


@dataclass(frozen=True, kw_only=True)
class Curvature:
    """One measurement of the Hessian H of a mean loss with respect to the parameters.

    Args:
        step: number of optimizer steps taken before the measurement.
        trace: tr(H).
        frobenius_norm: square root of the sum of H's squared entries.
        layers: traces of the groups' diagonal blocks.
        largest: largest eigenvalues, descending, each with its residual.
        smallest: smallest eigenvalues, ascending, each with its residual.
        stability: eta lambda_max / 2 with the learning rate eta; gradient descent is linearly unstable above 1. None
            without an optimizer.
        learning_rate: eta.
        overlaps: share of the top eigenspace of a group's block that lies in that of the last measurement.
        density: the spectral density.
        matvecs: number of Hessian-vector products used.
        scheduled: whether a run without interruption measures at this step, too.
        relative_trace: tr(D H D) with the sizes D of the filters, as ``HessianTrace(scale="parameter")``: the curvature
            along relative changes of the parameters.
        relative_largest: the largest eigenvalue of D H D, with its residual.
    """

    step: int
    trace: Estimate
    frobenius_norm: Estimate
    layers: dict[str, Estimate]
    largest: list[tuple[float, float]]
    smallest: list[tuple[float, float]]
    stability: float | None = None
    learning_rate: float | None = None
    overlaps: dict[str, float] = field(default_factory=dict)
    density: SpectralDensity | None = None
    matvecs: int = 0
    scheduled: bool = True
    relative_trace: Estimate | None = None
    relative_largest: tuple[float, float] | None = None

    def scalars(self) -> dict[str, float]:
        """All scalars by their log names."""
        named = {
            "trace": self.trace.estimate,
            "trace_standard_error": self.trace.standard_error,
            "frobenius_norm": self.frobenius_norm.estimate,
        }
        for end, pairs in (("largest", self.largest), ("smallest", self.smallest)):
            for rank, (value, residual) in enumerate(pairs, start=1):
                name = f"{end}_eigenvalue" + (f"_{rank}" if rank > 1 else "")
                named |= {name: value, f"{name}_residual": residual}
        if self.stability is not None:
            named["stability"] = self.stability
        if self.relative_trace is not None and self.relative_largest is not None:
            named |= {
                "relative_trace": self.relative_trace.estimate,
                "relative_largest_eigenvalue": self.relative_largest[0],
            }
        named |= {f"trace/{name}": estimate.estimate for name, estimate in self.layers.items()}
        return named | {f"overlap/{name}": overlap for name, overlap in self.overlaps.items()}

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints: numbers, lists, dictionaries and tensors only."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Curvature:
        """Restore a measurement from :meth:`state_dict`."""
        density, relative = state["density"], state["relative_trace"]
        return cls(
            **{
                **state,
                "trace": Estimate(**state["trace"]),
                "frobenius_norm": Estimate(**state["frobenius_norm"]),
                "layers": {name: Estimate(**estimate) for name, estimate in state["layers"].items()},
                "relative_trace": None if relative is None else Estimate(**relative),
                "density": None if density is None else SpectralDensity(**density),
            }
        )


class Measurement:
    """Measures a module repeatedly on a fixed set of batches.

    Args:
        loop: the loop that trains the module: its precision and its processes.
        module: the module.
        batches: this process's batches, on the module's device.
        parameters: the parameters to differentiate with respect to, by name.
        config: what to measure.
        training_mode: keep the layers' current modes, with dropout masks from the seed. Otherwise all layers are in
            evaluation mode.
        loss: by default the module's training step.
    """

    def __init__(
        self,
        loop: TrainingLoop,
        module: nn.Module,
        *,
        batches: Sequence[Any],
        parameters: Mapping[str, Tensor],
        config: MeasurementConfig,
        training_mode: bool,
        loss: Loss | None,
    ) -> None:
        self.loop = loop
        self.module = module
        self.batches = batches
        self.parameters = parameters
        self.config = config
        self.training_mode = training_mode
        self.loss = loss
        self._is_repeatable = False

    def measure(self, step: int, learning_rate: float | None) -> tuple[Curvature, dict[str, Tensor]]:
        """Measure the curvature at the current parameters.

        Returns:
            The measurement, and the top eigenvectors of the groups in ``config.spaces``, as rows.

        Raises:
            BatchSkipped: the step returned no loss for a batch.
            MisconfigurationException: the step's loss is not differentiable.
            HigherOrderError: an operator of the model is not twice differentiable.
        """
        config, seed = self.config, self.config.seed
        with self._operator_of() as operator_of:
            operator = operator_of(list(self.parameters))
            found = hutchinson_moments(operator, config.probes, seed, self._rows(config.layers))
            ends = extreme_eigenvalues(operator, config.eigenvalues, config.eigenvalues, config.iterations, seed)
            density, matvecs = None, config.probes + ends.matvecs
            relative_trace, relative_largest = None, None
            if config.relative:
                tensors = [*self.parameters.values()]
                sizes = [size.expand_as(tensor) for size, tensor in zip(filter_sizes(tensors), tensors, strict=True)]
                relative = ScaledOperator(operator, pack(sizes, operator.dtype))
                relative_trace = hutchinson_trace(relative, config.probes, seed)
                top = extreme_eigenvalues(relative, 1, 0, config.iterations, seed)
                (relative_largest,) = _listed(top.largest)
                matvecs += config.probes + top.matvecs
            if config.density_runs:
                density = spectral_density(operator, config.density_runs, config.iterations, seed)
                matvecs += density.matvecs
            spaces = {}
            for group, (names, dimension) in config.spaces.items():
                # More iterations than for single eigenvalues, because the last eigenvector of a space converges last.
                top = extreme_eigenvalues(operator_of(names), dimension, 0, config.iterations + dimension, seed)
                spaces[group] = top.largest.vectors
                matvecs += top.matvecs
        largest = _listed(ends.largest)
        stability = None if learning_rate is None else learning_rate * largest[0][0] / 2
        curvature = Curvature(
            step=step,
            trace=found.trace,
            frobenius_norm=found.frobenius_norm,
            layers=found.blocks,
            largest=largest,
            smallest=_listed(ends.smallest),
            stability=stability,
            learning_rate=learning_rate,
            density=density,
            matvecs=matvecs,
            relative_trace=relative_trace,
            relative_largest=relative_largest,
        )
        return curvature, spaces

    @property
    def _is_parallel(self) -> bool:
        # After a fit in spawned processes the process group is gone, but `world_size` still counts them.
        return self.loop.world_size > 1 and torch.distributed.is_initialized()

    def _rows(self, groups: Mapping[str, Sequence[str]]) -> dict[str, list[slice]]:
        """Each group's entries in the flat parameter vector."""
        ends = [0, *accumulate(parameter.numel() for parameter in self.parameters.values())]
        at = {name: slice(*pair) for name, pair in zip(self.parameters, pairwise(ends), strict=True)}
        return {group: [at[name] for name in names] for group, names in groups.items()}

    def losses(self) -> list[float]:
        """The mean loss of each batch, in the same mode and with the same random numbers."""
        with self._loss_of() as loss:
            return [loss(index).item() for index in range(len(self.batches))]

    @contextmanager
    def _loss_of(self) -> Iterator[Callable[[int], Tensor]]:
        module, loop = self.module, self.loop
        device = next(iter(self.parameters.values())).device
        context = higher_order(module, derivatives=2)
        with ExitStack() as stack:
            stack.enter_context(random_state_kept(device))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(without_penalties())
            stack.enter_context(loop.full_precision())
            stack.enter_context(evaluation_mode(() if self.training_mode else module.modules()))
            stack.enter_context(_unfrozen(self.parameters.values()))
            steps = []
            for index, batch in enumerate(self.batches):
                seed_all(self.config.seed + index, device)  # the same dropout masks in every measurement
                step = partial(self._step, index)
                steps.append(RepeatableStep(module, step, batch, copies_batch=True, context=context))
            stack.enter_context(context.explained())

            def loss_at(index: int) -> Tensor:
                return steps[index].rerun().loss

            if self._is_parallel:  # products are collective, so either all ranks measure or none
                complete = all(map(_has_loss, steps))
                if not loop.all(complete):
                    raise BatchSkipped(None)
            if not self._is_repeatable:
                check_repeatable(module, partial(loss_at, 0), loss_at(0), "CurvatureMonitor")
                self._is_repeatable = True

            yield loss_at

    @contextmanager
    def _operator_of(self) -> Iterator[Callable[[Sequence[str]], BatchedHessianOperator]]:
        with self._loss_of() as loss:

            def operator_of(names: Sequence[str]) -> BatchedHessianOperator:
                return BatchedHessianOperator(
                    loss,
                    [self.parameters[name] for name in names],
                    range(len(self.batches)),
                    lambda index: samples_in(self.batches[index]) or 1,
                    self.loop.total if self._is_parallel else None,
                )

            yield operator_of

    def _step(self, index: int, batch: Any) -> Any:
        if self.loss is not None:
            return self.loss(self.module, batch)
        return training_step(self.module, batch, index)


@contextmanager
def _unfrozen(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Temporarily unfreeze parameters that were frozen since they were selected."""
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _listed(pairs: Eigenpairs) -> list[tuple[float, float]]:
    return list(zip(pairs.values.tolist(), pairs.residuals.tolist(), strict=True))


def _has_loss(step: RepeatableStep) -> bool:
    try:
        step.rerun()
    except BatchSkipped:
        return False
    return True


def fixed_batches(module: LightningModule, loaders: Any, count: int, seed: int) -> list[Any]:
    """The first batches of a loader (or of several that Lightning combines), as the training step receives them.

    See :func:`first_batches`.
    """
    return first_batches(loaders, count, seed, module.device, partial(_as_in_training, module.trainer, module))


def first_batches(
    loaders: Any, count: int, seed: int, device: torch.device, prepared: Callable[[Any], Any]
) -> list[Any]:
    """The first batches of a loader, or of several that Lightning combines.

    They come from copies of the loaders with copied samplers and random generators, so training gets the same batches
    as without them. The global random state does not change. If a loader has no generator, the seed determines the
    shuffling.

    Args:
        loaders: one loader or several.
        count: how many batches.
        seed: of the random state in which they are drawn.
        device: the device whose random state is kept.
        prepared: makes of a batch what the training step receives.

    Raises:
        MisconfigurationException: a loader or its dataset is an iterator, which would lose these batches, or a sampler
            cannot be copied.
    """
    copies = apply_to_collection(loaders, DataLoader, _independent_copy)
    if isinstance(copies, Iterator):
        raise _one_pass_only(copies)
    with random_state_kept(device), torch.inference_mode(False), torch.no_grad():
        seed_all(seed, device)
        return [prepared(batch) for batch in islice(_batches(copies), count)]


def _independent_copy(loader: DataLoader) -> DataLoader:
    """A copy that shares the data but no state that changes when batches are read."""
    dataset = _with_own_randomness(loader.dataset)
    if isinstance(dataset, IterableDataset) and isinstance(dataset, Iterator):
        raise _one_pass_only(dataset)
    memo: dict[int, Any] = {id(loader.dataset): loader.dataset}
    stateful = ("sampler", "batch_sampler", "generator")
    try:
        copied = {name: copy.deepcopy(getattr(loader, name), memo) for name in stateful}
    except TypeError as error:
        raise MisconfigurationException(
            "CurvatureMonitor draws its batches with a copy of the dataloader's sampler, but this sampler cannot be "
            f"copied ({error}). Remove the attribute that prevents it (an iterator, an open file), or define "
            "`__deepcopy__`."
        ) from error
    twin = copy.copy(loader)
    # Through `vars`, because DataLoader forbids setting these. Persistent workers belong to Lightning's iterator.
    vars(twin).update(copied, dataset=dataset, _iterator=None)
    return twin


def _with_own_randomness(dataset: Any) -> Any:
    """A shallow copy with copied random generators, also in the datasets that it wraps."""
    if not hasattr(dataset, "__dict__"):
        return dataset
    twin = copy.copy(dataset)
    for name, value in vars(dataset).items():
        if isinstance(value, torch.Generator | np.random.Generator | np.random.RandomState | random.Random):
            vars(twin)[name] = copy.deepcopy(value)
        elif isinstance(value, Dataset):
            vars(twin)[name] = _with_own_randomness(value)
    return twin


def _one_pass_only(iterator: Any) -> MisconfigurationException:
    return MisconfigurationException(
        f"The data are an iterator ({type(iterator).__name__}), which can be read only once: training would miss the "
        "batches that CurvatureMonitor takes. Return a DataLoader from the hook, or an iterable that starts over each "
        "time."
    )


def _batches(loaders: Any) -> Iterable[Any]:
    if isinstance(loaders, Mapping | list | tuple):
        combined = CombinedLoader(loaders, "min_size")
        iter(combined)
        return (batch for batch, *_ in combined)
    return loaders


def _as_in_training(trainer: Trainer, module: LightningModule, batch: Any) -> Any:
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)
