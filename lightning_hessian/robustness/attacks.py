"""Attacks on a classifier's inputs, in pure torch: find points in a ball around each sample that change its prediction.

``torch.autograd.grad`` differentiates with respect to the inputs only, in evaluation mode. All other state is restored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import KW_ONLY, dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_hessian.arguments import choice, is_number, whole_number
from lightning_hessian.curvature import ProbeSource
from lightning_hessian.curvature.modes import evaluation_mode
from lightning_hessian.step.isolation import Snapshot, random_state_kept

Model = Callable[[Tensor], Tensor]
"""x -> logits of shape (samples, classes); usually an nn.Module."""

Norm = Literal["linf", "l2"]
AttackLoss = Literal["cross_entropy", "cw", "dlr"]
Bounds = tuple[float | Tensor, float | Tensor] | None


@runtime_checkable
class Attack(Protocol):
    """Interface of an attack: a name for the logs, and a function that returns adversarial inputs of x's shape."""

    @property
    def name(self) -> str:
        """Used in the names of logged values."""

    def __call__(self, model: Model, x: Tensor, y: Tensor) -> Tensor:
        """Inputs near x that aim to make ``model`` predict another class than y."""


class GradientAttack:
    """Base class of :class:`FGSM` and :class:`PGD`. With it LightningCLI can select an attack by ``class_path``, which
    it cannot with a protocol or a dataclass."""

    @property
    def name(self) -> str:
        """Used in the names of logged values."""
        raise NotImplementedError

    def __call__(self, model: Model, x: Tensor, y: Tensor) -> Tensor:
        """Inputs near x that aim to make ``model`` predict another class than y."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class FGSM(GradientAttack):
    r"""One step of the full radius along the sign of the loss's gradient (L2: along the gradient).

    .. math:: x' = x + r \, \mathrm{sign}(g), \qquad x' = x + r \, g / \lVert g \rVert_2, \qquad g = \nabla_x L

    Args:
        radius: r, in the units of x (0.03 differs between images in [0, 1] and normalized images).
        norm: ``"linf"``, the largest change of any entry, or ``"l2"``, the L2 norm of a sample's change.
        loss: the loss to increase: ``"cross_entropy"``; ``"cw"``, max_{k != y} z_k - z_y; ``"dlr"``, the same divided
            by z_(1) - z_(3), which is invariant to rescaling of the logits z (needs at least 3 classes).
        bounds: (low, high), the range of the data: numbers, or tensors that broadcast to x (for example of shape
            (channels, 1, 1)). None: no range.

    Returns:
        When called with (model, x, y): inputs of x's shape and dtype, within the ball and the bounds (up to rounding
        in that dtype). A sample that the step does not improve keeps its x.

    Raises:
        ValueError: an argument is out of range; when called, x, y or the logits are invalid.

    Source:
        Goodfellow, Shlens, Szegedy 2015 (arXiv 1412.6572).

    Example:
        >>> model = lambda x: torch.stack([x.sum(1), 0 * x.sum(1)], 1)
        >>> x, y = torch.tensor([[0.2, 0.1]]), torch.tensor([0])
        >>> FGSM(0.25)(model, x, y)
        tensor([[-0.0500, -0.1500]])
    """

    radius: float
    norm: Norm = "linf"
    _: KW_ONLY
    loss: AttackLoss = "cross_entropy"
    bounds: Bounds = None

    def __post_init__(self) -> None:
        _check_settings(self.radius, self.norm, self.loss, self.bounds)

    @property
    def name(self) -> str:
        """For example ``fgsm_linf_0.1``, or ``fgsm_cw_linf_0.1``."""
        return _name("fgsm", self.loss, self.norm, self.radius)

    def __call__(self, model: Model, x: Tensor, y: Tensor) -> Tensor:
        with undisturbed(model, x):
            search = _Search(model, x, y, self.radius, self.norm, self.loss, self.bounds)
            everyone = torch.arange(len(x), device=x.device)
            search.climb(everyone, search.x, 1, self.radius, ProbeSource())
        return search.result()


@dataclass(frozen=True, eq=False)
class PGD(GradientAttack):
    r"""Projected gradient ascent from random points of the ball; returns the best point found.

    .. math:: x_{t+1} = P(x_t + a \, \mathrm{sign}(g_t)), \qquad x_{t+1} = P(x_t + a \, g_t / \lVert g_t \rVert_2)

    P projects onto the ball of the radius around x and onto the bounds. A misclassified point is better than any
    correctly classified one; otherwise the higher loss is better. If a sample's gradient is zero, its step is random.
    Each restart continues with the samples that are still correctly classified. Its starting points depend only on the
    seed and the restart's index, so more restarts never raise the robust accuracy.

    A low success rate does not prove robustness, because gradients may be masked. Compare losses, and try more steps
    and restarts.

    Args:
        radius: of the ball, in the units of x.
        norm: as in :class:`FGSM`.
        steps: gradient steps per restart.
        step_size: a, in the units of x; None for 2.5 * radius / steps.
        loss: as in :class:`FGSM`.
        restarts: number of random starts.
        bounds: as in :class:`FGSM`.
        seed: of the random starts. The global random state is neither used nor changed.

    Returns:
        When called with (model, x, y): inputs of x's shape and dtype, within the ball and the bounds (up to rounding
        in that dtype). A sample that is already misclassified keeps its x.

    Raises:
        ValueError: an argument is out of range; when called, x, y or the logits are invalid.

    Source:
        Madry et al. 2018 (arXiv 1706.06083); losses: Carlini & Wagner 2017 (arXiv 1608.04644), Croce & Hein 2020
        (arXiv 2003.01690).

    Example:
        >>> model = lambda x: torch.stack([x.sum(1), 0 * x.sum(1)], 1)
        >>> x, y = torch.tensor([[0.2, 0.1]]), torch.tensor([0])
        >>> [model(PGD(radius, "l2")(model, x, y)).argmax(1).item() for radius in (0.2, 0.22)]  # 0.3 / sqrt(2) = 0.212
        [0, 1]
    """

    radius: float
    norm: Norm = "linf"
    _: KW_ONLY
    steps: int = 40
    step_size: float | None = None
    loss: AttackLoss = "cross_entropy"
    restarts: int = 1
    bounds: Bounds = None
    seed: int = 0

    def __post_init__(self) -> None:
        _check_settings(self.radius, self.norm, self.loss, self.bounds)
        whole_number("steps", self.steps, least=1)
        whole_number("restarts", self.restarts, least=1)
        whole_number("seed", self.seed)
        if self.step_size is not None and not (is_number(self.step_size) and 0 < float(self.step_size) < math.inf):
            raise ValueError(
                f"step_size={self.step_size!r} must be a positive number, in the units of x, or None for "
                "2.5 * radius / steps."
            )

    @property
    def name(self) -> str:
        """For example ``pgd_l2_0.5``, or ``pgd_cw_linf_0.1``."""
        return _name("pgd", self.loss, self.norm, self.radius)

    def __call__(self, model: Model, x: Tensor, y: Tensor) -> Tensor:
        size = 2.5 * self.radius / self.steps if self.step_size is None else self.step_size
        with undisturbed(model, x):
            search = _Search(model, x, y, self.radius, self.norm, self.loss, self.bounds)
            search.try_unmoved()
            for restart in range(self.restarts):
                rows = (~search.fooled).nonzero().flatten()
                if not len(rows):
                    break
                source = ProbeSource(self.seed, step=restart)
                # Drawn for all samples, so that a sample's start does not depend on which others are still attacked.
                noise = _point_of_ball(search.x, self.radius, self.norm, source.generator(0, x.device))
                search.climb(rows, search.projected(search.x + noise), self.steps, size, source)
        return search.result()


@contextmanager
def undisturbed(model: Model, x: Tensor) -> Iterator[None]:
    """Run ``model`` in evaluation mode with gradients enabled, and restore all state, also after an exception.

    Restores each module's mode and buffers, and the random states of the CPU and of x's CUDA device. Gradients work
    even if the caller is in ``no_grad`` or ``inference_mode``, but clone tensors from inference mode inside first.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    with ExitStack() as stack:
        stack.enter_context(random_state_kept(x.device))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if any(isinstance(module, nn.RNNBase) for module in modules):
            # cuDNN's recurrent kernels support backward in training mode only (pytorch#10006).
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        # The caller's forward pass must not reuse weights that autocast cached without a gradient.
        stack.callback(torch.clear_autocast_cache)
        stack.enter_context(evaluation_mode(modules))
        if isinstance(model, nn.Module):
            stack.enter_context(Snapshot(model, x.device).rewound())  # e.g. a buffer that counts calls
        yield


def logits_of(model: Model, x: Tensor, y: Tensor) -> Tensor:
    """The logits of ``model``, of shape (samples, classes), in float32 or higher precision.

    Raises:
        ValueError: the model's output has another shape, or y does not hold one class per sample.
    """
    logits = model(x)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(x):
        found = f"of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise ValueError(
            f"The model's output is {found}, and an attack needs logits of shape (samples, classes), here "
            f"({len(x)}, classes). Attack a function that returns them, such as `lambda x: model(x).logits`."
        )
    if logits.size(1) < 2:
        raise ValueError(
            "The model has a single logit, and an attack compares the logits of at least two classes. Attack "
            "`lambda x: F.pad(model(x), (1, 0))`, which has the classes 0 and 1, if positive means class 1."
        )
    whole = not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)
    if not whole or y.shape != logits.shape[:1] or (len(y) and not 0 <= int(y.min()) <= int(y.max()) < logits.size(1)):
        raise ValueError(
            f"The targets ({y.dtype}, shape {tuple(y.shape)}) must be the classes of the {len(x)} samples, whole "
            f"numbers of shape ({len(x)},) from 0 to {logits.size(1) - 1}."
        )
    return logits.to(_at_least_float32(logits.dtype))


def runner_up(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """max_{k != y} z_k and its k, of shape (samples,) each."""
    others = logits.scatter(1, y.unsqueeze(1).long(), -math.inf)
    highest, index = others.max(dim=1)
    return highest, index


class _Search:
    """The best point found so far for each sample, and the steps that improve it."""

    def __init__(
        self, model: Model, x: Tensor, y: Tensor, radius: float, norm: Norm, loss: AttackLoss, bounds: Bounds
    ) -> None:
        if not x.is_floating_point():
            raise ValueError(
                f"x is of type {x.dtype}, but only floating-point inputs have a gradient. Convert images to floats; "
                "for token ids, attack the embeddings."
            )
        self.model = model
        self.radius = radius
        self.norm = norm
        self.loss = loss
        self.dtype = x.dtype
        # In half precision a small step may not change x. The clone is not an inference tensor.
        self.x = x.detach().clone().to(_at_least_float32(x.dtype))
        self.y = y.detach().clone()
        self.low, self.high = _bounds_of(self.x, bounds, torch.finfo(x.dtype).eps)
        self.best = self.x.clone()
        self.fooled = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.value = torch.full((len(x),), -math.inf, dtype=self.x.dtype, device=x.device)

    def result(self) -> Tensor:
        return self.best.to(self.dtype)

    def try_unmoved(self) -> None:
        """Consider x itself as a candidate."""
        everyone = torch.arange(len(self.x), device=self.x.device)
        with torch.no_grad():
            self._losses(everyone, self.x)

    def climb(self, rows: Tensor, start: Tensor, steps: int, size: float, source: ProbeSource) -> None:
        """Gradient ascent for the samples ``rows`` from ``start``. Every point on the way is a candidate."""
        point = start[rows]
        for step in range(steps):
            point = point.detach().requires_grad_()
            losses = self._losses(rows, point)
            if not losses.requires_grad:
                raise ValueError(
                    "The logits do not depend differentiably on x, so a gradient attack would find nothing and the "
                    "model would look robust. Look for no_grad, detach or numpy in the forward pass."
                )
            (gradient,) = torch.autograd.grad(losses.sum(), point)
            point = point.detach() + size * self._direction(rows, gradient, source, step)
            point = self.projected(point, rows)
        with torch.no_grad():
            self._losses(rows, point)

    def _losses(self, rows: Tensor, point: Tensor) -> Tensor:
        """The attack's losses of the samples ``rows`` at ``point``. Updates the best points."""
        y = self.y[rows]
        logits = logits_of(self.model, point.to(self.dtype), y)
        losses = _loss(self.loss, logits, y)
        with torch.no_grad():
            fooled, value = logits.argmax(dim=1) != y, losses.detach().to(self.value.dtype)
            was_fooled = self.fooled[rows]
            better = (fooled & ~was_fooled) | ((fooled == was_fooled) & (value > self.value[rows]))
            improved = rows[better]
            self.best[improved] = point.detach()[better]
            self.fooled[improved] = fooled[better]
            self.value[improved] = value[better]
        return losses

    def _direction(self, rows: Tensor, gradient: Tensor, source: ProbeSource, step: int) -> Tensor:
        """Direction of steepest ascent, of norm 1. Random if the gradient is zero or not finite."""
        largest = _by_sample(flat_samples(gradient).abs().amax(dim=1), gradient)
        known = (largest > 0) & largest.isfinite()
        if not bool(known.all()):
            # Drawn for all samples and from the step's own stream: a sample's step must not depend on other samples.
            noise = _gaussian(self.x, source.generator(1 + step, self.x.device))[rows]
            gradient = torch.where(known, gradient, noise)
            largest = torch.where(known, largest, 1)
        if self.norm == "linf":
            return gradient.sign()
        # Scale before the norm, because the squares of a saturated loss's gradient may underflow.
        scaled = gradient / largest
        return scaled / _length(scaled)

    def projected(self, point: Tensor, rows: Tensor | None = None) -> Tensor:
        """Project onto the ball, then onto the bounds. The latter moves towards x, so it does not leave the ball."""
        x = self.x if rows is None else self.x[rows]
        change = point - x
        if self.norm == "linf":
            change = change.clamp(-self.radius, self.radius)
        else:
            length = _length(change)
            change = change * torch.where(length > self.radius, self.radius / length, 1)
        point = x + change
        if self.low is not None and self.high is not None:
            low, high = (bound if rows is None else bound[rows] for bound in (self.low, self.high))
            point = point.clamp(low, high)
        return point


def _loss(loss: AttackLoss, logits: Tensor, y: Tensor) -> Tensor:
    """The loss that the attack increases, of shape (samples,)."""
    if loss == "cross_entropy":
        return F.cross_entropy(logits, y.long(), reduction="none")
    margin = runner_up(logits, y)[0] - logits.gather(1, y.unsqueeze(1).long()).squeeze(1)
    if loss == "cw":
        return margin
    if logits.size(1) < 3:
        raise ValueError(
            "loss='dlr' divides by the difference of the highest and the third logit, and the model has two classes "
            "only. Choose loss='cw'."
        )
    top = logits.topk(3, dim=1).values
    return margin / (top[:, 0] - top[:, 2]).clamp(min=1e-12)


def _bounds_of(x: Tensor, bounds: Bounds, eps: float) -> tuple[Tensor | None, Tensor | None]:
    """Both bounds in x's shape, after a check that x is within them."""
    if bounds is None:
        return None, None
    try:
        low, high = (torch.as_tensor(bound, dtype=x.dtype, device=x.device).expand_as(x) for bound in bounds)
    except RuntimeError as error:
        shapes = " and ".join(str(tuple(torch.as_tensor(bound).shape)) for bound in bounds)
        raise ValueError(
            f"bounds of the shapes {shapes} do not broadcast to x of shape {tuple(x.shape)}. For one bound per channel "
            "of an image, give tensors of shape (channels, 1, 1)."
        ) from error
    # Normalization may round the data and the bounds differently.
    slack = max(1e-4, eps)
    if bool(((x < low - slack * (1 + low.abs())) | (x > high + slack * (1 + high.abs()))).any()):
        raise ValueError(
            f"x goes from {float(x.min()):.4g} to {float(x.max()):.4g} and leaves the bounds, which go from "
            f"{float(low.min()):.4g} to {float(high.max()):.4g}. Perhaps x is normalized and the bounds are not. Pass "
            "bounds (and the radius) in the units of x, such as ((0 - mean) / std, (1 - mean) / std)."
        )
    return low, high


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def flat_samples(x: Tensor) -> Tensor:
    """Reshape to (samples, entries)."""
    return x.reshape(len(x), math.prod(x.shape[1:]))


def _by_sample(values: Tensor, like: Tensor) -> Tensor:
    """Reshape values of shape (samples,) to (samples, 1, ...)."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def _length(change: Tensor) -> Tensor:
    """Each sample's L2 norm, of shape (samples, 1, ...)."""
    return _by_sample(torch.linalg.vector_norm(flat_samples(change), dim=1), change)


def _gaussian(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)


def _point_of_ball(x: Tensor, radius: float, norm: Norm, generator: torch.Generator) -> Tensor:
    """A random displacement of each sample, uniform in the ball."""
    if norm == "linf":
        return torch.empty_like(x).uniform_(-radius, radius, generator=generator)
    direction = _gaussian(x, generator)
    share = torch.rand(len(x), dtype=x.dtype, device=x.device, generator=generator)
    # The ball of radius s r contains the fraction s^n of the volume.
    share = share ** (1 / math.prod(x.shape[1:]))
    return direction / _length(direction) * _by_sample(radius * share, x)


def _name(kind: str, loss: AttackLoss, norm: Norm, radius: float) -> str:
    return "_".join([kind, *([] if loss == "cross_entropy" else [loss]), norm, f"{radius:g}"])


def _check_settings(radius: float, norm: Norm, loss: AttackLoss, bounds: Bounds) -> None:
    if not is_number(radius) or not 0 <= float(radius) < math.inf:
        raise ValueError(f"radius={radius!r} must be a finite number of at least 0, in the units of x.")
    choice("norm", norm, get_args(Norm))
    choice("loss", loss, get_args(AttackLoss))
    if bounds is not None:
        if not isinstance(bounds, Sequence) or len(bounds) != 2:
            raise ValueError(f"bounds={bounds!r} must be a pair (low, high), the range of the data, or None.")
        low, high = (torch.as_tensor(bound) for bound in bounds)
        if not bool((low < high.to(low.device)).all()):
            raise ValueError(f"bounds={bounds!r}: low must be less than high.")
