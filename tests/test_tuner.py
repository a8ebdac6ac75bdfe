"""Lightning's tuners train before fitting starts, with the callbacks set aside: the penalty is there all the same."""

import lightning as L
import pytest
import torch
from lightning.pytorch.tuner import Tuner
from nets import CPU, Classifier, data, weights

import lightning_hessian as lh


class Tuned(Classifier):
    def __init__(self):
        super().__init__(lr=0.01)
        self.batch_size = 8

    def train_dataloader(self):
        return data(self.batch_size)

    val_dataloader = train_dataloader


class Counting(lh.HessianTrace):
    def __init__(self, **settings):
        super().__init__(**settings)
        self.calls = 0

    def value(self, context):
        self.calls += 1
        return super().value(context)


def trainer(callbacks, tmp_path, **settings):
    return L.Trainer(**CPU, max_epochs=2, callbacks=callbacks, default_root_dir=tmp_path, **settings)


def losses(callbacks, tmp_path):
    module = Tuned()
    finder = Tuner(trainer(callbacks, tmp_path)).lr_find(module, num_training=12, update_attr=False)
    assert "training_step" not in module.__dict__
    return torch.tensor(finder.results["loss"])


def test_lr_find_minimizes_the_loss_with_the_penalty(tmp_path):
    plain, none = losses([], tmp_path), losses([lh.HessianRegularizer(lh.HessianTrace(), strength=0.0)], tmp_path)
    penalized = losses([lh.HessianRegularizer(lh.HessianTrace(), strength=0.1)], tmp_path)
    assert torch.equal(plain, none)
    assert not torch.allclose(plain, penalized)
    # What the finder records is the loss that is minimized: the task loss and the penalty.
    module = Tuned()
    penalty = Counting()
    callbacks = [lh.HessianRegularizer([penalty, lh.HessianNorm()], strength=0.1)]
    Tuner(trainer(callbacks, tmp_path)).lr_find(module, num_training=12, update_attr=False)
    assert penalty.calls == 12


@pytest.mark.parametrize("tune", ["lr_find", "scale_batch_size"])
def test_training_after_a_tuner_is_training_without_one(tune, tmp_path):
    ends = []
    for tuned in (False, True):
        module = Tuned()
        penalty = Counting()
        regularizer = lh.HessianRegularizer([penalty, lh.HessianNorm()], strength=0.02)
        own = trainer([regularizer], tmp_path)
        if tuned and tune == "lr_find":
            Tuner(own).lr_find(module, num_training=5, update_attr=False)
        elif tuned:
            Tuner(own).scale_batch_size(module, steps_per_trial=2, max_trials=2)
            module.batch_size = 8
        assert (penalty.calls > 0) == tuned
        own.fit(module)
        ends.append(weights(module))
        assert "training_step" not in module.__dict__
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)


def test_a_tuner_that_fails_leaves_nothing_to_the_next_fit(tmp_path):
    class Fails(Counting):
        def value(self, context):
            raise ZeroDivisionError

    module = Tuned()
    with pytest.raises(ZeroDivisionError):
        Tuner(trainer([lh.HessianRegularizer(Fails())], tmp_path)).lr_find(module, num_training=5)
    penalty = Counting()
    trainer([lh.HessianRegularizer(penalty)], tmp_path).fit(module)
    assert penalty.calls == 12
