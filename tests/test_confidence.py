"""The confidence penalty against Pereyra et al.'s formula: the loss is L - strength * (mean entropy)."""

import math

import pytest
import torch
from nets import Classifier, data, fit, plain_loop, smooth, task_loss, weights
from recorders import Recorder
from torch import nn
from torch.nn import functional as F

import lightning_hessian as lh


def entropies(logits):
    p = torch.softmax(logits, dim=1)
    return -(p * p.log()).sum(dim=1)


def context_of(loss, z):
    with lh.watch_losses() as seen:
        value = loss(z * 1)
    return lh.StepContext(value, {"z": z}, losses=seen)


def test_training_subtracts_strength_times_the_mean_entropy():
    module, seen = smooth(), Recorder()
    fit(module, [lh.HessianRegularizer(lh.ConfidencePenalty(), strength=0.3), seen], data(8))

    def loss_of(module, x, y, step):
        logits = module.net(x)
        return F.cross_entropy(logits, y) - 0.3 * entropies(logits).mean()

    torch.testing.assert_close(weights(module), plain_loop(smooth(), loss_of, data(8)), rtol=1e-9, atol=1e-11)
    fresh, (x, y) = smooth(), next(iter(data(8)))
    mean = entropies(fresh.net(x)).mean().item()
    assert seen.rows[0]["curvature/negative_entropy"] == pytest.approx(-mean, rel=1e-6)
    assert seen.rows[0]["train/penalty"] == pytest.approx(-0.3 * mean, rel=1e-6)
    assert seen.rows[0]["train/loss"] == pytest.approx(task_loss(fresh, (x, y)).item(), rel=1e-6)


def test_it_makes_predictions_less_confident():
    def mean_entropy(*callbacks):
        module = smooth()
        fit(module, callbacks, data(8), max_epochs=30)
        return torch.cat([entropies(module.net(x)) for x, _ in data(8)]).mean().item()

    assert mean_entropy(lh.HessianRegularizer(lh.ConfidencePenalty(), strength=0.5)) > mean_entropy() + 0.1


Z = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, 1.0], [1.0, 1.0, -2.0]], dtype=torch.float64)
Y = torch.tensor([0, 1, -100])
BERNOULLI = torch.sigmoid(Z)
CASES = {
    "an ignored target does not count": (lambda z: F.cross_entropy(z, Y), entropies(Z[:2])),
    "soft targets": (lambda z: F.cross_entropy(z, torch.softmax(Z, 1), label_smoothing=0.1), entropies(Z)),
    "one sample": (lambda z: F.cross_entropy(z[0], Y[0]), entropies(Z[:1])),
    "positions": (
        lambda z: F.cross_entropy(z.T.unsqueeze(0), Y.unsqueeze(0)),  # (batch, classes, positions)
        entropies(Z[:2]),
    ),
    "log-probabilities": (lambda z: F.nll_loss(z.log_softmax(1), Y), entropies(Z[:2])),
    "a sum": (lambda z: F.cross_entropy(z, Y.clamp(min=0), reduction="sum"), entropies(Z)),
    "binary logits": (
        lambda z: F.binary_cross_entropy_with_logits(z, (Z > 0).double()),
        -(BERNOULLI * BERNOULLI.log() + (1 - BERNOULLI) * (1 - BERNOULLI).log()),
    ),
    "binary probabilities": (
        lambda z: F.binary_cross_entropy(z.sigmoid(), (Z > 0).double()),
        -(BERNOULLI * BERNOULLI.log() + (1 - BERNOULLI) * (1 - BERNOULLI).log()),
    ),
    "two heads are averaged over all predictions": (
        lambda z: F.cross_entropy(z[:2], Y[:2]) + F.cross_entropy(z[2:], Y[:1]),
        entropies(Z),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_distribution_is_found_in_the_loss(name):
    loss, expected = CASES[name]
    value = lh.ConfidencePenalty().value(context_of(loss, Z.clone().requires_grad_()))
    assert value.item() == pytest.approx(-expected.mean().item(), rel=1e-9)


def test_certain_and_masked_classes_have_a_finite_gradient():
    z = torch.tensor([[1000.0, 0.0, -math.inf]], requires_grad=True)
    p = torch.tensor([0.0, 1.0], requires_grad=True)
    for leaf, loss in (
        (z, lambda z: F.cross_entropy(z, torch.tensor([0]))),
        (p, lambda p: F.binary_cross_entropy(p, torch.tensor([0.0, 1.0]))),
    ):
        value = lh.ConfidencePenalty().value(context_of(loss, leaf))
        (gradient,) = torch.autograd.grad(value, leaf)
        assert value.item() == pytest.approx(0, abs=1e-30)
        assert gradient.isfinite().all()


def test_returned_logits_serve_a_loss_of_ones_own():
    class Own(Classifier):
        def training_step(self, batch, batch_idx):
            logits = self.net(batch[0])
            return {"loss": logits.square().mean(), "logits": logits}

    module, seen = Own(middle=nn.LayerNorm(6)), Recorder()
    fit(module, [lh.HessianRegularizer(lh.ConfidencePenalty()), seen], data(8), max_steps=1)
    expected = entropies(Own(middle=nn.LayerNorm(6)).net(next(iter(data(8)))[0])).mean().item()
    assert seen.rows[0]["curvature/negative_entropy"] == pytest.approx(-expected, rel=1e-6)


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_returned_logits_without_classes_are_refused(shape):
    z = torch.ones(shape, requires_grad=True)
    with pytest.raises(ValueError, match=r"logits of shape \(n, classes\)"):
        lh.ConfidencePenalty().value(lh.StepContext(z.sum(), {"z": z}, outputs=(z,)))


@pytest.mark.parametrize("loss", [lambda z: F.mse_loss(z, Z), lambda z: z.square().mean()])
def test_a_loss_without_a_distribution_is_refused(loss):
    with pytest.raises(ValueError, match="needs a predicted distribution over classes"):
        lh.ConfidencePenalty().value(context_of(loss, Z.clone().requires_grad_()))
