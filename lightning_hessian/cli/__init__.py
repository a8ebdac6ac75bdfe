"""The command line. It needs the extra ``train``."""

import importlib.util

_EXTRA = {
    "hydra": "hydra-core",
    "omegaconf": "omegaconf",
    "torchvision": "torchvision",
    "torchmetrics": "torchmetrics",
    "tensorboard": "tensorboard",
    "sklearn": "scikit-learn",
}
"""The command's extra dependencies: module name -> distribution name."""

if _missing := [name for module, name in _EXTRA.items() if importlib.util.find_spec(module) is None]:
    raise ModuleNotFoundError(
        f"The lightning-hessian command needs {', '.join(_missing)}, which the plain installation does not include. "
        'Install the extra: pip install "lightning-hessian[train]"',
        name=__name__,
    )
