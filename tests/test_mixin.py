"""HessianRegularizationMixin: the same penalty in a hand-written training step."""

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from nets import CPU, Classifier, Recorder, data, fit, weights
from torch.nn import functional as F

import lightning_hessian as lh


class Manual(lh.HessianRegularizationMixin, Classifier):
    def __init__(self, **settings):
        super().__init__(**settings)
        self.automatic_optimization = False
        self.regularizer = lh.HessianRegularizer(lh.HessianTrace(), strength=0.02)

    def training_step(self, batch, batch_idx):
        x, y = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.regularized(lambda: F.cross_entropy(self.net(x), y)))
        optimizer.step()


class Automatic(lh.HessianRegularizationMixin, Classifier):
    def __init__(self, regularizer):
        super().__init__()
        self.regularizer = regularizer

    def training_step(self, batch, batch_idx):
        return self.regularized(lambda: {"loss": F.cross_entropy(self.net(batch[0]), batch[1])})


def test_manual_optimization_equals_the_callback():
    manual, automatic = Manual(), Classifier()
    recorder = Recorder()
    fit(manual, [recorder])
    fit(automatic, [lh.HessianRegularizer(lh.HessianTrace(), strength=0.02)])
    torch.testing.assert_close(weights(manual), weights(automatic), rtol=1e-10, atol=1e-10)
    assert "curvature/hessian_trace" in recorder.rows[0]


def test_automatic_optimization_equals_the_callback():
    regularizer = lh.HessianRegularizer(lh.HessianTrace(), strength=0.02)
    mixed, automatic = Automatic(regularizer), Classifier()
    fit(mixed)
    fit(automatic, [regularizer])
    assert torch.equal(weights(mixed), weights(automatic))


def test_every_n_steps_counts_batches_where_several_optimizers_step():
    class Two(Manual):
        def configure_optimizers(self):
            return [torch.optim.SGD(self.net[i].parameters(), lr=0.1) for i in (0, 3)]

        def training_step(self, batch, batch_idx):
            for optimizer, regularizer in zip(self.optimizers(), self.both, strict=True):
                self.regularizer = regularizer
                optimizer.zero_grad()
                self.manual_backward(self.regularized(lambda: F.cross_entropy(self.net(batch[0]), batch[1])))
                optimizer.step()

    acted = []

    class Watched(lh.HessianTrace):
        def value(self, context):
            acted.append((self, context.probes.micro_batch))
            return super().value(context)

    module = Two()
    module.both = [lh.HessianRegularizer(Watched(), strength=0.01, every_n_steps=2) for _ in range(2)]
    fit(module)
    for regularizer in module.both:
        assert [batch for penalty, batch in acted if penalty is regularizer.penalty] == [0, 2, 4]


def test_a_validation_step_may_use_the_regularized_loss():
    class Shared(Automatic):
        def validation_step(self, batch, batch_idx):
            self.training_step(batch, batch_idx)

    module = Shared(lh.HessianRegularizer(lh.HessianTrace(), strength=0.02))
    trainer = L.Trainer(**CPU, max_epochs=1)
    trainer.fit(module, data(), data())


def test_callback_and_mixin_together_are_refused():
    regularizer = lh.HessianRegularizer(lh.HessianTrace(), strength=0.02)
    with pytest.raises(MisconfigurationException, match="Keep one"):
        fit(Automatic(regularizer), [lh.HessianRegularizer(lh.HessianTrace())])


def test_several_regularizers():
    halves = [lh.HessianRegularizer(lh.HessianTrace(), strength=0.01) for _ in range(2)]
    both, one = Automatic(halves), Automatic(lh.HessianRegularizer(lh.HessianTrace(), strength=0.02))
    fit(both)
    fit(one)
    torch.testing.assert_close(weights(both), weights(one), rtol=1e-10, atol=1e-10)


def test_without_a_regularizer_the_error_says_how_to_set_it():
    with pytest.raises(MisconfigurationException, match=r"self\.regularizer = HessianRegularizer"):
        fit(Automatic(None))


def test_a_frozen_model_is_refused():
    module = Manual()
    module.requires_grad_(False)
    with pytest.raises(MisconfigurationException, match="requires_grad_"):
        fit(module)


def test_strength_0_is_bit_equal_to_no_penalty():
    module, plain = Automatic(lh.HessianRegularizer(lh.HessianTrace(), strength=0.0)), Classifier()
    fit(module)
    fit(plain)
    assert torch.equal(weights(module), weights(plain))
