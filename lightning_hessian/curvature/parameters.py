"""Select parameters by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

ParameterFilter = str | Sequence[str] | Callable[[str, Tensor], bool] | None
"""A glob on parameter names, a list of globs, a predicate ``(name, parameter) -> bool``, or None for all."""


def check_filter(which: object, setting: str = "parameters") -> None:
    """Check that the value is a :data:`ParameterFilter`.

    Raises:
        ValueError: the value is something else, or an empty list.

    Example:
        >>> check_filter(3)
        Traceback (most recent call last):
        ValueError: parameters=3 chooses none. Pass a glob such as '*.weight', a list of globs, or None for all.
    """
    if which is None or isinstance(which, str) or (callable(which) and not isinstance(which, type)):
        return
    if not isinstance(which, Sequence) or not which or not all(isinstance(glob, str) for glob in which):
        raise ValueError(
            f"{setting}={which!r} chooses none. Pass a glob such as '*.weight', a list of globs, or None for all."
        )


def select_parameters(
    named: Mapping[str, Tensor], which: ParameterFilter = None, setting: str = "parameters", frozen: bool = False
) -> dict[str, Tensor]:
    """Return the trainable parameters that ``which`` selects, in their original order.

    Args:
        named: parameters by name, for example ``dict(module.named_parameters())``.
        which: a glob (``"*.weight"``), a list of globs (one match suffices), a predicate
            ``(name, parameter) -> bool``, or None for all trainable parameters.
        setting: the name of ``which`` in error messages.
        frozen: also select parameters that do not require grad.

    Raises:
        ValueError: no parameter requires grad; ``which`` selects none (the error lists similar names); a selected
            parameter is complex; or a lazy layer has not created its parameters yet.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        >>> list(select_parameters(dict(net.named_parameters()), "*.weight"))
        ['0.weight', '1.weight']
    """
    check_filter(which, setting)
    lazy = [name for name, parameter in named.items() if is_lazy(parameter)]
    if lazy:
        raise ValueError(
            f"The parameter {lazy[0]!r} belongs to a lazy layer, which infers its shape from a batch, so it has "
            "no entries yet. Run a batch through the model first."
        )
    trainable = {name: parameter for name, parameter in named.items() if frozen or parameter.requires_grad}
    if not trainable:
        raise ValueError(
            f"None of the {len(named)} parameters requires a gradient, so the loss has no curvature to measure. "
            "Unfreeze some of them with `parameter.requires_grad_(True)`."
        )
    chosen = _choose(named, trainable, which, setting)
    for name, parameter in chosen.items():
        refuse_complex(parameter, f"The parameter {name!r}")
    return chosen


def refuse_complex(tensor: Tensor, what: str) -> None:
    """Refuse complex tensors.

    Raises:
        ValueError: the tensor is complex.
    """
    if tensor.is_complex():
        raise ValueError(
            f"{what} is complex, but the Hessian is defined here for real tensors: a complex trace would not measure "
            "curvature. Store it as a real tensor of shape (..., 2) and use `torch.view_as_complex(parameter)` in the "
            "forward pass, or select only real parameters with `parameters=`."
        )


def _choose(
    named: Mapping[str, Tensor], trainable: dict[str, Tensor], which: ParameterFilter, setting: str
) -> dict[str, Tensor]:
    if which is None:
        return trainable
    if callable(which):
        chosen = {name: parameter for name, parameter in trainable.items() if which(name, parameter)}
        if not chosen:
            raise ValueError(
                f"The predicate `{setting}` selected none of the {len(trainable)} trainable parameters. "
                f"Their names: {_listed(trainable)}."
            )
        return chosen

    globs = [which] if isinstance(which, str) else list(which)
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in trainable):
            others = [name for name in named if name not in trainable and fnmatchcase(name, glob)]
            if others:
                raise ValueError(
                    f"{setting}={glob!r} matches only frozen parameters ({_listed(others)}). "
                    "Unfreeze them or select others."
                )
            near = difflib.get_close_matches(glob, trainable, n=3, cutoff=0.0)
            raise ValueError(
                f"{setting}={glob!r} matches no trainable parameter. Near names: {', '.join(near)}. "
                "A glob must match the whole name: start it with '*' to match an ending."
            )
    return {name: parameter for name, parameter in trainable.items() if any(fnmatchcase(name, glob) for glob in globs)}


def _listed(names: Mapping[str, Tensor] | Sequence[str], most: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")


def padding_rows(module: nn.Module) -> dict[Tensor, int]:
    """Return the index of each embedding's padding row. Its gradient is always zero, because it is a constant.

    Example:
        >>> layer = nn.Embedding(3, 2, padding_idx=1)
        >>> padding_rows(layer)[layer.weight]
        1
    """
    return {
        layer.weight: layer.padding_idx
        for layer in module.modules()
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.padding_idx is not None
    }
