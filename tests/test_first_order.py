"""The methods of the trace penalty that need ordinary passes, and the Gauss-Newton trace."""

import functools
import itertools
import random

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from nets import Classifier, MovingAverage, data, fit, smooth, task_loss, weights
from oracles import DIFFERENCES, by_differences, flat, gradient_of, relative_error
from recorders import LiveTensors, Recorder, added_gradient, all_warnings, gradient_of_step
from torch import nn
from torch.nn import functional as F
from torchmetrics import Accuracy

import lightning_hessian as lh
from lightning_hessian.curvature import ProbeSource
from lightning_hessian.curvature.displacement import GradientSum, displaced, loss_gradient

STRENGTH = 1e-2


def callback(method, strength=STRENGTH, **settings):
    return lh.HessianRegularizer(lh.HessianTrace(method=method, **settings), strength=strength)


def penalty_gradient(regularizer):
    """Of the first step."""
    return added_gradient(regularizer) / regularizer.strength


SETTINGS = [
    {},
    {"scale": "parameter"},
    {"probes": 3},
    {"keep": 0.5},
    {"keep": 0.5, "drop": "element"},
    {"parameters": "*.weight"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_central_difference_has_autograds_gradient_for_the_same_probe(settings):
    exact = penalty_gradient(callback("autograd", **settings))
    assert relative_error(penalty_gradient(callback("central_difference", **settings)), exact) < 1e-4


def test_two_passes_have_autograds_gradient_up_to_a_bias_of_order_s_squared():
    errors = []
    for strength in (4e-4, 1e-4, 2.5e-5):  # s is halved from one to the next
        exact = penalty_gradient(callback("autograd", strength))
        errors.append(relative_error(penalty_gradient(callback("two_pass", strength)), exact))
    assert errors[0] < 0.1
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(4, rel=0.1)


def test_two_passes_are_the_mean_of_the_losses_at_both_ends():
    module, seen = smooth(), Recorder()
    gradient = gradient_of_step(smooth(), [callback("two_pass")])
    fit(smooth(), [callback("two_pass"), seen], max_steps=1)
    batch = next(iter(data()))
    theta, s = nn.utils.parameters_to_vector(module.parameters()).detach(), (2 * STRENGTH) ** 0.5
    v = ProbeSource(0).draw(len(theta), 0, dtype=torch.float64)
    gradients, losses = [], []
    for sign in (1, -1):
        nn.utils.vector_to_parameters(theta + sign * s * v, module.parameters())
        losses.append(task_loss(module, batch))
        gradients.append(gradient_of(losses[-1], module.parameters()))
    torch.testing.assert_close(gradient, (gradients[0] + gradients[1]) / 2, rtol=1e-12, atol=1e-14)
    estimate = ((gradients[0] - gradients[1]) @ v / (2 * s)).item()
    assert seen.rows[0]["curvature/hessian_trace"] == pytest.approx(estimate, rel=1e-6)
    assert seen.rows[0]["train/penalty"] == pytest.approx(STRENGTH * estimate, rel=1e-6)
    # The step's own log is of its run for real, at theta + s v.
    assert seen.rows[0]["train/loss"] == pytest.approx(losses[0].item(), rel=1e-6)


class Everything(Classifier):
    """Dropout, batch norm, a metric, logs; counts its calls and may fail at one of them."""

    def __init__(self, fails_at=None):
        super().__init__(middle=nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5)))
        self.accuracy = Accuracy("multiclass", num_classes=3)
        self.fails_at = fails_at
        self.masks = []
        self.calls = 0
        self.net[1][1].register_forward_hook(lambda layer, args, output: self.masks.append(output == 0))

    def training_step(self, batch, batch_idx):
        self.calls += 1
        logits = self.net(batch[0])
        self.accuracy(logits, batch[1])
        self.log("train/accuracy", self.accuracy, on_step=False, on_epoch=True)
        if self.calls == self.fails_at:
            raise KeyError("the step failed")
        loss = F.cross_entropy(logits, batch[1])
        self.log("train/loss", loss)
        return {"loss": loss, "logits": logits}


@pytest.mark.parametrize("method", DIFFERENCES)
def test_the_step_counts_once(method):
    module, plain, hooks = Everything(), Everything(), []

    class Hooks(L.Callback):
        def on_train_batch_start(self, *_):
            hooks.append("start")

        def on_before_backward(self, *_):
            hooks.append("backward")

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            hooks.append("end")
            assert set(outputs) == {"loss", "logits"}

    fit(module, [callback(method, 1e-4), Hooks()], max_steps=1, limit_train_batches=1)
    torch.manual_seed(0)
    fit(plain, max_steps=1, limit_train_batches=1)
    assert hooks == ["start", "backward", "end"]
    # One more on the first step, to see that it can be run again.
    assert module.calls == 1 + (2 if method == "two_pass" else 3)
    assert all(torch.equal(mask, module.masks[0]) for mask in module.masks)
    assert module.accuracy._update_count == plain.accuracy._update_count
    assert module.net[1][0].num_batches_tracked == 1


@pytest.mark.parametrize("method", DIFFERENCES)
def test_the_random_stream_goes_on_as_without_the_callback(method):
    after = []
    for callbacks in ([], [callback(method, 1e-4)]):
        torch.manual_seed(0)
        fit(Everything(), callbacks, max_steps=3)
        after.append(torch.rand(1).item())
    assert after[0] == after[1]


@pytest.mark.parametrize("method", DIFFERENCES)
@pytest.mark.parametrize("call", [1, 2])
def test_a_failing_run_leaves_everything_as_found(method, call):
    module = Everything(fails_at=call)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    torch.manual_seed(5)
    random = torch.get_rng_state()

    class Found(L.Callback):
        def on_exception(self, trainer, module, exception):
            assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
            assert torch.equal(torch.get_rng_state(), random)
            assert all(parameter.grad is None for parameter in module.parameters())

        def on_train_batch_start(self, *_):
            torch.set_rng_state(random)

    with pytest.raises(KeyError, match="the step failed"):
        fit(module, [callback(method), Found()])
    assert module.training_step.__func__ is Everything.training_step
    assert "log" not in module.__dict__


@pytest.mark.parametrize("method", ["autograd", "gauss_newton", *DIFFERENCES])
def test_memory_is_flat_and_parameters_do_not_drift(method):
    module = smooth(dtype=torch.float32, lr=0.0)
    before, alive = weights(module), LiveTensors((100, 300), collect=True)
    fit(module, [callback(method, 1e-9), alive], data(dtype=torch.float32), max_steps=300, max_epochs=-1)
    assert torch.equal(weights(module), before)
    assert alive.counts[1] <= alive.counts[0] + 2


@pytest.mark.parametrize("method", DIFFERENCES)
def test_accumulation_averages_the_micro_batches(method):
    accumulated = gradient_of_step(smooth(), [callback(method)], data(8), accumulate_grad_batches=2)
    singles = [
        by_differences(method, smooth(), functools.partial(task_loss, batch=batch), STRENGTH, micro_batch=k)
        for k, batch in enumerate(list(data(8))[:2])
    ]
    torch.testing.assert_close(accumulated, torch.stack(singles).mean(dim=0), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", DIFFERENCES)
def test_with_other_penalties_each_sees_the_task_loss_alone(method):
    both = [callback(method), lh.HessianRegularizer(lh.InputGradientNorm(), strength=0.1)]
    alone = [added_gradient(one) for one in both]
    torch.testing.assert_close(added_gradient(*both), alone[0] + alone[1], rtol=1e-6, atol=1e-8)


def test_two_penalties_of_two_passes():
    first, second = callback("two_pass", parameters="*.weight"), callback("two_pass", 1e-3)
    alone = [added_gradient(one) for one in (first, second)]
    torch.testing.assert_close(added_gradient(first, second), alone[0] + alone[1], rtol=1e-9, atol=1e-12)


def test_one_tensor_may_be_the_gradient_of_several_parameters():
    a, b = (torch.ones(3, requires_grad=True) for _ in range(2))
    total = GradientSum([a, b])
    for weight in (0.5, 0.25):
        loss = ((a + b) ** 2).sum()
        total.add(weight, loss.detach(), loss_gradient(loss, [a, b]))
    total.loss().backward()
    for tensor in (a, b):
        torch.testing.assert_close(tensor.grad, torch.full((3,), 0.75 * 4.0))


def test_parameters_that_share_their_memory_are_moved_once():
    a = nn.Parameter(torch.zeros(2))
    b = nn.Parameter(a.data)
    with displaced([a, b]) as move:
        move([torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])], 1.0)
        assert a.tolist() == b.tolist() == [0, 1]
    assert a.tolist() == [0, 0]


@pytest.mark.parametrize("method", DIFFERENCES)
def test_a_parameter_without_entries_is_left_out(method):
    module = smooth()
    module.nothing = nn.Parameter(torch.empty(0, dtype=torch.float64))
    fit(module, [callback(method)], max_steps=1)
    assert torch.equal(weights(module), trained_without(method))


def trained_without(method):
    module = smooth()
    fit(module, [callback(method)], max_steps=1)
    return weights(module)


def test_the_loss_can_be_differentiated_once():
    a = torch.ones(3, requires_grad=True)
    total = GradientSum([a])
    total.add(1.0, a.sum().detach(), loss_gradient(a.sum(), [a]))
    loss = total.loss()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="gone after the first backward"):
        loss.backward()


def penalized_step(module, method, **settings):
    fit(module, [callback(method, 1e-3)] if method else [], max_steps=1, limit_train_batches=1, **settings)
    return module


@pytest.mark.parametrize("method", DIFFERENCES)
def test_hooks_on_parameters_see_the_sum_once(method):
    seen = []
    module = smooth()
    module.net[0].weight.register_hook(lambda gradient: seen.append(1) or 0.1 * gradient)
    module.net[0].weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(2))
    gradient = gradient_of_step(module, [callback(method)])
    expected = gradient_of_step(smooth(), [callback(method)])
    size = module.net[0].bias.numel() + module.net[0].weight.numel()
    torch.testing.assert_close(gradient[: module.net[0].weight.numel()], 0.1 * expected[: module.net[0].weight.numel()])
    torch.testing.assert_close(gradient[size:], expected[size:])
    assert seen == [1, 2]


@pytest.mark.parametrize("method", DIFFERENCES)
def test_random_numbers_of_numpy_and_python_are_the_same_in_every_pass(method):
    class Mixup(Classifier):
        def training_step(self, batch, batch_idx):
            self.shares = [*getattr(self, "shares", []), np.random.beta(1, 1) + random.random()]
            return F.cross_entropy(self.net(self.shares[-1] * batch[0]), batch[1])

    after = []
    for regularized in (None, method):
        np.random.seed(0)
        random.seed(0)
        module = penalized_step(Mixup(middle=nn.LayerNorm(6)), regularized)
        assert len(set(module.shares)) == 1
        after.append((np.random.rand(), random.random()))
    assert after[0] == after[1]


def test_a_step_that_changes_parameters_is_refused():
    with pytest.raises(MisconfigurationException, match=r"changes the parameter 'teacher.weight'.*on_train_batch_end"):
        penalized_step(MovingAverage(middle=nn.LayerNorm(6)), "two_pass")


def test_a_metric_that_is_computed_and_reset_inside_the_step():
    class Computes(Everything):
        def training_step(self, batch, batch_idx):
            self.accuracy.update(self.net(batch[0]), batch[1])
            self.values = [*getattr(self, "values", []), float(self.accuracy.compute())]
            self.accuracy.reset()
            return F.cross_entropy(self.net(batch[0]), batch[1])

    module = penalized_step(Computes(), "two_pass")
    assert len(module.values) == 3  # one to see that the step can be run again
    assert module.values[0] >= 0  # of the run for real


class Partly(lh.HessianRegularizationMixin, Classifier):
    """A part of the loss is computed before the regularized one."""

    shared = False

    def training_step(self, batch, batch_idx):
        hidden = self.net[0](batch[0])
        aside = hidden.square().mean()

        def loss():
            return F.cross_entropy(self.net[1:](hidden if self.shared else self.net[0](batch[0])), batch[1])

        return aside + self.regularized(loss)


@pytest.mark.parametrize("method", DIFFERENCES)
def test_graphs_made_before_keep_their_parameters(method):
    module = Partly(middle=nn.LayerNorm(6))
    module.regularizer = callback(method)
    gradient = gradient_of_step(module)
    plain = smooth()
    plain.net[0](next(iter(data()))[0]).square().mean().backward()
    aside = flat([torch.zeros_like(p) if p.grad is None else p.grad for p in plain.parameters()])
    torch.testing.assert_close(gradient, gradient_of_step(smooth(), [callback(method)]) + aside)


def test_a_forward_pass_that_begins_outside_is_refused():
    module = Partly(middle=nn.LayerNorm(6))
    module.shared, module.regularizer = True, callback("two_pass")
    with pytest.raises(MisconfigurationException, match="Compute the whole forward pass inside"):
        gradient_of_step(module)


def test_sparse_gradients_are_refused_by_name():
    class Sparse(Classifier):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(3, 3, sparse=True)

    with pytest.raises(MisconfigurationException, match="'embedding' has sparse gradients"):
        penalized_step(Sparse(), "two_pass")


def warnings_of(module, regularizer, **settings):
    with all_warnings() as told:
        fit(module, [regularizer], **settings)
    return told


@pytest.mark.parametrize("compiled", [False, True])
def test_kinks_are_warned_of_once_for_central_differences(compiled):
    for activation, times in ((nn.ReLU(), 1), (nn.SiLU(), 0)):
        module = Classifier(middle=activation)
        if compiled:
            module.net.compile(backend="aot_eager")
        messages = warnings_of(module, callback("central_difference"))
        assert sum("the loss has kinks" in message for message in messages) == times
        assert not any(
            "kinks" in message for message in warnings_of(Classifier(middle=activation), callback("two_pass"))
        )


def test_every_penalty_is_looked_at():
    """What holds for the second penalty is said of it, though the first was looked at before."""
    short, long = lh.HessianTrace(method="central_difference", step=1e-9), lh.HessianTrace(method="central_difference")
    messages = warnings_of(
        Classifier(middle=nn.ReLU(), dtype=torch.float32),
        lh.HessianRegularizer([long, short], 1e-3),
        loader=data(dtype=torch.float32),
    )
    assert sum("the loss has kinks" in message for message in messages) == 2
    assert sum("its value is rounding" in message for message in messages) == 1


def test_a_step_that_the_precision_does_not_see_is_warned_of_once():
    for strength, times in ((1e-12, 1), (1e-3, 0)):
        module = smooth(dtype=torch.float32)
        messages = warnings_of(module, callback("two_pass", strength), loader=data(dtype=torch.float32),
                               precision="bf16-mixed")  # fmt: skip
        assert sum("its value is rounding" in message for message in messages) == times


def test_verify_has_nothing_to_verify():
    with pytest.raises(ValueError, match="no higher derivative to verify"):
        lh.verify(smooth(), next(iter(data())), lh.HessianTrace(method="two_pass"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "two_pass", "clamp": 0.0}, "its loss is a combination of passes"),
        ({"method": "two_pass", "step": 0.1}, "is only for method='central_difference'"),
        ({"method": "gauss_newton", "keep": 0.5}, "the probes of gauss_newton are over the outputs"),
        ({"method": "gauss_newton", "probes": -1}, "is for method='taylor'"),
        ({"method": "three_pass"}, "is unknown. Choose one of taylor, autograd, two_pass"),
        ({"scale": "filter"}, "is unknown. Choose one of none, parameter"),
        ({"method": "central_difference", "step": 0.0}, "must be a positive number"),
    ],
)
def test_bad_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        lh.HessianTrace(**settings)
