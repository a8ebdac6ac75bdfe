"""The callback that adds a curvature penalty to the loss of any LightningModule."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MethodType
from typing import Any, Literal, SupportsFloat

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_hessian.arguments import choice, is_number, whole_number
from lightning_hessian.curvature.displacement import local
from lightning_hessian.curvature.graph import kinked_layers, kinks, nodes, without_hooks
from lightning_hessian.penalties import Difference, InputPenalty, Penalty, StepContext
from lightning_hessian.regularization.injection import by_name, log_skipped, penalized
from lightning_hessian.step.passes import Passes, check_layer, layers_without_gradients

Strength = float | SupportsFloat | Callable[[int], float]
"""The factor of a penalty in the loss, or a function from the optimizer step to it. (A float is a SupportsFloat as
well, but LightningCLI must be told so.)"""


class HessianRegularizer(Callback):
    r"""Train on loss + strength * penalty, without a change to the module.

    When fitting starts the module's ``training_step`` is wrapped; when fitting ends, also by an exception, it is put
    back. The penalty is added to the loss that the step returns (a tensor, a dict with "loss", or None), and there is
    one backward pass, so accumulation, clipping, DDP and schedulers work as ever. The user's own logs keep the task
    loss (with ``HessianTrace(method="two_pass")`` the one at theta + s v); logged besides are
    ``curvature/<penalty name>``, the raw value, and ``train/penalty``, what was added.
    (Between the steps on which the penalty acts, Lightning repeats the last values in its logs.)

    What a penalty keeps from step to step (the vector of :class:`HessianNorm`) is in the Trainer's checkpoints; a fit
    that resumes from none starts anew.

    Several penalties, in one of these callbacks or in several on one Trainer, share the forward pass, and each sees
    the task loss alone.

    Args:
        penalty: what to add, for example ``HessianTrace()``, or a list of penalties.
        strength: its factor, at least 0; with 0 nothing is computed. A number, or a function of the optimizer step
            (0, 1, ...). For a list of penalties a list of these, or one for all. A plain attribute: schedules may set
            it. Start where strength * penalty is 1-10 % of the task loss, or with what :func:`suggest_strength` says.
        every_n_steps: act on every n-th optimizer step only, with n times the strength. (In manual optimization,
            where several optimizers may step, batches are counted.)
        warmup_steps: raise the strength linearly from 0 over this many steps.
        on_nonfinite: what to do where the penalty's value or its gradient is NaN or infinite: ``"skip"`` trains that
            step on the task loss alone, counts it (``nonfinite_steps``, logged as ``train/<penalty name>_skipped``) and
            warns once; ``"raise"`` stops. (Where the gradient is not finite, the step is run again for the task loss.
            If that gives another loss, or the loss has other terms in manual optimization, the whole gradient of this
            backward pass is left out.)
        seed: of the probes, a whole number. They depend on it, the step, the micro-batch and the rank, and never on
            global state.
        allow_fp16: accept float16 precision, where the penalty's inner gradients are not loss-scaled and may vanish
            or overflow.

    Raises:
        ValueError: an argument is out of its range.
        MisconfigurationException: when fitting starts, for what cannot work (manual optimization: use
            :class:`HessianRegularizationMixin`; float16; sharded parameters; a frozen model; ``parameters`` that
            match nothing), or in the step, for an output without a differentiable loss or an empty batch.
        HigherOrderError: a layer or operator that cannot be differentiated often enough, by name.

    Example:
        >>> import lightning as L
        >>> from lightning_hessian import HessianRegularizer, HessianTrace
        >>> trainer = L.Trainer(
        ...     callbacks=[HessianRegularizer(HessianTrace(), strength=1e-3)],
        ...     logger=False, enable_checkpointing=False,
        ... )
    """

    def __init__(
        self,
        penalty: Penalty | Sequence[Penalty],
        strength: float | Sequence[float] | Strength | Sequence[Strength] = 1e-3,
        every_n_steps: int = 1,
        warmup_steps: int = 0,
        on_nonfinite: Literal["skip", "raise"] = "skip",
        seed: int = 0,
        allow_fp16: bool = False,
    ) -> None:
        penalties = [penalty] if isinstance(penalty, Penalty) else penalty
        if not isinstance(penalties, Sequence) or not penalties or not all(isinstance(p, Penalty) for p in penalties):
            raise ValueError(
                f"penalty={penalty!r} is not a Penalty. Pass an object such as HessianTrace(), or a list of them."
            )
        whole_number("every_n_steps", every_n_steps, least=1)
        whole_number("warmup_steps", warmup_steps, least=0)
        choice("on_nonfinite", on_nonfinite, ("skip", "raise"))
        whole_number("seed", seed)
        self.penalty = penalty
        self.penalties = tuple(penalties)
        self.strength = strength
        self._strengths()
        self.every_n_steps = every_n_steps
        self.warmup_steps = warmup_steps
        self.on_nonfinite = on_nonfinite
        self.seed = seed
        self.allow_fp16 = allow_fp16
        self.nonfinite_steps = 0
        self._tried_backward: set[int] = set()
        self._said_own_pass = False
        self._looked_for_kinks = False
        self._looked_at_rounding = False
        self._looked_for_coupling: set[int] = set()
        self._found_repeatable: set[int] = set()
        self._has_reentrant_checkpoints: bool | None = None
        self.total: Tensor | None = None
        self.unlogged: dict[str, float] = {}
        self._begun_for: weakref.ref[Trainer] | None = None
        self._resumed_by: weakref.ref[Trainer] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy, which may be for another process, has begun for no Trainer.
        return {**self.__dict__, "_begun_for": None, "_resumed_by": None, "total": None}

    def strengths_at(self, step: int) -> list[float]:
        """The factor of each penalty at an optimizer step; 0 where it does not act."""
        strengths = self._strengths()
        if step % self.every_n_steps:
            return [0.0] * len(strengths)
        ramp = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        return [_at(strength, step) * self.every_n_steps * ramp for strength in strengths]

    def _strengths(self) -> list[Strength]:
        if not isinstance(self.strength, Sequence) or isinstance(self.strength, str):
            strengths: list[Any] = [self.strength] * len(self.penalties)
        elif len(self.strength) != len(self.penalties):
            raise ValueError(
                f"strength={self.strength!r} has {len(self.strength)} factors for {len(self.penalties)} penalties. "
                "Give one for each, or a single number for all."
            )
        else:
            strengths = list(self.strength)
        for strength in strengths:
            if not callable(strength):
                _check_strength(strength)
        return strengths

    def begin(self, module: LightningModule) -> None:
        """Start anew for a fit; refuse, before training, what cannot work on this module and its Trainer."""
        self._refuse(module, module.trainer)
        if not _refers(self._resumed_by, to=module.trainer):
            for penalty in self.penalties:
                penalty.load_state_dict({})
        self._resumed_by = None
        for penalty, strength in zip(self.penalties, self._strengths(), strict=True):
            if strength == 0:
                rank_zero_info(f"The penalty {penalty.name} has strength 0: it is not computed.")
        self.nonfinite_steps = 0
        self._tried_backward = set()
        self._said_own_pass = False
        self._looked_for_kinks = False
        self._looked_at_rounding = False
        self._looked_for_coupling = set()
        self._found_repeatable = set()
        self.unlogged = {}
        self._has_reentrant_checkpoints = None
        self._begun_for = weakref.ref(module.trainer)

    def has_begun(self, trainer: Trainer) -> bool:
        """Whether :meth:`begin` was called for this Trainer."""
        return _refers(self._begun_for, to=trainer)

    def _refuse(self, module: LightningModule, trainer: Trainer) -> None:
        by_graph = [penalty for penalty in self.penalties if not penalty.by_differences]
        if by_graph and trainer.precision in ("16-mixed", "16-true") and not self.allow_fp16:
            raise MisconfigurationException(
                f"precision={trainer.precision!r}: {by_graph[0]!r} differentiates the loss before it is scaled, so its "
                "inner gradients may vanish or overflow in float16 and train on a wrong penalty in silence. "
                "Use precision='bf16-mixed' or '32-true', take HessianTrace(method='two_pass'), or pass "
                "allow_fp16=True to try it all the same."
            )
        by_differences = [penalty for penalty in self.penalties if penalty.by_differences]
        for name, layer in module.named_modules() if by_differences else ():
            if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.sparse:
                raise MisconfigurationException(
                    f"The layer {name!r} has sparse gradients, and {by_differences[0]!r} sums gradients of several "
                    "passes. Pass sparse=False to it."
                )
        whole = [penalty for penalty in self.penalties if penalty.needs_whole_parameters]
        if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy) or (
            whole and isinstance(trainer.strategy, ModelParallelStrategy)
        ):
            why = "are then not in the loss's graph, and Hessian-vector products would be zero or fail"
            if whole and whole[0].by_differences:
                why = f"{whole[0]!r} moves along a vector of all of them, which it keeps whole"
            raise MisconfigurationException(
                f"{type(trainer.strategy).__name__} shards the parameters, which {why}. Use "
                "HessianTrace(method='two_pass') with ModelParallelStrategy (FSDP2), or any penalty with "
                "strategy='ddp' or one device."
            )
        for penalty in self.penalties:
            check_layer(penalty, module)
            if "16" in str(trainer.precision) and penalty.needs_full_precision:
                raise MisconfigurationException(
                    f"{penalty!r} takes differences of losses that 16-bit numbers (precision={trainer.precision!r}) "
                    "round away: it would train on noise. Use precision='32-true', or method='autograd'."
                )
            try:
                penalty.check(dict(module.named_parameters()))
            except ValueError as error:
                raise MisconfigurationException(f"The penalty {penalty.name} cannot be computed. {error}") from error

    def try_backward(self, penalty: Penalty, term: Tensor, parameters: Iterable[Tensor]) -> None:
        """Once in a fit, see that the term can be differentiated, while an error still leaves all gradients alone."""
        if id(penalty) not in self._tried_backward and term.requires_grad:
            trained = [parameter for parameter in parameters if parameter.requires_grad]
            with without_hooks(trained):
                torch.autograd.grad(term, trained, retain_graph=True, allow_unused=True)
            self._tried_backward.add(id(penalty))

    def needs_backward(self, loss: Tensor) -> bool:
        """Whether the loss can be differentiated by ``backward()`` only; looked for once in a fit."""
        if self._has_reentrant_checkpoints is None:
            self._has_reentrant_checkpoints = any("CheckpointFunction" in node.name() for node in nodes(loss))
        return self._has_reentrant_checkpoints

    def warn_of_kinks(self, penalty: Penalty, module: LightningModule, loss: Tensor) -> None:
        """Once in a fit, warn where a penalty needs smooth activations and the model has others."""
        if not penalty.needs_smoothness or self._looked_for_kinks:
            return
        self._looked_for_kinks = True
        # The graph of a compiled network does not tell.
        if found := sorted({*kinks(loss), *kinked_layers(module)}):
            rank_zero_warn(
                f"{penalty!r} differentiates twice by a small step, and the loss has kinks ({', '.join(found)}): where "
                "the step crosses one, the difference is noise that grows as the step shrinks. Take smooth activations "
                "(SiLU, GELU, softplus, tanh), method='autograd', or a HessianTrace with method='two_pass', whose "
                "step is larger, or method='gauss_newton'."
            )

    def warn_of_rounding(self, penalty: Penalty, difference: Difference) -> None:
        """Once in a fit, warn where a step is so short that the precision of the forward pass does not see it."""
        if self._looked_at_rounding:
            return
        self._looked_at_rounding = True
        first = difference.tensors[0]
        kind = first.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else first.dtype
        squares = torch.stack([local(tensor).square().mean() for tensor in difference.tensors]).mean()
        spacing = torch.finfo(dtype).eps * squares.sqrt().item()
        moved = max(part.abs().max().item() for part in difference.direction()) * difference.step
        if moved < spacing:
            rank_zero_warn(
                f"{penalty!r} moves the parameters by {moved:.1e}, and {dtype} resolves about {spacing:.1e} of them: "
                "its value is rounding. Raise `step` (with method='two_pass' the strength, whose root it is), or use "
                "precision='32-true'."
            )

    def warn_of_coupling(self, penalty: InputPenalty, context: StepContext) -> None:
        """Once in a fit, see whether the samples are independent, so that each has input derivatives of its own."""
        if id(penalty) in self._looked_for_coupling or context.samples < 2:
            return
        self._looked_for_coupling.add(id(penalty))
        if context.couples():
            rank_zero_warn(
                "The samples of a batch are coupled: one's outputs or share of the loss depend on another's input (a "
                "root of the mean, mixup in the step, a contrastive loss, a layer whose first dimension is not that of "
                f"the samples?). {penalty.name} then mixes their derivatives and depends on the batch."
            )

    def check_repeatable(
        self,
        penalty: Penalty,
        passes: Passes,
        loss: Tensor,
        moved: Sequence[Tensor] = (),
        shared: bool = False,
        finish: Callable[[Tensor], Any] | None = None,
    ) -> None:
        """Once in a fit, see that the step can be run again, and warn where it uses the moved parameters as constants.

        Raises:
            MisconfigurationException: the step gives another loss when it is run again.
        """
        if id(penalty) in self._found_repeatable:
            return
        self._found_repeatable.add(id(penalty))
        with layers_without_gradients(passes.module, moved) as found:
            changed = passes.check_repeatable(loss, repr(penalty), shared, finish)
        if changed:
            rank_zero_warn(
                f"Each run of the training step changes {', '.join(changed[:8])}, and {penalty!r} runs it several "
                "times. On this batch the loss is the same in all. If a later loss depends on what is kept there, "
                "register it as a buffer (`self.register_buffer`), which is rewound."
            )
        if found:
            rank_zero_warn(
                f"The training step calls the layers {', '.join(map(repr, sorted(found)[:4]))} under torch.no_grad() "
                f"(targets or keys from the same network?). {penalty!r} moves their parameters there, too, and an "
                "exact penalty holds what the step detaches constant: the two penalize different functions. Use a "
                "copy of the network for the constants, or HessianTrace()."
            )

    def say_own_pass(self, penalty: Penalty, layers: Sequence[str]) -> None:
        """Once in a fit, say why a penalty on the inputs costs a forward pass of its own."""
        if not self._said_own_pass:
            rank_zero_warn(
                f"Batch norm in training mode ({', '.join(layers[:4])}{', ...' if len(layers) > 4 else ''}) couples "
                f"the samples of a batch, so a sample has no input derivatives of its own. {penalty.name} is computed "
                "in a second forward pass, with the running statistics. (GroupNorm would need none.)"
            )
            self._said_own_pass = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"{type(pl_module).__name__} uses manual optimization, where the loss never passes through the "
                "Trainer, so a callback cannot add to it. Inherit from HessianRegularizationMixin, set "
                "`self.regularizer = HessianRegularizer(...)` in the module instead of passing it to the Trainer, and "
                "compute the loss by `self.regularized(lambda: ...)` in `training_step`."
            )
        if getattr(pl_module, "regularizer", None) and hasattr(pl_module, "regularized"):
            raise MisconfigurationException(
                f"{type(pl_module).__name__} adds a penalty by the mixin's `regularizer`, and the Trainer has a "
                "HessianRegularizer as well: one would see the other's penalty as part of the loss. Keep one."
            )
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if callbacks.count(self) > 1:
            raise MisconfigurationException("The Trainer has the same HessianRegularizer twice. Keep one.")
        self._begun_for = None
        current = pl_module.training_step
        if isinstance(current, _PenalizedStep) and (
            self in current.regularizers or any(one not in callbacks for one in current.regularizers)
        ):
            current.restore()  # left behind by a tuner that failed
            current = pl_module.training_step
        if not isinstance(current, _PenalizedStep):
            current = _PenalizedStep(pl_module)
            pl_module.training_step = current  # type: ignore[method-assign]
        current.regularizers.append(self)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning's tuners train before this, with the callbacks set aside: the step is wrapped already, and begins.
        self.begin(pl_module)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        log_skipped(pl_module, [self])

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        save_states(_regularizers_of(trainer), checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        load_states(_regularizers_of(trainer), checkpoint, trainer)

    def resume(self, trainer: Trainer) -> None:
        """Let the next :meth:`begin` for this Trainer keep the penalties' states, which come from a checkpoint."""
        self._resumed_by = weakref.ref(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        _restore(pl_module)  # also where a tuner has ended the fit

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._resumed_by = None
        self.teardown(trainer, pl_module, "fit")


def _refers(reference: weakref.ref[Trainer] | None, to: Trainer) -> bool:
    return reference is not None and reference() is to


_CHECKPOINT_KEY = "lightning_hessian"


def save_states(regularizers: Sequence[HessianRegularizer], checkpoint: dict[str, Any]) -> None:
    """Put what the penalties keep from step to step into a checkpoint, by the names they have in logs."""
    states = {name: state for name, _, penalty in by_name(regularizers) if (state := penalty.state_dict())}
    if states:
        checkpoint[_CHECKPOINT_KEY] = states


def load_states(regularizers: Sequence[HessianRegularizer], checkpoint: Mapping[str, Any], trainer: Trainer) -> None:
    """Let the penalties go on from a checkpoint that a fit resumes from; those that are not in it start anew."""
    if trainer.state.fn != TrainerFn.FITTING:
        return
    states = checkpoint.get(_CHECKPOINT_KEY, {})
    for name, regularizer, penalty in by_name(regularizers):
        penalty.load_state_dict(states.get(name, {}))
        regularizer.resume(trainer)


def _regularizers_of(trainer: Trainer) -> list[HessianRegularizer]:
    # Lightning refuses two callbacks of a class that override `state_dict`: the states of all are kept together.
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, HessianRegularizer)]


class _PenalizedStep:
    """A module's ``training_step`` with the penalties of its regularizers added."""

    def __init__(self, module: LightningModule) -> None:
        self.module = module
        self.regularizers: list[HessianRegularizer] = []
        self.instance_attribute = module.__dict__.get("training_step")
        self.original = module.training_step
        # Lightning looks at the signature to see what to pass.
        functools.update_wrapper(self, self.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        _refuse_empty_batch((args, kwargs))
        for regularizer in self.regularizers:
            if not regularizer.has_begun(self.module.trainer):
                regularizer.begin(self.module)
        # Whatever Lightning hands over, the batch in it is found: a step takes it first, or by its name.
        batch = args[0] if args else kwargs.get("batch")

        def step(batch: Any) -> Any:
            if args:
                return self.original(batch, *args[1:], **kwargs)
            return self.original(**{**kwargs, "batch": batch} if "batch" in kwargs else kwargs)

        return penalized(self.module, self.regularizers, step, batch)

    def __reduce__(self) -> Any:
        # A copy of the module made in the middle of a fit has its own, plain training step.
        if isinstance(self.original, MethodType):
            return _bound, (self.original.__func__, self.module)
        return _itself, (self.original,)

    def restore(self) -> None:
        if self.instance_attribute is None:
            del self.module.training_step
        else:
            self.module.training_step = self.instance_attribute  # type: ignore[method-assign]


def _bound(function: Any, module: LightningModule) -> Any:
    return MethodType(function, module)


def _itself(step: Any) -> Any:
    return step


def _restore(module: LightningModule) -> None:
    if isinstance(current := module.training_step, _PenalizedStep):
        current.restore()


def _refuse_empty_batch(batch: Any) -> None:
    sizes: list[int] = []
    apply_to_collection(batch, Tensor, lambda tensor: sizes.append(tensor.numel()))
    if sizes and not any(sizes):
        raise MisconfigurationException(
            "The batch is empty: none of its tensors has an entry, so its mean loss and the loss's curvature do not "
            "exist. Look at the dataset and the sampler, or pass drop_last=True to the DataLoader."
        )


def _at(strength: Strength, step: int) -> float:
    value = strength(step) if callable(strength) else strength
    _check_strength(value)
    return float(value)


def _check_strength(strength: SupportsFloat) -> None:
    if not is_number(strength) or not 0 <= float(strength) < math.inf:
        raise ValueError(
            f"strength={strength!r} must be a finite number of at least 0: the factor of the penalty in the loss. "
            "A negative one would reward curvature. (The word 'auto' is for the command line; in Python pass what "
            "suggest_strength() returns.)"
        )
