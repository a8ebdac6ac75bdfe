"""Penalties on the inputs of any LightningModule: where the inputs are found, and what a second run leaves alone."""

import copy
import dataclasses
import warnings
from collections import namedtuple
from typing import NamedTuple

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from nets import CPU, Classifier, context_of_inputs, data, fit, plain_loop, weights
from oracles import relative_error
from recorders import LiveTensors, Recorder, all_warnings, no_garbage_collector
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

import lightning_hessian as lh
from lightning_hessian.regularization.input_runs import PenaltyRuns, step_for

PENALTIES = {
    "hessian": lambda **place: lh.InputHessianNorm(**place),
    "lanczos": lambda **place: lh.InputHessianNorm(3, "lanczos", **place),
    "finite differences": lambda **place: lh.InputHessianNorm(method="finite_difference", **place),
    "gradient": lambda **place: lh.InputGradientNorm(**place),
    "jacobian": lambda **place: lh.JacobianNorm(projections=-1, **place),
}
STRENGTH = 0.05
each_penalty = pytest.mark.parametrize("name", PENALTIES)


def without_norm(**settings):
    return Classifier(middle=nn.Identity(), **settings)


def callback(penalty, **settings):
    return lh.HessianRegularizer(penalty, **{"strength": STRENGTH, **settings})


def by_hand(module, penalty, steps=2, **settings):
    """Training on loss + strength * penalty in a plain loop."""

    def loss_of(module, x, y, step):
        context = context_of_inputs(module, x, y, **settings)
        return context.loss + STRENGTH * penalty(context)

    return plain_loop(module, loss_of, list(data())[:steps])


def runs_of(module, batch, penalty):
    return PenaltyRuns(
        step_for([penalty], module, lambda batch: module.training_step(batch, 0), batch), [penalty], [lh.ProbeSource()]
    )


def quiet(module):
    module.log = lambda *args, **kwargs: None
    return module


@each_penalty
def test_training_is_that_of_the_loop_by_hand(name):
    module = without_norm()
    fit(module, [callback(PENALTIES[name]())], max_steps=2)
    torch.testing.assert_close(weights(module), by_hand(without_norm(), PENALTIES[name]()), rtol=1e-9, atol=1e-9)
    assert not torch.equal(weights(module), by_hand(without_norm(), lambda context: 0 * context.loss))


@each_penalty
def test_logs_hold_the_value_and_what_was_added_and_the_task_loss(name):
    module, recorder = without_norm(), Recorder()
    fit(module, [callback(PENALTIES[name]()), recorder], max_steps=1)
    row, penalty = recorder.rows[0], PENALTIES[name]()
    fresh, (x, y) = without_norm(), next(iter(data()))
    context = context_of_inputs(fresh, x, y)
    assert row[f"curvature/{penalty.name}"] == pytest.approx(penalty.value(context).item(), rel=1e-6)
    assert row["train/penalty"] == pytest.approx(STRENGTH * row[f"curvature/{penalty.name}"], rel=1e-6)
    assert row["train/loss"] == pytest.approx(context.loss.item(), rel=1e-6)


@dataclasses.dataclass(frozen=True)
class Batch:
    ids: torch.Tensor
    image: torch.Tensor
    label: torch.Tensor


Named = namedtuple("Named", "image label")


class Typed(NamedTuple):
    label: torch.Tensor
    image: torch.Tensor


def batches(x, y):
    return {
        "tuple": ((x, y), None, lambda b: b),
        "list, by index": ([y, x], 1, lambda b: (b[1], b[0])),
        "dict": ({"label": y, "image": x}, None, lambda b: (b["image"], b["label"])),
        "dict, by key": ({"mask": torch.ones(8, 4).double(), "image": x, "label": y}, "image",
                         lambda b: (b["image"] * b["mask"], b["label"])),
        "nested": (({"image": x}, [y]), None, lambda b: (b[0]["image"], b[1][0])),
        "nested, by function": (({"mask": torch.ones(8, 4).double(), "image": x}, [y]), lambda b: b[0]["image"],
                                lambda b: (b[0]["image"] * b[0]["mask"], b[1][0])),
        "dataclass": (Batch(torch.arange(8), x, y), None, lambda b: (b.image, b.label)),
        "dataclass, by attribute": (Batch(torch.arange(8), x, y), "image", lambda b: (b.image, b.label)),
        "named tuple": (Named(x, y), "image", lambda b: (b.image, b.label)),
        "typed tuple": (Typed(y, x), None, lambda b: (b.image, b.label)),
    }  # fmt: skip


@pytest.mark.parametrize("shape", batches(*[torch.ones(8)] * 2))
@pytest.mark.parametrize("name", ["hessian", "finite differences"])
def test_inputs_are_found_in_any_batch(name, shape):
    x, y = next(iter(data()))
    batch, inputs, read = batches(x, y)[shape]

    class Reads(Classifier):
        def training_step(self, batch, batch_idx):
            image, label = read(batch)
            return F.cross_entropy(self.net(image), label)

    module = Reads(middle=nn.Identity())
    penalty = PENALTIES[name](inputs=inputs)
    value = penalty.value(runs_of(module, batch, penalty).context(penalty))
    expected = PENALTIES[name]().value(context_of_inputs(module, x, y))
    assert value.item() == pytest.approx(expected.item(), rel=1e-9)
    assert not x.requires_grad  # the user's own tensor is as it was


def test_a_step_that_changes_its_batch_in_place_works():
    class InPlace(Classifier):
        def training_step(self, batch, batch_idx):
            batch[0].mul_(2)
            return F.cross_entropy(self.net(batch[0]), batch[1])

    module = InPlace(middle=nn.Identity())
    fit(module, [callback(lh.InputHessianNorm())], max_steps=1)
    expected = by_hand(without_norm(), lh.InputHessianNorm(), steps=1, run=lambda module, x: module.net(2 * x))
    torch.testing.assert_close(weights(module), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("middle", [nn.BatchNorm1d(6), nn.Identity()], ids=["batch norm", "none"])
@pytest.mark.parametrize("layer", [None, "net.0"])
@pytest.mark.parametrize("name", ["hessian", "finite differences"])
def test_every_run_gets_the_batch_as_it_was(name, layer, middle):
    class Changes(Classifier):
        def training_step(self, batch, batch_idx):
            batch["x"] = batch["x"] / 2
            batch["x"].mul_(3)
            return F.cross_entropy(self.net(batch["x"]), batch.pop("y"))

    class Leaves(Classifier):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch["x"] * 1.5), batch["y"])

    x, y = next(iter(data()))
    penalty = PENALTIES[name](layer=layer)
    values = [
        penalty.value(
            runs_of(kind(middle=copy.deepcopy(middle)), {"x": x.clone(), "y": y}, penalty).context(penalty)
        ).item()
        for kind in (Changes, Leaves)
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-9)
    assert values[0] > 0


class Tokens(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(10, 4)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        self.double()

    def training_step(self, batch, batch_idx):
        ids, y = batch
        return F.cross_entropy(self.net(self.embedding(ids)).mean(1), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def tokens():
    ids = torch.randint(0, 10, (16, 5), generator=torch.Generator().manual_seed(0))
    return DataLoader(torch.utils.data.TensorDataset(ids, torch.arange(16) % 3), 8)


def test_token_ids_give_an_error_that_names_the_embedding_layer():
    message = r"no floating-point tensor.*int64 \(8, 5\).*layer='<name of the embedding layer>'.*'embedding'"
    with pytest.raises(MisconfigurationException, match=message):
        fit(Tokens(), [callback(lh.InputHessianNorm())], tokens())


@pytest.mark.parametrize("name", PENALTIES)
def test_floating_point_targets_are_not_taken_for_the_input(name):
    class Regression(Tokens):
        def training_step(self, batch, batch_idx):
            ids, y = batch
            return F.mse_loss(self.net(self.embedding(ids)).mean(1), y)

    ids = next(iter(tokens()))[0]
    loader = DataLoader(torch.utils.data.TensorDataset(ids, torch.randn(8, 3, dtype=torch.float64)), 8)
    message = r"do not depend on the inputs.*float64 \(8, 3\).*targets.*layer='<name of the embedding layer>'"
    with pytest.raises(MisconfigurationException, match=message):
        fit(Regression(), [callback(PENALTIES[name]())], loader)


class RootOfTheMean(Classifier):
    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.net(batch[0]), F.one_hot(batch[1], 3).double()).sqrt()


class Mixup(Classifier):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(0.7 * x + 0.3 * x.roll(1, 0)), y)


def soft_cross_entropy(logits, targets):
    """As timm's: PyTorch's loss functions are not called."""
    return -(targets * logits.log_softmax(-1)).sum(-1).mean()


class UnseenMixup(Classifier):
    def training_step(self, batch, batch_idx):
        x, y = batch[0], F.one_hot(batch[1], 3).double()
        mixed = [0.7 * t + 0.3 * t.roll(1, 0) for t in (x, y)]
        return soft_cross_entropy(self.net(mixed[0]), mixed[1])


class Standardized(UnseenMixup):
    """Adding a constant to the inputs changes nothing."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.net.insert(0, nn.LayerNorm(4).double())


class Neighbors(Classifier):
    """Nodes of a graph, whose features are summed over their neighbors."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return soft_cross_entropy(self.net(x + x.roll(1, 0) + x.roll(-1, 0)), F.one_hot(y, 3).double())


class Unseen(Classifier):
    def training_step(self, batch, batch_idx):
        return soft_cross_entropy(self.net(batch[0]), F.one_hot(batch[1], 3).double())


@each_penalty
def test_a_first_batch_of_one_sample(name):
    loader = DataLoader(data().dataset, 1)
    fit(without_norm(), [callback(PENALTIES[name]())], loader, max_steps=1)


COUPLED = [
    (RootOfTheMean, 1),
    (Mixup, 1),
    (Classifier, 0),
    (UnseenMixup, 1),
    (Standardized, 1),
    (Neighbors, 1),
    (Unseen, 0),
]


@pytest.mark.parametrize(("kind", "times"), COUPLED)
def test_coupled_samples_are_warned_of_once(kind, times):
    with all_warnings() as told:
        fit(kind(middle=nn.Identity()), [callback(lh.InputGradientNorm())])
    assert sum("The samples of a batch are coupled" in message for message in told) == times


def test_the_second_pass_is_explained_for_every_penalty():
    with all_warnings() as told:
        fit(Classifier(), [callback(lh.InputGradientNorm()), callback(lh.JacobianNorm())])
    for penalty in (lh.InputGradientNorm, lh.JacobianNorm):
        assert sum(f"{penalty.name} is computed in a second forward pass" in message for message in told) == 1


def test_a_sum_is_understood_in_bfloat16():
    class Summed(Classifier):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1], reduction="sum") / 8

    seen = []
    for kind in (Summed, Classifier):
        module = kind(middle=nn.Identity(), dtype=torch.float32)
        trainer = fit(module, [callback(lh.InputGradientNorm())], data(dtype=torch.float32), max_steps=1,
                      precision="bf16-mixed")  # fmt: skip
        seen.append(float(trainer.logged_metrics["curvature/input_gradient_norm"]))
    assert seen[0] == pytest.approx(seen[1], rel=1e-2)


@pytest.mark.parametrize("name", [name for name in PENALTIES if name != "finite differences"])
def test_embeddings_are_penalized_by_naming_their_layer(name):
    module = Tokens()
    fit(module, [callback(PENALTIES[name](layer="embedding"))], tokens(), max_steps=1)
    reference = Tokens()
    optimizer = reference.configure_optimizers()
    ids, y = next(iter(tokens()))
    embedded = reference.embedding(ids)
    seen = lh.StepContext.evaluate(
        lambda e: F.cross_entropy(reference.net(e).mean(1), y), embedded, dict(reference.named_parameters())
    )
    gradients = torch.autograd.grad(
        STRENGTH * PENALTIES[name]()(seen), [*reference.net.parameters(), seen.inputs[0]], allow_unused=True,
        materialize_grads=True,
    )  # fmt: skip
    optimizer.zero_grad()
    reference.training_step((ids, y), 0).backward()
    embedded.backward(gradients[-1])
    for parameter, gradient in zip(reference.net.parameters(), gradients, strict=False):
        parameter.grad += gradient
    optimizer.step()
    torch.testing.assert_close(weights(module), weights(reference), rtol=1e-8, atol=1e-9)


def test_embeddings_are_penalized_by_finite_differences():
    by = {}
    for method in ("autograd", "finite_difference"):
        by[method] = Tokens()
        penalty = lh.InputHessianNorm(1000, method=method, layer="embedding", step=1e-4)
        fit(by[method], [callback(penalty)], tokens(), max_steps=1)
    plain = Tokens()
    fit(plain, loader=tokens(), max_steps=1)
    moved = [weights(by[method]) - weights(plain) for method in by]
    assert relative_error(*moved) < 1e-2


def test_the_layer_must_exist_and_be_called():
    with pytest.raises(MisconfigurationException, match=r"layer='embeding' is not a layer.*Near names: embedding"):
        fit(Tokens(), [callback(lh.InputHessianNorm(layer="embeding"))], tokens())
    module = Tokens()
    module.spare = nn.Linear(1, 1).double()
    with pytest.raises(MisconfigurationException, match="did not call the layer 'spare'"):
        fit(module, [callback(lh.InputHessianNorm(layer="spare"))], tokens())


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (7, "inputs=7 is not in the batch, which is a list of 2 parts"),
        ("image", "inputs='image' is not in the batch"),
        (1, "int64.*which has no derivatives"),
        (lambda batch: batch[0] * 1, "not one of the batch's own"),
        ([], "chooses no tensor"),
    ],
)
def test_inputs_that_cannot_be_found(inputs, message):
    with pytest.raises(MisconfigurationException, match=message):
        fit(without_norm(), [callback(lh.InputHessianNorm(inputs=inputs))])


class Pair(Classifier):
    """Two inputs."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(torch.cat([batch["left"], batch["right"]], 1)), batch["y"])


@each_penalty
def test_several_inputs_together(name):
    x, y = next(iter(data()))
    batch = {"left": x[:, :1].contiguous(), "right": x[:, 1:].contiguous(), "y": y}
    module = Pair(middle=nn.Identity())
    for inputs in (["left", "right"], lambda batch: (batch["left"], batch["right"])):
        penalty = PENALTIES[name](inputs=inputs)
        value = penalty.value(runs_of(module, batch, penalty).context(penalty))
        whole = context_of_inputs(module, x, y)
        assert value.item() == pytest.approx(PENALTIES[name]().value(whole).item(), rel=1e-6)


def sample_values(module, x, y):
    """Each sample's ||H_i v_i||, ||grad l_i||^2 and ||J_i||^2, from the run that the penalties look at."""
    penalty = lh.InputHessianNorm()
    context = runs_of(module, (x, y), penalty).context(penalty)
    hessians = lh.curvature.SampleHessians(context.summed_loss, context.inputs)
    v = lh.curvature.power_iteration(hessians.matvec, hessians.gradient.detach(), 1)
    (logits,), inputs = context.outputs, context.inputs
    jacobians = [torch.autograd.grad(z.sum(), inputs, retain_graph=True)[0] for z in logits.unbind(1)]
    squares = torch.stack([jacobian.square().sum(1) for jacobian in jacobians]).sum(0)
    return torch.stack([hessians.matvec(v).norm(dim=1), hessians.gradient.detach().square().sum(1), squares])


@each_penalty
def test_batch_norm_lets_no_sample_touch_another(name):
    """With x_j changed, what sample i adds to the value stays: the value minus that of the others."""
    penalty = PENALTIES[name]()

    def value(x, y):
        module = quiet(Classifier())
        module.train()
        with torch.no_grad():
            module.net[1].running_mean.normal_(generator=torch.Generator().manual_seed(0))
        runs = runs_of(module, (x, y), penalty)
        assert list(runs.batch_norms) == ["net.1"]
        return len(x) * penalty.value(runs.context(penalty)).item()

    x, y = next(iter(data()))
    changed = x.clone()
    changed[3] = changed[3] + 1
    alone = [value(torch.stack([x[i], x[i]]), y[[i, i]]) / 2 for i in (0, 3)]
    # f(x) = sum_i f_i(x_i): the difference that sample 3 makes does not depend on sample 0, and the parts add up.
    other = x.clone()
    other[0] = other[0] - 2
    both = other.clone()
    both[3] = both[3] + 1
    assert value(changed, y) - value(x, y) == pytest.approx(value(both, y) - value(other, y), abs=1e-9, rel=1e-9)
    pair = value(x[[0, 3]], y[[0, 3]])
    assert pair == pytest.approx(sum(alone), rel=1e-9)


@pytest.mark.parametrize("middle", [nn.BatchNorm1d(6), nn.Identity()], ids=["batch norm", "none"])
def test_no_value_of_a_sample_changes_with_another(middle):
    x, y = next(iter(data()))
    changed = x.clone()
    changed[3] += 1
    first, second = (sample_values(quiet(Classifier(middle=copy.deepcopy(middle))), z, y) for z in (x, changed))
    rest = [i for i in range(8) if i != 3]
    torch.testing.assert_close(first[:, rest], second[:, rest], rtol=0, atol=1e-12)
    assert not torch.isclose(first[:, 3], second[:, 3]).any()


@each_penalty
def test_batch_norm_is_said_once_and_its_statistics_move_once(name):
    module = Classifier()
    with all_warnings() as told:
        fit(module, [callback(PENALTIES[name](), strength=1e-30)], max_steps=3)
    said = [message for message in told if "couples the samples" in message]
    assert len(said) == 1
    assert "net.1" in said[0]
    plain = Classifier()
    fit(plain, max_steps=3)
    assert int(module.net[1].num_batches_tracked) == 3
    torch.testing.assert_close(weights(module), weights(plain), rtol=1e-9, atol=1e-12)
    assert module.net[1].training


def test_batch_norm_without_running_statistics_is_refused_by_name():
    module = Classifier(middle=nn.BatchNorm1d(6, track_running_stats=False))
    with pytest.raises(MisconfigurationException, match=r"'net\.1' has no running statistics"):
        fit(module, [callback(lh.InputHessianNorm())])


class Counting(Classifier):
    """Metrics, logs and dropout."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.accuracy = MulticlassAccuracy(3, average="micro")
        self.mean = MeanMetric()
        self.dropout = nn.Dropout(0.5)
        self.masks = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        hidden = self.net[:3](x)
        dropped = self.dropout(torch.ones_like(hidden))
        self.masks.append(dropped.detach())
        logits = self.net[3](hidden * dropped)
        loss = F.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.mean.update(len(y))
        self.log("train/accuracy", self.accuracy)
        self.log("count", 1.0, on_step=False, on_epoch=True, reduce_fx="sum", batch_size=1)
        return loss


@pytest.mark.parametrize("name", ["hessian", "finite differences"])
@pytest.mark.parametrize("middle", [nn.BatchNorm1d(6), nn.Identity()], ids=["batch norm", "none"])
def test_further_runs_feed_metrics_and_logs_once_and_drop_the_same(name, middle):
    module = Counting(middle=middle)
    torch.manual_seed(5)
    trainer = fit(module, [callback(PENALTIES[name]())], max_steps=2, limit_train_batches=2)
    after = torch.rand(1)
    assert module.mean._update_count == 2
    assert float(module.mean.compute()) == 8
    assert float(trainer.callback_metrics["count"]) == 2
    # One more on the first step where there are further runs, to see that it can be run again.
    once = int((name, type(middle)) != ("hessian", nn.Identity))
    runs = (len(module.masks) - once) // 2
    assert (
        runs
        == {("hessian", 0): 1, ("hessian", 1): 2, ("finite differences", 0): 4, ("finite differences", 1): 5}[
            name, int(isinstance(middle, nn.BatchNorm1d))
        ]
    )
    for masks in (module.masks[: runs + once], module.masks[runs + once :]):
        assert all(torch.equal(mask, masks[0]) for mask in masks)
    assert not torch.equal(module.masks[0], module.masks[-1])
    # The user's random stream is as without the penalty.
    plain = Counting(middle=nn.Identity())
    torch.manual_seed(5)
    fit(plain, max_steps=2, limit_train_batches=2)
    assert torch.equal(after, torch.rand(1))


def test_several_penalties_share_one_forward_and_add_up():
    calls = []

    class Counted(Classifier):
        def training_step(self, batch, batch_idx):
            calls.append(1)
            return super().training_step(batch, batch_idx)

    penalties = [lh.InputGradientNorm(), lh.InputHessianNorm(), lh.HessianTrace(method="autograd")]
    strengths = [0.1, 0.2, 0.01]
    one, several, recorder = Counted(middle=nn.Identity()), without_norm(), Recorder()
    fit(one, [lh.HessianRegularizer(penalties, strength=strengths), recorder], max_steps=2)
    assert len(calls) == 2
    fit(several, [lh.HessianRegularizer(p, strength=s) for p, s in zip(penalties, strengths, strict=True)], max_steps=2)
    assert torch.equal(weights(one), weights(several))
    row = recorder.rows[0]
    added = sum(s * row[f"curvature/{p.name}"] for p, s in zip(penalties, strengths, strict=True))
    assert row["train/penalty"] == pytest.approx(added, rel=1e-6)


def test_a_penalty_keeps_its_name_whichever_others_act():
    recorder = Recorder()
    penalties = [callback(lh.InputGradientNorm(), every_n_steps=2), callback(lh.InputGradientNorm())]
    fit(without_norm(lr=0.0), [*penalties, recorder], DataLoader(data().dataset, 48), max_epochs=2)
    first, second = recorder.rows
    assert second["curvature/input_gradient_norm_2"] == pytest.approx(first["curvature/input_gradient_norm_2"])


def test_with_a_trace_penalty_on_a_net_with_batch_norm_each_sees_its_own_pass():
    penalties = [lh.HessianTrace(), lh.InputHessianNorm(), lh.JacobianNorm(-1), lh.InputGradientNorm(layer="net.0")]
    together = Recorder()
    fit(Classifier(), [lh.HessianRegularizer(penalties), together], max_steps=1)
    for penalty in penalties:
        alone = Recorder()
        fit(Classifier(), [lh.HessianRegularizer(penalty), alone], max_steps=1)
        key = f"curvature/{penalty.name}"
        assert together.rows[0][key] == pytest.approx(alone.rows[0][key], rel=1e-9)


@each_penalty
def test_compiled_equals_eager(name):
    compiled = without_norm(dtype=torch.float32)
    compiled.net.compile(backend="eager")
    eager = without_norm(dtype=torch.float32)
    for module in (compiled, eager):
        fit(module, [callback(PENALTIES[name]())], data(dtype=torch.float32), max_steps=2)
    torch.testing.assert_close(weights(compiled), weights(eager))


@each_penalty
@pytest.mark.parametrize("middle", [nn.BatchNorm1d(6), nn.Identity()], ids=["batch norm", "none"])
def test_nothing_is_kept_alive_without_the_garbage_collector(name, middle):
    module = Classifier(middle=middle)
    alive = LiveTensors()
    with no_garbage_collector(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(module, [callback(PENALTIES[name]()), alive], max_epochs=2)
    assert alive.counts[-1] <= alive.counts[3] + 1


def test_a_list_of_penalties_needs_as_many_strengths():
    with pytest.raises(ValueError, match="has 3 factors for 2 penalties"):
        lh.HessianRegularizer([lh.InputGradientNorm(), lh.JacobianNorm()], strength=[1, 2, 3])
    with pytest.raises(ValueError, match="or a list of them"):
        lh.HessianRegularizer([])
    assert lh.HessianRegularizer([lh.InputGradientNorm(), lh.JacobianNorm()], strength=0.5).strengths_at(0) == [
        0.5,
        0.5,
    ]


class Returns(Classifier):
    """Computes its loss by hand, so nothing is seen."""

    def training_step(self, batch, batch_idx):
        logits = self.net(batch[0])
        loss = -F.log_softmax(logits, 1)[torch.arange(len(logits)), batch[1]].mean()
        return {"loss": loss, "logits": logits} if self.returns == "dict" else loss


def test_logits_that_the_step_returns_are_taken():
    module = Returns(middle=nn.Identity(), returns="dict")
    fit(module, [callback(lh.JacobianNorm(-1))], max_steps=2)
    torch.testing.assert_close(weights(module), by_hand(without_norm(), lh.JacobianNorm(-1)), rtol=1e-9, atol=1e-9)
    with pytest.raises(MisconfigurationException, match=r'Return \{"loss": \.\.\., "logits": \.\.\.\}'):
        fit(Returns(middle=nn.Identity()), [callback(lh.JacobianNorm())])


@each_penalty
def test_accumulation_is_the_large_batch(name):
    small, large = without_norm(), without_norm()
    fit(small, [callback(PENALTIES[name]())], data(8), max_steps=2, accumulate_grad_batches=2)
    fit(large, [callback(PENALTIES[name]())], data(16), max_steps=2)
    torch.testing.assert_close(weights(small), weights(large), rtol=1e-6, atol=1e-7)


@each_penalty
def test_fit_validate_and_test_on_one_device(name):
    module = Classifier()
    trainer = fit(module, [callback(PENALTIES[name]())], max_steps=1)
    plain = L.Trainer(**CPU)
    assert "val/loss" in {key for row in plain.validate(module, data(), verbose=False) for key in row}
    assert trainer.test(module, data(), verbose=False)
    assert "training_step" not in module.__dict__


@pytest.mark.parametrize("name", [name for name in PENALTIES if name != "finite differences"])
def test_bf16(name):
    module, recorder = without_norm(dtype=torch.float32), Recorder()
    loader = data(dtype=torch.float32)
    fit(module, [callback(PENALTIES[name]()), recorder], loader, max_steps=1, precision="bf16-mixed")
    exact = Recorder()
    fit(without_norm(dtype=torch.float32), [callback(PENALTIES[name]()), exact], loader, max_steps=1)
    key = f"curvature/{PENALTIES[name]().name}"
    assert recorder.rows[0][key] == pytest.approx(exact.rows[0][key], rel=0.05)


def test_finite_differences_in_half_precision_are_refused():
    with pytest.raises(MisconfigurationException, match=r"would train on noise.*method='autograd'"):
        fit(without_norm(dtype=torch.float32), [callback(lh.InputHessianNorm(method="finite_difference"))],
            data(dtype=torch.float32), precision="bf16-mixed")  # fmt: skip


def test_finite_differences_run_fused_attention():
    class Attention(Classifier):
        def __init__(self):
            super().__init__(middle=nn.Identity(), dtype=torch.float32)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def training_step(self, batch, batch_idx):
            x = batch[0].unsqueeze(1)
            return F.cross_entropy(self.net(self.attention(x, x, x, need_weights=False)[0].squeeze(1)), batch[1])

    by = {}
    for method in ("autograd", "finite_difference"):
        recorder = Recorder()
        fit(
            Attention(),
            [callback(lh.InputHessianNorm(method=method)), recorder],
            data(dtype=torch.float32),
            max_steps=1,
        )
        by[method] = recorder.rows[0]["curvature/input_hessian_norm"]
    assert by["finite_difference"] == pytest.approx(by["autograd"], rel=0.1)


class Fails(Classifier):
    def training_step(self, batch, batch_idx):
        self.random = getattr(self, "random", torch.get_rng_state())
        torch.rand(3)
        if self.net(batch[0]).requires_grad and getattr(self, "runs", 0) >= 1:
            raise RuntimeError("the user's own")
        self.runs = getattr(self, "runs", 0) + 1
        return F.cross_entropy(self.net(batch[0]), batch[1])


def test_a_failing_second_run_leaves_everything_as_found():
    module = Fails()
    before = weights(module)
    with pytest.raises(RuntimeError, match="the user's own"):
        fit(module, [callback(lh.InputHessianNorm())])
    assert torch.equal(weights(module), before)
    assert torch.equal(torch.get_rng_state(), module.random)
    assert module.net[1].training
    assert "log" not in module.__dict__
    assert "training_step" not in module.__dict__
    assert all(parameter.grad is None for parameter in module.parameters())


class Mixed(lh.HessianRegularizationMixin, Classifier):
    def __init__(self, penalty, manual=False, inputs=True):
        super().__init__(middle=nn.Identity())
        self.automatic_optimization = not manual
        self.regularizer = callback(penalty)
        self.inputs = inputs

    def training_step(self, batch, batch_idx):
        x, y = batch
        if not self.inputs:
            return self.regularized(lambda: F.cross_entropy(self.net(x), y))
        loss = self.regularized(lambda x: F.cross_entropy(self.net(x), y), inputs=x)
        if self.automatic_optimization:
            return loss
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        self.optimizers().step()
        return None


@each_penalty
@pytest.mark.parametrize("manual", [False, True])
def test_the_mixin_takes_the_inputs(name, manual):
    module = Mixed(PENALTIES[name](), manual)
    fit(module, max_steps=2)
    torch.testing.assert_close(weights(module), by_hand(without_norm(), PENALTIES[name]()), rtol=1e-9, atol=1e-9)


def test_the_mixin_asks_for_the_inputs():
    with pytest.raises(MisconfigurationException, match="inputs=x"):
        fit(Mixed(lh.InputHessianNorm(), inputs=False))


def test_the_mixin_takes_embeddings():
    class Embedded(lh.HessianRegularizationMixin, Tokens):
        def training_step(self, batch, batch_idx):
            ids, y = batch
            self.regularizer = self.regularizer or callback(lh.InputHessianNorm())
            return self.regularized(lambda e: F.cross_entropy(self.net(e).mean(1), y), inputs=self.embedding(ids))

    by_mixin, by_layer = Embedded(), Tokens()
    fit(by_mixin, loader=tokens(), max_steps=2)
    fit(by_layer, [callback(lh.InputHessianNorm(layer="embedding"))], tokens(), max_steps=2)
    torch.testing.assert_close(weights(by_mixin), weights(by_layer), rtol=1e-9, atol=1e-9)


@each_penalty
def test_verify_finds_the_gradient_right(name):
    module = Classifier(dtype=torch.float32)
    report = lh.verify(module, next(iter(data(dtype=torch.float32))), PENALTIES[name]())
    assert report.ok, str(report)
    assert report.value > 0


def test_hooks_on_parameters_act_once():
    modules = without_norm(), without_norm()
    modules[0].net[0].weight.register_hook(lambda gradient: 0.5 * gradient)
    for module in modules:
        fit(module, [callback(lh.InputHessianNorm())], max_steps=1)
    before = without_norm().net[0].weight
    halved, whole = (module.net[0].weight - before for module in modules)
    torch.testing.assert_close(halved, 0.5 * whole, rtol=1e-9, atol=1e-12)
