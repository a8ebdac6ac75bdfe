"""Callbacks that look on, and other ways to see what a run does."""

import gc
import warnings
from contextlib import contextmanager

import lightning as L
import torch
from nets import fit, smooth
from oracles import flat


class Recorder(L.Callback):
    """What was logged at each step."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.rows.append({k: float(v) for k, v in trainer.logged_metrics.items()} | {"step": trainer.global_step})


class Gradients(L.Callback):
    """The gradients of every optimizer step."""

    def __init__(self):
        self.rows = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rows.append(flat([p.grad.detach().clone() for p in pl_module.parameters()]))


def gradient_of_step(module, callbacks=(), loader=None, **settings):
    """Of the first step."""
    seen = Gradients()
    fit(module, [*callbacks, seen], loader, max_steps=1, **settings)
    return seen.rows[0]


def added_gradient(*callbacks):
    """What callbacks add to the gradient of the first step."""
    return gradient_of_step(smooth(), callbacks) - gradient_of_step(smooth())


class LiveTensors(L.Callback):
    """How many tensors there are after each step, or after the given ones."""

    def __init__(self, steps=None, collect=False):
        self.steps = steps
        self.collect = collect
        self.counts = []

    def on_train_batch_end(self, trainer, *_):
        if self.steps is None or trainer.global_step in self.steps:
            if self.collect:
                gc.collect()
            self.counts.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))


@contextmanager
def no_garbage_collector():
    """Nothing is collected on the way, unless someone asks for it."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class SaveAt(L.Callback):
    """A checkpoint after one of the steps."""

    def __init__(self, path, step=2):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@contextmanager
def all_warnings():
    """The texts of all that is warned of, repetitions among them; the list is filled at the end."""
    told = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield told
    told += [str(warning.message) for warning in caught]
