"""Parameters sharded by FSDP2: the coefficients go to the whole parameters, which the forward pass sees."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_hessian.curvature.containers import exchanged, tensors_in
from lightning_hessian.curvature.errors import OTHERWISE, HigherOrderError
from lightning_hessian.curvature.sharding import gatherers, is_dtensor, whole
from lightning_hessian.curvature.taylor.coefficients import (
    Coefficients,
    RuleFunction,
    attach,
    coefficients_of,
    detach,
    has_coefficients,
)


class _Place(NamedTuple):
    """Where a layer has a parameter: the whole one while FSDP2 has gathered it, otherwise the shard."""

    layer: nn.Module
    attribute: str
    name: str
    parts: tuple[Tensor | None, ...]

    @property
    def parameter(self) -> Tensor:
        found: Tensor = self.layer._parameters[self.attribute]  # type: ignore[assignment]
        return found


class ShardedParameters:
    """Attaches coefficients to the whole parameters that FSDP2 gathers for the forward pass.

    Each process keeps the whole directions, because the graph needs them until the backward pass.

    Args:
        module: the model.
        tensors: parameters; those that are no DTensors are left out.
        parts: for each one its first coefficients, sharded likewise.

    Raises:
        HigherOrderError: no layer gathers a parameter, or the model is unknown.
    """

    def __init__(
        self, module: nn.Module | None, tensors: Sequence[Tensor], parts: Sequence[tuple[Tensor | None, ...]]
    ) -> None:
        sharded = {t: own for t, own in zip(tensors, parts, strict=True) if is_dtensor(t)}
        if sharded and module is None:
            raise HigherOrderError(
                "The parameters are sharded (DTensors), and only the model can gather them. Pass it: "
                "ForwardContext(parameters, module=net)."
            )
        self._gatherers = [] if module is None else gatherers(module)
        # The inner ones come last, and gather what is theirs.
        gatherer_of = {layer: gatherer for gatherer in self._gatherers for layer in gatherer.modules()}
        self._places: dict[nn.Module | None, list[_Place]] = defaultdict(list)
        wholes: dict[Tensor, tuple[Tensor | None, ...]] = {}  # a shared parameter has several places
        for path, layer in module.named_modules() if sharded and module is not None else ():
            for attribute, parameter in layer._parameters.items():
                if parameter is None or parameter not in sharded:
                    continue
                name = f"{path}.{attribute}" if path else attribute
                if layer not in gatherer_of:
                    raise _not_gathered(name, parameter)
                if parameter not in wholes:
                    own = sharded[parameter]
                    wholes[parameter] = tuple(None if part is None else whole(part, like=parameter) for part in own)
                self._places[gatherer_of[layer]].append(_Place(layer, attribute, name, wholes[parameter]))

    @contextmanager
    def active(self, directions: int) -> Iterator[None]:
        """Inside, the parameters have their coefficients while they are whole.

        Args:
            directions: how many directions there are.
        """
        with ExitStack() as stack:

            def attached(place: _Place) -> None:
                x = place.parameter
                parts = tuple(None if part is None else part.to(x.dtype) for part in place.parts)
                attach(Coefficients(x, parts, None))
                stack.callback(detach, x)  # FSDP2 keeps the whole parameter for the next time

            def gathered(layer: nn.Module, _: Any) -> None:
                for place in self._places[layer]:
                    if is_dtensor(place.parameter):
                        raise _not_gathered(place.name, place.parameter)
                    attached(place)

            def together(_: nn.Module, __: Any, output: Any) -> Any:
                moving = [x for x in tensors_in(output) if has_coefficients(x)]
                return exchanged(output, moving, _together([coefficients_of(x, directions) for x in moving]))

            for gatherer in self._gatherers:
                # FSDP2's own hooks gather the parameters before the first one, and see the output after the second.
                stack.callback(gatherer.register_forward_pre_hook(gathered).remove)
                stack.callback(gatherer.register_forward_hook(together, prepend=True).remove)
            for places in self._places.values():
                for place in places:
                    if not is_dtensor(place.parameter):  # a checkpoint inside of the layer is recomputed
                        attached(place)
            yield


def passed_through(run: Any, args: Sequence[Any], directions: int) -> Any:
    """Call a custom function of FSDP2. It returns its tensors as they are, and acts in the backward pass."""
    results = run(*args)
    for x, y in zip((x for x in args if isinstance(x, Tensor)), results, strict=True):
        attach(Coefficients(y, *coefficients_of(x, directions)[1:]))
    return results


def _together(series: Sequence[Coefficients]) -> list[Tensor]:
    """The same tensors as results of one node, by which the backward pass enters the layer.

    FSDP2 gathers the layer's parameters when an output gets its gradient. The output's coefficients must not get theirs
    before.
    """
    flat = [x for one in series for x in (one.value, *one.first, one.second)]
    results = iter(_Together.apply(*flat) if flat else ())
    return [
        attach(Coefficients(next(results), tuple(next(results) for _ in one.first), next(results))) for one in series
    ]


class _Together(RuleFunction):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor | None) -> Any:
        ctx.set_materialize_grads(False)
        return tuple(None if x is None else x.detach() for x in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        return gradients


def _not_gathered(name: str, parameter: Any) -> HigherOrderError:
    return HigherOrderError(
        f"The parameter {name!r} is a DTensor in the forward pass (placements {parameter.placements}), as in tensor "
        "parallelism. Taylor coefficients need whole parameters there, as FSDP2 (`fully_shard`) gathers them. "
        f"{OTHERWISE}"
    )
