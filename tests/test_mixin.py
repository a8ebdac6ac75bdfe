"""HessianRegularizationMixin: the same penalty in a hand-written training step."""

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from nets import Classifier, Recorder, fit, weights
from torch.nn import functional as F

import lightning_hessian as lh


class Manual(lh.HessianRegularizationMixin, Classifier):
    def __init__(self, **settings):
        super().__init__(**settings)
        self.automatic_optimization = False
        self.regularizer = lh.HessianRegularizer(lh.HessianTrace(), strength=0.02)
        self.calls = 1

    def training_step(self, batch, batch_idx):
        x, y = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for _ in range(self.calls):
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


def test_several_losses_in_one_step_have_different_probes():
    drawn = []

    class Watched(lh.HessianTrace):
        def value(self, context):
            drawn.append(context.probes.rademacher(8, 0).tolist())
            return super().value(context)

    module = Manual()
    module.calls = 2
    module.regularizer = lh.HessianRegularizer(Watched(), strength=0.02)
    fit(module, max_steps=2)
    assert len({tuple(v) for v in drawn}) == len(drawn) == 4


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
