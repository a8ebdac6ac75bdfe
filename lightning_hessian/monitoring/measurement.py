"""The curvature of a LightningModule's own loss on batches of its own, measured between steps, leaving no trace."""

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
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_hessian.curvature import (
    BatchedHessianOperator,
    Eigenpairs,
    Estimate,
    SpectralDensity,
    extreme_eigenvalues,
    higher_order,
    hutchinson_moments,
    spectral_density,
)
from lightning_hessian.curvature.modes import evaluation_mode
from lightning_hessian.step.batches import samples_in
from lightning_hessian.step.isolation import random_state_kept, seed_all, without_penalties
from lightning_hessian.step.repeatability import check_repeatable
from lightning_hessian.step.repeatable import BatchSkipped, RepeatableStep
from lightning_hessian.step.training_step import training_step

Loss = Callable[[LightningModule, Any], Tensor]
"""``loss(module, batch)``: the mean loss of a batch."""


@dataclass(frozen=True, kw_only=True)
class MeasurementConfig:
    """What is measured, and how well.

    Args:
        probes: of Hutchinson's estimates.
        eigenvalues: how many at either end.
        iterations: of Lanczos.
        density_runs: Lanczos runs for the spectral density, 0 for none.
        layers: names of groups of parameters whose traces are wanted, with the parameters' names.
        spaces: likewise, of groups whose top eigenvectors are wanted, with their numbers.
        seed: of all random vectors.
    """

    probes: int
    eigenvalues: int
    iterations: int
    density_runs: int
    layers: Mapping[str, Sequence[str]]
    spaces: Mapping[str, tuple[Sequence[str], int]]
    seed: int


@dataclass(frozen=True, kw_only=True)
class Curvature:
    """One measurement of the Hessian H of a mean loss with respect to the parameters.

    Args:
        step: the optimizer steps that were taken before.
        trace: tr(H).
        frobenius_norm: the root of the sum of H's squared entries.
        layers: the traces of the diagonal blocks of groups of parameters.
        largest: eigenvalues, descending, each with its residual.
        smallest: eigenvalues, ascending, each with its residual.
        stability: eta lambda_max / 2 with the learning rate eta; above 1 gradient descent is linearly unstable. None
            where there is no optimizer.
        learning_rate: eta.
        overlaps: how much of the top eigenspace of a group's block lies in the one of the last measurement.
        density: the spectral density.
        matvecs: how many Hessian-vector products were spent.
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

    def scalars(self) -> dict[str, float]:
        """All single numbers, by their names in logs."""
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
        named |= {f"trace/{name}": estimate.estimate for name, estimate in self.layers.items()}
        return named | {f"overlap/{name}": overlap for name, overlap in self.overlaps.items()}

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, lists, dictionaries and tensors, for checkpoints."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Curvature:
        """Undo :meth:`state_dict`."""
        density = state["density"]
        return cls(
            **{
                **state,
                "trace": Estimate(**state["trace"]),
                "frobenius_norm": Estimate(**state["frobenius_norm"]),
                "layers": {name: Estimate(**estimate) for name, estimate in state["layers"].items()},
                "density": None if density is None else SpectralDensity(**density),
            }
        )


class Measurement:
    """Measures one module on a fixed set of batches, as often as wanted.

    Args:
        trainer: whose precision and processes are used.
        module: the module.
        batches: this process's batches, on the module's device.
        parameters: with respect to which, by name.
        config: what to measure.
        training_mode: the layers as they are (in training mode, with the dropout masks of the seed) instead of all in
            evaluation mode.
        loss: by default the module's training step.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        batches: Sequence[Any],
        parameters: Mapping[str, Tensor],
        config: MeasurementConfig,
        training_mode: bool,
        loss: Loss | None,
    ) -> None:
        self.trainer = trainer
        self.module = module
        self.batches = batches
        self.parameters = parameters
        self.config = config
        self.training_mode = training_mode
        self.loss = loss
        self._is_repeatable = False

    def measure(self, step: int, learning_rate: float | None) -> tuple[Curvature, dict[str, Tensor]]:
        """Measure now.

        Returns:
            The measurement, and the top eigenvectors of the groups in ``config.spaces``, as rows.

        Raises:
            BatchSkipped: the step has no loss for a batch.
            MisconfigurationException: the step's loss cannot be differentiated.
            HigherOrderError: an operator of the model cannot be differentiated twice.
        """
        config, seed = self.config, self.config.seed
        with self._operator_of() as operator_of:
            operator = operator_of(list(self.parameters))
            found = hutchinson_moments(operator, config.probes, seed, self._rows(config.layers))
            ends = extreme_eigenvalues(operator, config.eigenvalues, config.eigenvalues, config.iterations, seed)
            density, matvecs = None, config.probes + ends.matvecs
            if config.density_runs:
                density = spectral_density(operator, config.density_runs, config.iterations, seed)
                matvecs += density.matvecs
            spaces = {}
            for group, (names, dimension) in config.spaces.items():
                # More products than for single eigenvalues: the last of a space converges last.
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
        )
        return curvature, spaces

    def _rows(self, groups: Mapping[str, Sequence[str]]) -> dict[str, list[slice]]:
        """Which entries of a vector belong to the parameters of each group."""
        ends = [0, *accumulate(parameter.numel() for parameter in self.parameters.values())]
        at = {name: slice(*pair) for name, pair in zip(self.parameters, pairwise(ends), strict=True)}
        return {group: [at[name] for name in names] for group, names in groups.items()}

    @contextmanager
    def _operator_of(self) -> Iterator[Callable[[Sequence[str]], BatchedHessianOperator]]:
        module, trainer = self.module, self.trainer
        # After a fit by spawned processes there is one again.
        several = trainer.world_size > 1 and torch.distributed.is_initialized()
        context = higher_order(module, derivatives=2)
        with ExitStack() as stack:
            stack.enter_context(random_state_kept(module.device))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(without_penalties())
            # The default type of float64 or bfloat16 training, but no autocast: weights are in full precision.
            stack.enter_context(trainer.precision_plugin.train_step_context())
            stack.enter_context(torch.autocast(module.device.type, enabled=False))
            stack.enter_context(evaluation_mode(() if self.training_mode else module.modules()))
            stack.enter_context(_unfrozen(self.parameters.values()))
            steps = []
            for index, batch in enumerate(self.batches):
                seed_all(self.config.seed + index, module.device)  # the same dropout masks in every measurement
                step = partial(self._step, index)
                steps.append(RepeatableStep(module, step, batch, copies_batch=True, context=context))
            stack.enter_context(context.explained())

            def loss(index: int) -> Tensor:
                return steps[index].rerun().loss

            if several:  # products are collective: all ranks measure or none
                complete = all(map(_has_loss, steps))
                if not trainer.strategy.reduce_boolean_decision(complete, all=True):
                    raise BatchSkipped(None)
            if not self._is_repeatable:
                check_repeatable(module, partial(loss, 0), loss(0), "CurvatureMonitor")
                self._is_repeatable = True

            def operator_of(names: Sequence[str]) -> BatchedHessianOperator:
                return BatchedHessianOperator(
                    loss,
                    [self.parameters[name] for name in names],
                    range(len(self.batches)),
                    lambda index: samples_in(self.batches[index]) or 1,
                    (lambda local: trainer.strategy.reduce(local, reduce_op="sum")) if several else None,
                )

            yield operator_of

    def _step(self, index: int, batch: Any) -> Any:
        if self.loss is not None:
            return self.loss(self.module, batch)
        return training_step(self.module, batch, index)


@contextmanager
def _unfrozen(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Measured is what was chosen at the start, also where a callback has frozen it since."""
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
    """The first batches of a loader (or of several that Lightning combines), as the step gets them.

    They come from copies of the loaders with samplers and random generators of their own, so that training gets the
    batches that it would get; the global random state is left alone. Shuffling follows the seed where a loader has no
    generator.

    Raises:
        MisconfigurationException: a loader or its dataset is an iterator, which would lose the batches, or a sampler
            cannot be copied.
    """
    trainer = module.trainer
    copies = apply_to_collection(loaders, DataLoader, _independent_copy)
    if isinstance(copies, Iterator):
        raise _one_pass_only(copies)
    with random_state_kept(module.device), torch.inference_mode(False), torch.no_grad():
        seed_all(seed, module.device)
        return [_as_in_training(trainer, module, batch) for batch in islice(_batches(copies), count)]


def _independent_copy(loader: DataLoader) -> DataLoader:
    """A copy that shares the data, and nothing that moves as they are read."""
    dataset = _with_own_randomness(loader.dataset)
    if isinstance(dataset, IterableDataset) and isinstance(dataset, Iterator):
        raise _one_pass_only(dataset)
    memo: dict[int, Any] = {id(loader.dataset): loader.dataset}
    moving = ("sampler", "batch_sampler", "generator")
    try:
        moved = {name: copy.deepcopy(getattr(loader, name), memo) for name in moving}
    except TypeError as error:
        raise MisconfigurationException(
            "CurvatureMonitor draws its batches with a copy of the dataloader's sampler, and this one cannot be copied "
            f"({error}). Keep what cannot be copied (an iterator, an open file) out of it, or give it a `__deepcopy__`."
        ) from error
    twin = copy.copy(loader)
    # Past DataLoader's own check; with persistent workers its iterator is Lightning's.
    vars(twin).update(moved, dataset=dataset, _iterator=None)
    return twin


def _with_own_randomness(dataset: Any) -> Any:
    """A shallow copy whose random generators, and those of the datasets that it wraps, are copies."""
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
        f"The data are an iterator ({type(iterator).__name__}), which can be gone through once: the batches that "
        "CurvatureMonitor would take for its fixed set would be missing in training. Return a DataLoader, or an "
        "iterable that begins anew each time, from the hook."
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
