"""The command line, which needs the extra ``train``."""

import importlib.util

_EXTRA = {
    "hydra": "hydra-core",
    "omegaconf": "omegaconf",
    "torchvision": "torchvision",
    "torchmetrics": "torchmetrics",
    "tensorboard": "tensorboard",
    "sklearn": "scikit-learn",
}
"""What the command needs beyond the package itself: modules, and the distributions that have them."""

if _missing := [name for module, name in _EXTRA.items() if importlib.util.find_spec(module) is None]:
    raise ModuleNotFoundError(
        f"The command line of lightning-hessian needs {', '.join(_missing)}, which the plain installation leaves out. "
        'Install its extra: pip install "lightning-hessian[train]"',
        name=__name__,
    )
