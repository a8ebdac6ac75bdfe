"""Runs of the command line that are killed on the way."""

from contextlib import contextmanager

from lightning_hessian.cli.classifier import Classifier


class Killed(BaseException):
    """Nothing is left to the process."""


@contextmanager
def killed_at(start, monkeypatch):
    """Kill at the start of an epoch, the n-th that is started inside. Yields the numbers of the epochs started."""
    epochs = []

    def count(module):
        epochs.append(module.current_epoch)
        if len(epochs) == start:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "on_train_epoch_start", count)
        yield epochs
