"""Errors of the user's making take one line that names the setting; all others keep their traceback."""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hydra.errors import HydraException, InstantiationException
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

from lightning_hessian.curvature import HigherOrderError
from lightning_hessian.training.data import DataUnavailable


@contextmanager
def in_one_line() -> Iterator[None]:
    """Print a user's error inside as one line and exit with status 2."""
    try:
        yield
    except Exception as error:
        if not _is_the_users(error):
            raise
        print(f"lightning-hessian: {_message(error)}", file=sys.stderr)
        sys.exit(2)


def _is_the_users(error: Exception) -> bool:
    if isinstance(error, ValueError):
        # A ValueError from our own or Hydra's checks; any other is a fault, to be seen whole.
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        module = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
        return module.split(".")[0] in ("lightning_hessian", "hydra", "omegaconf")
    return isinstance(
        error,
        HydraException | OmegaConfBaseException | MisconfigurationException | HigherOrderError | DataUnavailable,
    )


def _message(error: BaseException) -> str:
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        setting = str(error).rpartition("full_key: ")[2] if "full_key: " in str(error) else "config"
        return f"{setting}: {_flat(error.__cause__)}"
    at_setting = _omegaconf_error(error)
    if at_setting is None:
        return _flat(error).partition(" Config search path:")[0]
    setting, key = str(at_setting.full_key), str(at_setting.key)
    if "is not in struct" in str(at_setting) or "not in '" in str(at_setting):
        if at_setting.parent_node is not None and not at_setting.parent_node:
            return f"there is no option {setting}; {setting.removesuffix(f'.{key}')}=none has no settings"
        near = difflib.get_close_matches(key, [str(k) for k in at_setting.parent_node or ()], n=1)
        hint = f"; did you mean {setting.removesuffix(key)}{near[0]}?" if near else ""
        if setting == f"trainer.{key}" and key in inspect.signature(Trainer).parameters:
            hint = f" in the configuration; add this argument of Lightning's Trainer by +{setting}=..."
        return f"there is no option {setting}{hint}"
    return f"{setting}: {str(at_setting).splitlines()[0]}"


def _omegaconf_error(error: BaseException | None) -> OmegaConfBaseException | None:
    """The error in a chain that knows which setting is meant."""
    while error is not None:
        if isinstance(error, OmegaConfBaseException) and error.full_key:
            return error
        error = error.__cause__
    return None


def _flat(error: BaseException) -> str:
    return " ".join(str(error).split())
