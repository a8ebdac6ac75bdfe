"""Arguments of the wrong kind, and models that are not ready, get a sentence that says what to do."""

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from nets import Classifier, data, exponential, fit
from torch import nn

import lightning_hessian as lh
from lightning_hessian.curvature import select_parameters


@pytest.mark.parametrize("which", [3, ["0.*", 3], nn.Linear, {"0.*"}], ids=str)
@pytest.mark.parametrize("takes", [lh.HessianTrace, lh.HessianNorm, lh.CurvatureMonitor])
def test_what_chooses_no_parameters_is_refused_at_once(takes, which):
    with pytest.raises(ValueError, match=r"parameters=.* chooses none\. Pass a glob such as"):
        takes(parameters=which)


@pytest.mark.parametrize("attacks", [lh.PGD, [lh.PGD(0.1), lh.FGSM]], ids=str)
def test_an_attack_that_is_a_class_is_refused(attacks):
    with pytest.raises(ValueError, match=r"is a class. Pass an object with the radius .*, such as (PGD|FGSM)\(0\.1\)"):
        lh.AdversarialAccuracy(attacks)


@pytest.mark.parametrize(
    "call",
    [
        lambda: lh.HessianRegularizer(lh.HessianTrace),
        lambda: lh.HessianRegularizer([lh.HessianTrace(), lh.JacobianNorm]),
        lambda: lh.suggest_strength(nn.Linear(1, 1), [torch.ones(1, 1)], lh.HessianTrace, loss=exponential),
        lambda: lh.verify(nn.Linear(1, 1), torch.ones(1, 1), lh.HessianTrace, loss=exponential),
    ],
)
def test_a_penalty_that_is_a_class_is_refused(call):
    with pytest.raises(ValueError, match=r"is not a Penalty. Pass an object such as HessianTrace\(\)"):
        call()


def lazy():
    module = Classifier()
    module.net[3] = nn.LazyLinear(3, dtype=torch.float64)
    return module


BATCH = next(iter(data()))


@pytest.mark.parametrize(
    "call",
    [
        lambda module: lh.suggest_strength(module, [BATCH], lh.HessianTrace()),
        lambda module: lh.suggest_strength(module, [BATCH], lh.InputGradientNorm()),
        lambda module: lh.verify(module, BATCH, lh.HessianTrace()),
        lambda module: fit(module, [lh.CurvatureMonitor(figures=False)]),
        lambda module: fit(module, [lh.HessianRegularizer(lh.HessianTrace())]),
        lambda module: fit(module, [lh.HessianRegularizer(lh.HessianTrace(method="two_pass", parameters="net.0.*"))]),
        lambda module: fit(module, [lh.HessianRegularizer(lh.InputHessianNorm())]),
        lambda module: select_parameters(dict(module.named_parameters()), "net.0.*"),
    ],
)
def test_lazy_layers_are_refused_with_one_sentence(call):
    message = r"'net\.3\.weight' belongs to a lazy layer.*Run a batch through the model first"
    with pytest.raises((ValueError, MisconfigurationException), match=message):
        call(lazy())


def test_a_lazy_layer_that_has_seen_a_batch_is_like_any_other():
    module = lazy()
    module.net(BATCH[0])
    assert float(lh.suggest_strength(module, [BATCH], lh.HessianTrace())) > 0
