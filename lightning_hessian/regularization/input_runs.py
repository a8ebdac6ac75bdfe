"""The runs of one step that penalties with a graph look at; they share them where they can."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_hessian.curvature import ProbeSource, higher_order
from lightning_hessian.curvature.containers import tensors_in
from lightning_hessian.curvature.modes import evaluation_mode
from lightning_hessian.curvature.taylor import taylor_mode
from lightning_hessian.penalties import ForwardContext, InputPenalty, Penalty, StepContext
from lightning_hessian.step.batches import samples_in, select_inputs
from lightning_hessian.step.repeatability import check_repeatable
from lightning_hessian.step.repeatable import RepeatableStep, StepRun


def step_for(
    penalties: Sequence[Penalty],
    module: nn.Module,
    step: Callable[[Any], Any],
    batch: Any,
    context: higher_order | None = None,
) -> RepeatableStep:
    """A step that can be run as often, and is watched as closely, as the penalties need."""
    return RepeatableStep(
        module,
        step,
        batch,
        copies_batch=any(isinstance(penalty, InputPenalty) or penalty.needs.differences for penalty in penalties),
        watches_losses=any(penalty.needs.losses for penalty in penalties),
        context=context,
    )


@dataclass(frozen=True)
class _Run:
    """A run, and for each penalty on the inputs that it serves (by id) its inputs in the graph."""

    run: StepRun
    inputs: dict[int, tuple[Tensor, ...]]
    taylor: taylor_mode | None = None


class PenaltyRuns:
    """The runs of one step that a list of penalties with a graph needs.

    Penalties on the inputs look at the run that counts, whose inputs are made leaves of the graph. Where batch norm in
    training mode couples the samples they share a second run instead, with the running statistics from before the
    step. Finite differences run the step again at other inputs. A penalty by Taylor coefficients needs a run that
    carries its own coefficients: the run that counts, if no other penalty shares that, or a further run.

    Args:
        step: the step.
        penalties: the penalties that act on it.
        probes: for each penalty, where its random vectors come from.
        all_inputs: whether every tensor of the batch is an input for a penalty that does not choose.
        mean_over_ranks: see :class:`StepContext`; by default there is one process.

    Attributes:
        batch_norms: the layers of batch norm in training mode, by name, if a penalty on the inputs is among them.

    Raises:
        MisconfigurationException: the inputs of a penalty cannot be found, or batch norm has no running statistics.
    """

    def __init__(
        self,
        step: RepeatableStep,
        penalties: Sequence[Penalty],
        probes: Sequence[ProbeSource],
        all_inputs: bool = False,
        mean_over_ranks: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        self.step = step
        self.penalties = penalties
        self.mean_over_ranks = mean_over_ranks
        module = step.module
        self._on_inputs = [penalty for penalty in penalties if isinstance(penalty, InputPenalty)]
        for penalty in self._on_inputs:
            check_layer(penalty, module)
        self._inputs = {
            id(p): _selected_inputs(p, module, step.batch, all_inputs) for p in self._on_inputs if p.layer is None
        }
        self.batch_norms = {
            name: layer
            for name, layer in (module.named_modules() if self._on_inputs else ())
            if isinstance(layer, _BatchNorm) and layer.training
        }
        for name, layer in self.batch_norms.items():
            _refuse_batch_statistics(name, layer)
        self._probes = {id(penalty): source for penalty, source in zip(penalties, probes, strict=True)}
        # A penalty's needs may change once it has its value.
        parameters = dict(step.module.named_parameters())
        self._needs = {id(penalty): penalty.needs_on(parameters) for penalty in penalties}
        others = [p for p in penalties if not self._by_taylor(p) and not (self.batch_norms and p in self._on_inputs)]
        carried = [p for p in penalties if self._by_taylor(p)] if step.context is None and not others else []
        self._carried = carried[0] if carried else None
        self._shared: _Run | None = None
        self._apart: _Run | None = None
        self._own: dict[int, _Run] = {}

    def run(self) -> StepRun:
        """The run of the step that counts.

        Raises:
            BatchSkipped: the step has no loss for this batch.
        """
        self._shared = self._run_for(self._sharing, self.step.run)
        return self._shared.run

    def runs_again_for(self, penalty: Penalty) -> bool:
        """Whether a penalty looks at other runs than the one that counts."""
        if self._by_taylor(penalty):
            return penalty is not self._carried
        return isinstance(penalty, InputPenalty) and (
            bool(self.batch_norms) or self._needs[id(penalty)].derivatives == 1
        )

    def check_repeatable(self, loss: Tensor, by: str) -> list[str]:
        """See that the run that counts gives the same loss when it is run again; see :func:`check_repeatable`."""
        return check_repeatable(
            self.step.module, lambda: self._run_for(self._sharing, self.step.rerun).run.loss, loss, by
        )

    def context(self, penalty: Penalty) -> StepContext:
        """What the penalty is computed from."""
        return self._context(self._run_of(penalty), penalty)

    def context_of_another_run(self, penalty: Penalty) -> StepContext:
        """The same of a further run, with a graph of its own."""
        return self._context(self._run_for([penalty], self.step.rerun), penalty)

    @contextmanager
    def explained(self, penalty: Penalty) -> Iterator[None]:
        """Translate autograd's errors about missing derivatives, and the penalty's own about its context."""
        context = self._run_of(penalty).run.higher_order
        try:
            with context.explained() if context is not None else nullcontext():
                yield
        except ValueError as error:
            raise MisconfigurationException(f"The penalty {penalty.name} cannot be computed. {error}") from error

    def directions(self) -> list[Tensor]:
        """The directions of Taylor coefficients whose gradients a penalty wants, beside those of the parameters."""
        runs = [run for run in (self._shared, *self._own.values()) if run is not None]
        modes = [run.taylor for run in runs if run.taylor is not None]
        parts = [part for mode in modes for directions in mode.parts for part in directions]
        return [part for part in parts if part is not None and part.requires_grad]

    def forget_graphs(self) -> None:
        """Let go of the runs; the step can be run again."""
        self._shared = self._apart = None
        self._own = {}

    @property
    def _sharing(self) -> list[Penalty]:
        """The penalties that look at the run that counts."""
        return [p for p in self.penalties if self._looks_at_shared(p)]

    def _by_taylor(self, penalty: Penalty) -> bool:
        return self._needs[id(penalty)].taylor

    def _looks_at_shared(self, penalty: Penalty) -> bool:
        if self._by_taylor(penalty):
            return penalty is self._carried
        return not (self.batch_norms and isinstance(penalty, InputPenalty))

    def _run_of(self, penalty: Penalty) -> _Run:
        """The run that a penalty looks at."""
        if self._shared is None:
            self.run()
        assert self._shared is not None
        if self._looks_at_shared(penalty):
            return self._shared
        if self._by_taylor(penalty):
            if id(penalty) not in self._own:
                self._own[id(penalty)] = self._run_for([penalty], self.step.rerun)
            return self._own[id(penalty)]
        if self._apart is None:
            self._apart = self._run_independent(self._on_inputs)
        return self._apart

    def _run_independent(self, penalties: Sequence[Penalty], shifts: Sequence[Tensor] | None = None) -> _Run:
        """A further run in which the samples do not see each other."""
        with evaluation_mode(self.batch_norms.values()):
            return self._run_for(penalties, self.step.rerun, shifts)

    def _run_for(
        self, penalties: Sequence[Penalty], run: Callable[..., StepRun], shifts: Sequence[Tensor] | None = None
    ) -> _Run:
        """Run the step with the inputs of the penalties, moved by the shifts, as leaves of its graph."""
        inputs: dict[int, tuple[Tensor, ...]] = {}
        leaves: dict[int, Tensor] = {}  # by the id of the batch's tensor
        on_layers = []
        for penalty in penalties:
            if not isinstance(penalty, InputPenalty):
                continue
            if penalty.layer is not None:
                on_layers.append(penalty)
                continue
            own = self._inputs[id(penalty)]
            for index, x in enumerate(own):
                if id(x) not in leaves:
                    leaves[id(x)] = _leaf(x, None if shifts is None else shifts[index])
            inputs[id(penalty)] = tuple(leaves[id(x)] for x in own)
        for penalty in penalties:
            if self._by_taylor(penalty):
                modes: list[taylor_mode] = []
                found = run(0, leaves, partial(self._new_mode, penalty, modes))
                return _Run(found, inputs, modes[-1])
        derivatives = max([1, *(self._needs[id(penalty)].derivatives for penalty in penalties)])
        within = partial(_layer_outputs, self.step.module, on_layers, inputs, shifts) if on_layers else None
        return _Run(run(derivatives, leaves, within), inputs)

    def _new_mode(self, penalty: Penalty, modes: list[taylor_mode]) -> taylor_mode:
        module = self.step.module
        mode = penalty.forward_mode(ForwardContext(dict(module.named_parameters()), self._probes[id(penalty)], module))
        modes.append(mode)
        return mode

    def _context(self, served: _Run, penalty: Penalty) -> StepContext:
        def at_shifted_inputs(shifts: Sequence[Tensor]) -> StepContext:
            return self._context(self._run_independent([penalty], shifts), penalty)

        own = served.inputs.get(id(penalty), ())
        everyones = {id(x): x for inputs in served.inputs.values() for x in inputs}
        return StepContext(
            served.run.loss,
            dict(self.step.module.named_parameters()),
            probes=self._probes[id(penalty)],
            inputs=own if isinstance(penalty, InputPenalty) else tuple(everyones.values()),
            losses=served.run.losses_seen,
            outputs=served.run.outputs(),
            mean_over_ranks=self.mean_over_ranks,
            at_shifted_inputs=at_shifted_inputs,
            batch_size=samples_in(self.step.batch),
            taylor=served.taylor,
        )


def check_layer(penalty: Penalty, module: nn.Module) -> None:
    """Refuse a penalty on the output of a layer that the module does not have.

    Raises:
        MisconfigurationException: near names are listed.
    """
    names = [name for name, _ in module.named_modules() if name]
    if isinstance(penalty, InputPenalty) and penalty.layer is not None and penalty.layer not in names:
        near = ", ".join(difflib.get_close_matches(penalty.layer, names, n=3, cutoff=0.0))
        raise MisconfigurationException(
            f"The penalty {penalty.name} cannot be computed. layer={penalty.layer!r} is not a layer of "
            f"{type(module).__name__}. Near names: {near}."
        )


def _selected_inputs(penalty: InputPenalty, module: nn.Module, batch: Any, all_inputs: bool) -> tuple[Tensor, ...]:
    try:
        if all_inputs and penalty.inputs is None:
            return select_inputs(batch, lambda batch: list(tensors_in(batch)))
        return select_inputs(batch, penalty.inputs)
    except ValueError as error:
        embeddings = [name for name, layer in module.named_modules() if isinstance(layer, nn.Embedding)]
        hint = f" The embedding layers here: {', '.join(map(repr, embeddings))}." if embeddings else ""
        raise MisconfigurationException(f"The penalty {penalty.name} finds no input. {error}{hint}") from error


def _refuse_batch_statistics(name: str, layer: _BatchNorm) -> None:
    if layer.running_mean is None:
        raise MisconfigurationException(
            f"The layer {name!r} has no running statistics, so it normalizes by the batch in evaluation mode "
            "as well and couples the samples: a sample's own derivatives by its input do not exist. Pass "
            "track_running_stats=True to it, or use GroupNorm."
        )


def _leaf(x: Tensor, shift: Tensor | None) -> Tensor:
    """What stands for an input in the graph: x or x + shift, a tensor to differentiate by."""
    y = x if shift is None else x + shift
    # An input that was computed from parameters (embeddings) keeps its graph.
    return y if y.requires_grad else y.detach().requires_grad_()


@contextmanager
def _layer_outputs(
    module: nn.Module,
    penalties: Sequence[InputPenalty],
    inputs: dict[int, tuple[Tensor, ...]],
    shifts: Sequence[Tensor] | None,
) -> Iterator[None]:
    """Inside, the output of each penalty's layer, at its first call, is taken for the input."""
    with ExitStack() as stack:
        for penalty in penalties:
            inputs.pop(id(penalty), None)
            stack.enter_context(_layer_output(module, penalty, inputs, shifts))
        yield


@contextmanager
def _layer_output(
    module: nn.Module, penalty: InputPenalty, inputs: dict[int, tuple[Tensor, ...]], shifts: Sequence[Tensor] | None
) -> Iterator[None]:
    def take(layer: nn.Module, arguments: Any, output: Any) -> Any:
        if id(penalty) in inputs:
            return output
        if not isinstance(output, Tensor) or not output.is_floating_point() or output.dim() == 0:
            raise MisconfigurationException(
                f"The layer {penalty.layer!r} returns a {type(output).__name__}, by which {penalty.name} cannot be "
                "differentiated. Choose a layer that returns one floating-point tensor of shape (samples, ...)."
            )
        y = _leaf(output, None if shifts is None else shifts[0])
        inputs[id(penalty)] = (y,)
        return y.clone()

    handle = module.get_submodule(str(penalty.layer)).register_forward_hook(take)
    try:
        yield
        if id(penalty) not in inputs:
            raise MisconfigurationException(
                f"The step did not call the layer {penalty.layer!r}, whose output {penalty.name} is to take for the "
                "input. Choose a layer that the training step calls."
            )
    finally:
        handle.remove()
