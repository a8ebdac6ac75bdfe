"""User errors become one line that names the setting. All other errors keep their traceback."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from hydra.errors import HydraException, InstantiationException
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

from lightning_hessian.cli.in_memory import DataUnavailable
from lightning_hessian.curvature import HigherOrderError


class Diverged(RuntimeError):
    """The loss is not finite."""


def print_user_error(error: Exception, where: str = "") -> int | None:
    """Print a user error as one line.

    Args:
        error: the exception.
        where: a prefix of the message.

    Returns:
        The exit status: 3 if training diverged, 2 for any other user error. None for a bug; nothing is printed then.
    """
    if not _is_user_error(error):
        return None
    print(f"lightning-hessian: {where}{_message(error)}", file=sys.stderr)
    return 3 if isinstance(error, Diverged) else 2


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Print a user error raised inside as one line, and exit with its status."""
    try:
        yield
    except Exception as error:
        status = print_user_error(error)
        if status is None:
            raise
        sys.exit(status)


def _is_user_error(error: Exception) -> bool:
    if _is_unwritable_run_directory(error):
        return True
    if isinstance(error, ValueError):
        # Checks of this package and of Hydra raise ValueErrors. Any other ValueError is a bug and needs its traceback.
        return _modules(error)[-1].split(".")[0] in ("lightning_hessian", "hydra", "omegaconf")
    return isinstance(
        error,
        HydraException
        | OmegaConfBaseException
        | MisconfigurationException
        | HigherOrderError
        | DataUnavailable
        | Diverged,
    )


def _is_unwritable_run_directory(error: BaseException) -> bool:
    """Whether Hydra failed to create or write the run's directory."""
    if isinstance(error, HydraException):  # Hydra's error about a missing config is an OSError too
        return False
    if not isinstance(error, OSError) and not isinstance(error.__cause__, OSError):  # logging wraps it in a ValueError
        return False
    packages = [module.split(".")[0] for module in _modules(error)]
    return next((name for name in reversed(packages) if name in ("lightning_hessian", "hydra")), "") == "hydra"


def _modules(error: BaseException) -> list[str]:
    """Modules in the traceback; the last one raised the error."""
    return [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)] or [""]


def _message(error: BaseException) -> str:
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        setting = str(error).rpartition("full_key: ")[2] if "full_key: " in str(error) else "config"
        return f"{setting}: {_flat(error.__cause__)}"
    if _is_unwritable_run_directory(error):
        return (
            "hydra.run.dir (in a sweep hydra.sweep.dir) cannot be written, and a run saves its files there "
            f"({_flat(error.__cause__ or error)}). Set it to a writable folder."
        )
    at_setting = _omegaconf_error(error)
    if at_setting is None:
        told = _flat(error).partition(" Config search path:")[0]
        missing = re.search(r"Could not find 'hydra/(sweeper/optuna|launcher/(joblib|submitit))", told)
        return f'{told}. Install it: pip install "lightning-hessian[sweep]"' if missing else told
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
    """The first error in the chain of causes that names a setting."""
    while error is not None:
        if isinstance(error, OmegaConfBaseException) and error.full_key:
            return error
        error = error.__cause__
    return None


def _flat(error: BaseException) -> str:
    return " ".join(str(error).split())
