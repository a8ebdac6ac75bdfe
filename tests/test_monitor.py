"""CurvatureMonitor: what it measures, where it logs it, and that training does not notice."""

import copy
import csv
import random

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from nets import CPU, Classifier, Mixed, MovingAverage, Silent, data, fit, task_loss, weights
from oracles import dense_hessian, hessian_by_differences
from ranks import dealt, hand_over, handed_over, two_ranks
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import lightning_hessian as lh

X, Y = data().dataset.tensors
ALL = 48  # samples, one batch of which is the whole data set
SIZE = 63  # parameters of the net


class Net(Classifier):
    """With dropout, a torchmetric, and randomness from everywhere in the step."""

    def __init__(self, middle=None, **settings):
        super().__init__(middle or nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.3)), **settings)
        self.accuracy = MulticlassAccuracy(3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        noise = 1e-3 * (torch.rand(()) + random.random() + np.random.rand())
        logits = self.net(x) * (1 + noise)
        self.accuracy(logits, y)
        self.log("train/accuracy", self.accuracy, on_epoch=True)
        return F.cross_entropy(logits, y)


def monitor(**settings):
    return lh.CurvatureMonitor(**{"figures": False, **settings})


def dense(module, x=X, y=Y):
    net = copy.deepcopy(module.net).eval()
    return dense_hessian(net, lambda call: F.cross_entropy(call(x), y))


@pytest.fixture(scope="module")
def measured():
    """The whole data set, with all that can be measured, before and after training."""
    module = Silent()
    before = dense(module)
    callback = monitor(
        probes=200, eigenvalues=3, iterations=SIZE, layers=["net.0.*", "*.bias"], overlap={"net.3.*": 2}, density_runs=2
    )
    fit(module, [callback], data(ALL), max_epochs=2)
    return callback.history, before, dense(module)


def test_values_are_those_of_the_dense_hessian(measured):
    history, before, after = measured
    assert [one.step for one in history] == [0, 1, 2]
    for one, exact in ((history[0], before), (history[-1], after)):
        values = torch.linalg.eigvalsh(exact)
        assert [value for value, _ in one.largest] == pytest.approx(values.flip(0)[:3].tolist(), rel=1e-8)
        assert [value for value, _ in one.smallest] == pytest.approx(values[:3].tolist(), rel=1e-8)
        assert max(residual for _, residual in one.largest + one.smallest) < 1e-6
        assert one.stability == pytest.approx(0.1 * values[-1].item() / 2)
        rows = {"net.0": slice(0, 30), "*.bias": [*range(24, 30), *range(36, 42), *range(60, 63)]}
        expected = {"trace": exact.trace(), "norm": exact.norm()}
        expected |= {name: exact.diag()[part].sum() for name, part in rows.items()}
        found = {"trace": one.trace, "norm": one.frobenius_norm, **one.layers}
        assert set(found) == set(expected)
        for name, estimate in found.items():
            assert abs(estimate.estimate - expected[name].item()) < 4 * estimate.standard_error, name


def test_the_overlap_is_that_of_the_dense_eigenspaces(measured):
    history, before, after = measured
    assert history[0].overlaps == {}
    first, last = (torch.linalg.eigh(exact[42:, 42:])[1][:, -2:] for exact in (before, after))
    # Of the two steps in between each has its own overlap; the whole way's is checked by a run that skips one.
    module, callback = Silent(), monitor(overlap={"net.3.*": 2}, every_n_epochs=2, layers=[])
    fit(module, [callback], data(ALL), max_epochs=2)
    expected = (first.T @ last).square().sum().item() / 2
    assert callback.history[-1].overlaps["net.3"] == pytest.approx(expected, rel=1e-6)
    assert 0 < expected < 1


@pytest.mark.parametrize(
    "settings",
    [{}, {"mode": "train", "n_batches": 2, "density_runs": 1}, {"every_n_steps": 2, "batches": "val"}],
    ids=["default", "train mode", "steps, validation data"],
)
def test_training_is_bit_equal_and_random_streams_are_untouched(settings):
    def run(callbacks):
        torch.manual_seed(7)
        random.seed(7)
        np.random.seed(7)
        module = Net()
        generator = torch.Generator().manual_seed(5)
        loaders = DataLoader(data().dataset, 8, shuffle=True, generator=generator), data(16)
        trainer = L.Trainer(**CPU, max_epochs=2, callbacks=callbacks, num_sanity_val_steps=0)
        trainer.fit(module, *loaders)
        state = torch.get_rng_state(), generator.get_state(), torch.tensor([random.random(), np.random.rand()])
        return weights(module), state, trainer.callback_metrics["train/accuracy_epoch"], module

    callback = monitor(**settings)
    plain, watched = run([]), run([callback])
    assert len(callback.history) == (7 if "every_n_steps" in settings else 3)
    assert torch.equal(plain[0], watched[0])
    assert all(torch.equal(a, b) for a, b in zip(plain[1], watched[1], strict=True))
    assert plain[2] == watched[2]
    assert watched[3].training
    assert callback._measurement is None


class OwnRandomness(TensorDataset):
    def __init__(self, *tensors):
        super().__init__(*tensors)
        self.generator = torch.Generator().manual_seed(2)

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + torch.rand((), generator=self.generator, dtype=x.dtype), y


class NumpySampler(torch.utils.data.Sampler):
    def __init__(self):
        self.random = np.random.default_rng(1)

    def __iter__(self):
        return iter(self.random.permutation(ALL).tolist())

    def __len__(self):
        return ALL


def loaders():
    dataset = data().dataset
    sampler = torch.utils.data.RandomSampler(dataset, generator=torch.Generator().manual_seed(1))
    batches = torch.utils.data.BatchSampler(sampler, 8, drop_last=False)
    return {
        "dataset with a generator": DataLoader(OwnRandomness(X, Y), 8),
        "subset of it": DataLoader(torch.utils.data.Subset(OwnRandomness(X, Y), range(40)), 8),
        "NumPy's sampler": DataLoader(dataset, 8, sampler=NumpySampler()),
        "batch sampler": DataLoader(dataset, batch_sampler=batches),
    }


@pytest.mark.parametrize("name", loaders())
def test_training_gets_the_batches_that_it_would_get(name):
    ends = []
    for callbacks in ([], [monitor(n_batches=2, every_n_steps=4)]):
        module = Silent()
        fit(module, callbacks, loaders()[name], max_epochs=2)
        ends.append(weights(module))
    assert torch.equal(*ends)


class Awkward(Silent):
    """Needs its own start hooks, uses its metric's value, and has a hook on a gradient."""

    def __init__(self):
        super().__init__()
        self.accuracy = MulticlassAccuracy(3)
        self.net[0].weight.register_hook(lambda gradient: 0.5 * gradient)

    def on_train_epoch_start(self):
        self.outputs = []

    def training_step(self, batch, batch_idx):
        self.outputs.append(batch_idx)
        logits = self.net(batch[0])
        self.log("accuracy", self.accuracy(logits, batch[1]).detach())
        return F.cross_entropy(logits, batch[1])


def test_hooks_on_gradients_and_metrics_that_have_seen_nothing_do_not_matter():
    module, callback = Awkward(), monitor(iterations=SIZE, layers=[])
    exact = torch.linalg.eigvalsh(dense(module))
    fit(module, [callback], data(ALL))
    assert callback.history[0].largest[0][0] == pytest.approx(exact[-1].item(), rel=1e-8)
    plain = Awkward()
    fit(plain, [], data(ALL))
    assert torch.equal(weights(module), weights(plain))


def test_a_step_that_changes_parameters_is_refused_before_it_trains():
    with pytest.raises(MisconfigurationException, match=r"'teacher.weight'.*CurvatureMonitor\(loss=...\)"):
        fit(MovingAverage(), [monitor()])


class Skips(Silent):
    def training_step(self, batch, batch_idx):
        return None if self.trainer.global_step >= 6 else super().training_step(batch, batch_idx)


class Freezes(L.Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        pl_module.net[0].requires_grad_(False)


class Diverges(L.Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        with torch.no_grad():
            pl_module.net[3].weight.fill_(float("nan"))


def test_what_happens_later_does_not_stop_training(tmp_path):
    callback = monitor(density_runs=1, png_directory=tmp_path)
    with pytest.warns(UserWarning, match="At step 6 nothing is measured"):
        fit(Skips(), [callback], max_epochs=2)
    assert [one.step for one in callback.history] == [0]
    callback, module = monitor(iterations=SIZE, layers=[]), Silent()
    fit(module, [Freezes(), callback], data(ALL), max_epochs=2)
    exact = torch.linalg.eigvalsh(dense(module))
    assert callback.history[-1].largest[0][0] == pytest.approx(exact[-1].item(), rel=1e-8)
    assert not module.net[0].weight.requires_grad
    callback = monitor(density_runs=1, png_directory=tmp_path)
    fit(Silent(), [Diverges(), callback])
    assert callback.history[-1].trace.estimate != callback.history[-1].trace.estimate
    assert callback.history[-1].largest[0][0] != callback.history[-1].largest[0][0]


def test_validation_loaders_in_a_dict_and_not_yet_loaded():
    module, first = Validated(), data(16)
    exact = monitor(batches="val")
    trainer = L.Trainer(**CPU, max_epochs=2, callbacks=[exact], num_sanity_val_steps=0, check_val_every_n_epoch=2)
    trainer.fit(module, data(), {"a": first, "b": data(48)})
    assert len(exact.history) == 3
    values = trainer.validate(module, {"a": first, "b": data(48)}, verbose=False)
    assert any("curvature/val/trace" in found for found in values)


def test_the_history_is_that_of_the_run_also_after_a_test_of_another_checkpoint(tmp_path):
    module, callback = Validated(), monitor(layers=[])
    trainer = fit(module, [callback], max_epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, data())
    steps = [one.step for one in callback.history]
    assert steps == [0, 6, 12, 18]
    trainer.test(module, data(), ckpt_path=tmp_path / "one.ckpt", verbose=False)
    assert [one.step for one in callback.history] == steps


def test_shuffled_loaders_without_a_generator_give_the_batches_of_the_seed():
    def first_batch(seed, before):
        torch.manual_seed(before)
        module, callback = Silent(), monitor(seed=seed, iterations=SIZE, layers=[])
        fit(module, [callback], DataLoader(data().dataset, 8, shuffle=True), max_steps=1, limit_train_batches=1)
        return callback.history[0].largest[0][0]

    assert first_batch(0, before=1) == first_batch(0, before=2) != first_batch(3, before=1)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_measured_again_at_the_same_weights_the_values_are_the_same(mode):
    module, callback = Net(nn.Dropout(0.3), lr=0.0), monitor(mode=mode)
    fit(module, [callback], max_epochs=2)
    first, *others = [one.scalars() for one in callback.history]
    assert others == [first, first]


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_batch_norm_is_as_the_mode_says(mode):
    module, callback = Silent(), monitor(mode=mode, iterations=SIZE, layers=[])
    net = copy.deepcopy(module.net).train(mode == "train")
    exact = hessian_by_differences(net, lambda net: F.cross_entropy(net(X), Y))
    fit(module, [callback], data(ALL), max_steps=1)
    assert callback.history[0].largest[0][0] == pytest.approx(torch.linalg.eigvalsh(exact)[-1].item(), rel=1e-6)


def test_several_batches_are_weighted_by_their_samples():
    module, callback = Silent(), monitor(n_batches=2, iterations=SIZE, layers=[])
    exact = torch.linalg.eigvalsh(dense(module))
    fit(module, [callback], data(30), max_steps=1)  # 30 and 18
    assert callback.history[0].largest[0][0] == pytest.approx(exact[-1].item(), rel=1e-8)


@pytest.mark.parametrize(
    ("settings", "trainer", "steps"),
    [
        ({}, {"max_epochs": 2}, [0, 6, 12]),
        ({"every_n_epochs": 2}, {"max_epochs": 4}, [0, 12, 24]),
        ({"every_n_steps": 4}, {"max_epochs": 2}, [0, 4, 8, 12]),
        ({"every_n_steps": 2}, {"max_epochs": 2, "accumulate_grad_batches": 2}, [0, 2, 4, 6]),
    ],
)
def test_schedule_and_step_axis(settings, trainer, steps, tmp_path):
    callback = monitor(probes=2, iterations=2, layers=[], **settings)
    logger = CSVLogger(tmp_path)
    fit(Silent(), [callback], logger=logger, **trainer)
    assert [one.step for one in callback.history] == steps
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["curvature/trace"]]
    assert [int(row["step"]) for row in rows] == steps
    assert float(rows[0]["curvature/trace"]) == pytest.approx(callback.history[0].trace.estimate)


def test_other_callbacks_can_look_at_the_values(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="curvature/largest_eigenvalue")
    callback = monitor(probes=2, layers=[])
    fit(Silent(), [callback, best], max_epochs=2, enable_checkpointing=True)
    lowest = min(one.largest[0][0] for one in callback.history[1:])
    assert best.best_model_score.item() == pytest.approx(lowest)


class Validated(Silent):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.inference = torch.is_inference_mode_enabled()
        self.log("val/loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    test_step = validation_step


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_in_validate_and_test_their_data_are_measured_in_inference_mode(stage):
    module, callback = Validated(), monitor(iterations=SIZE, layers=["net.0.*"])
    exact = torch.linalg.eigvalsh(dense(module))
    trainer = L.Trainer(**CPU, callbacks=[callback])
    (found,) = getattr(trainer, stage)(module, data(ALL), verbose=False)
    name = {"validate": "val", "test": "test"}[stage]
    assert module.inference
    assert found[f"curvature/{name}/largest_eigenvalue"] == pytest.approx(exact[-1].item(), rel=1e-6)
    assert f"curvature/{name}/trace/net.0" in found
    assert f"curvature/{name}/stability" not in found


def test_on_validation_data_during_training():
    callback = monitor(batches="val", iterations=SIZE, layers=[])
    module, loader = Validated(), data(ALL)
    exact = torch.linalg.eigvalsh(dense(module, X[:10], Y[:10]))
    trainer = L.Trainer(**CPU, max_epochs=1, callbacks=[callback], num_sanity_val_steps=0)
    trainer.fit(module, loader, DataLoader(torch.utils.data.Subset(loader.dataset, range(10)), 10))
    assert callback.history[0].largest[0][0] == pytest.approx(exact[-1].item(), rel=1e-8)
    assert "curvature/val/trace" in trainer.callback_metrics


def test_the_task_loss_is_measured_without_penalties():
    def first(module, *others):
        callback = monitor(iterations=SIZE, layers=[])
        fit(module, [callback, *others], data(ALL), max_steps=1)
        return callback.history[0].scalars()

    penalty = lh.HessianRegularizer(lh.HessianTrace(), strength=0.5)
    assert (
        first(Silent())
        == first(Silent(), penalty)
        == first(Mixed(lh.HessianRegularizer(lh.HessianTrace(probes=-1), strength=0.5)))
    )


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_precision(precision):
    module, callback = Silent(dtype=torch.float32, lr=0.01), monitor(iterations=10, layers=[])
    exact = torch.linalg.eigvalsh(dense(module, X.float()))
    fit(module, [callback], data(ALL, dtype=torch.float32), max_steps=2, max_epochs=2, precision=precision)
    tolerance = 0.1 if precision == "bf16-true" else 1e-4  # the weights themselves are rounded
    assert callback.history[0].largest[0][0] == pytest.approx(exact[-1].item(), rel=tolerance)


def test_stability_has_the_largest_real_learning_rate():
    class Groups(Silent):
        def configure_optimizers(self):
            groups = [{"params": self.net[0].parameters(), "lr": 0.5}, {"params": self.net[3].parameters()}]
            optimizer = torch.optim.SGD(groups, lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)]

    callback = monitor(layers=[])
    fit(Groups(), [callback], data(ALL), max_epochs=2)
    for one, rate in zip(callback.history, (0.5, 0.05, 0.005), strict=True):
        assert one.learning_rate == pytest.approx(rate)
        assert one.stability == pytest.approx(rate * one.largest[0][0] / 2)


def test_without_an_optimizer_there_is_no_stability():
    class Still(Silent):
        def configure_optimizers(self):
            return None

    callback = monitor(layers=[])
    fit(Still(), [callback])
    assert callback.history[0].stability is None
    assert "stability" not in callback.history[0].scalars()


def test_manual_optimization_with_several_optimizers_and_a_loss_of_ones_own():
    class Manual(Silent):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(self.net[0].parameters(), 0.3), torch.optim.SGD(self.net[3].parameters(), 0.1)]

    module, callback = Manual(), monitor(loss=task_loss, iterations=SIZE, layers=[], every_n_steps=1)
    exact = torch.linalg.eigvalsh(dense(module))
    fit(module, [callback], data(ALL), max_epochs=2)
    assert callback.history[0].largest[0][0] == pytest.approx(exact[-1].item(), rel=1e-8)
    assert callback.history[0].learning_rate == 0.3
    assert [one.step for one in callback.history] == [0, 1, 2]
    with pytest.raises(MisconfigurationException, match=r"manual optimization.*loss=lambda module, batch"):
        fit(Manual(), [monitor()])


def test_a_resumed_run_goes_on_with_its_history(tmp_path):
    def run(epochs, path=None):
        callback = monitor(layers=["net.0.*"], density_runs=1, overlap={"net.3.*": 2})
        trainer = fit(Silent(), [callback], max_epochs=epochs, ckpt_path=path)
        return callback, trainer

    whole, _ = run(3)
    _, trainer = run(1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    resumed, _ = run(3, tmp_path / "one.ckpt")
    assert [one.scalars() for one in resumed.history] == [one.scalars() for one in whole.history]
    assert torch.equal(resumed.history[0].density.nodes, whole.history[0].density.nodes)


def test_tensorboard_has_scalars_and_images_and_png_files_are_written(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="", version="")
    callback = lh.CurvatureMonitor(density_runs=1, png_directory=tmp_path / "png")
    fit(Silent(), [callback], logger=logger)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert {"curvature/trace", "curvature/largest_eigenvalue", "curvature/stability", "curvature/trace/net.0"} <= set(
        events.Tags()["scalars"]
    )
    images = {"curvature/eigenvalues", "curvature/trace_by_layer", "curvature/spectral_density"}
    assert set(events.Tags()["images"]) == images
    assert [image.step for image in events.Images("curvature/eigenvalues")] == [6]
    assert [scalar.step for scalar in events.Scalars("curvature/trace")] == [0, 6]
    names = {f"{name.rpartition('/')[2]}_step={step}.png" for name in images for step in (0, 6)}
    names -= {"eigenvalues_step=0.png"}  # a single point
    assert {path.name for path in (tmp_path / "png").iterdir()} == names


class Attending(Silent):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Unflatten(1, (2, 2)),
            nn.TransformerEncoderLayer(2, 1, 4, dropout=0.0, batch_first=True),
            nn.Flatten(),
            nn.Linear(4, 3),
        ).double()


def test_attention_and_layer_norm_have_the_right_second_derivatives():
    module, callback = Attending(), monitor(iterations=200, layers=[])
    fit(module, [callback], data(ALL), max_steps=1)
    torch.manual_seed(1)
    fresh = Attending()  # in training mode: dropout is 0, and evaluation mode has a fused forward pass of its own
    exact = hessian_by_differences(fresh.net, lambda net: F.cross_entropy(net(X), Y))
    assert callback.history[0].largest[0][0] == pytest.approx(torch.linalg.eigvalsh(exact)[-1].item(), rel=1e-5)


class Failing(Silent):
    def training_step(self, batch, batch_idx):
        if not self.net.training:
            self.net[1].running_mean.add_(1)
            torch.rand(1)
            raise RuntimeError("no step in evaluation mode")
        return super().training_step(batch, batch_idx)


class Before(L.Callback):
    def on_train_start(self, trainer, pl_module):
        self.state = weights(pl_module), torch.get_rng_state()


def test_after_an_exception_everything_is_as_it_was():
    module, callback, before = Failing(), monitor(), Before()
    with pytest.raises(RuntimeError, match="no step in evaluation mode"):
        fit(module, [before, callback])
    assert torch.equal(weights(module), before.state[0])
    assert torch.equal(torch.get_rng_state(), before.state[1])
    assert all(layer.training for layer in module.modules())
    assert callback._measurement is None
    assert "log" not in module.__dict__


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": ["conv.*"]}, "layers='conv.\\*' matches no trainable parameter"),
        ({"overlap": {"conv.*": 1}}, "overlap='conv.\\*' matches no trainable parameter"),
        (
            {"eigenvalues": SIZE + 1, "iterations": 200},
            f"{SIZE + 1} eigenvalues are asked for, and the matrix has {SIZE}",
        ),
        ({"overlap": {"net.3.bias": 4}}, "4 eigenvalues are asked for, and the matrix has 3"),
        ({"batches": "val"}, "no such data.*batches='train'"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_first_step(settings, message):
    module = Silent()
    before = weights(module)
    with pytest.raises(MisconfigurationException, match=message):
        fit(module, [monitor(**settings)])
    assert torch.equal(weights(module), before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_epochs": 0}, "every_n_epochs=0"),
        ({"every_n_steps": 0}, "every_n_steps=0"),
        ({"batches": "test"}, "batches='test' is unknown"),
        ({"n_batches": 0}, "n_batches=0"),
        ({"mode": "both"}, "mode='both'"),
        ({"probes": 1}, "probes=1"),
        ({"eigenvalues": 16}, "iterations=15"),
        ({"density_runs": -1}, "density_runs=-1"),
        ({"layers": "net.*"}, "must be a list of globs"),
        ({"overlap": {"net.*": 0}}, "overlap"),
        ({"overlap": ["net.*"]}, r"overlap=\['net\.\*'\] must be a dictionary"),
        ({"overlap": {3: 2}}, "overlap={3: 2} must be a dictionary"),
        ({"overlap": "net.*"}, "overlap='net.*' must be a dictionary"),
        ({"layers": 3}, "layers=3 must be a list of globs"),
        ({"layers": [3]}, r"layers=\[3\] must be a list of globs"),
        ({"parameters": 3}, "parameters=3 chooses none"),
        ({"png_directory": 3}, "png_directory=3 must be the path"),
        ({"loss": 3}, "loss=3 must be a function"),
    ],
)
def test_arguments_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        lh.CurvatureMonitor(**settings)


class Finetuned(Silent):
    """A backbone that is unfrozen after two epochs of three."""

    @property
    def backbone(self):
        return self.net[:3]

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)


def test_layers_are_measured_from_when_they_are_unfrozen():
    module = Finetuned()
    callback = monitor(
        probes=200,
        iterations=SIZE,
        layers=["net.0.*", "net.3.*"],
        overlap={"net.0.*": 2, "net.3.*": 2, "*": 2},
    )
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=2, verbose=False)
    fit(module, [finetuning, callback], data(ALL), max_epochs=4)
    steps = [one.step for one in callback.history]
    assert steps == [0, 1, 2, 3, 4]
    assert [sorted(one.layers) for one in callback.history] == [["net.3"]] * 3 + [["net.0", "net.3"]] * 2
    # Compared is what has the same parameters: the head's always, the backbone's from its second measurement.
    assert [sorted(one.overlaps) for one in callback.history] == [
        [],
        ["*", "net.3"],
        ["*", "net.3"],
        ["net.3"],
        ["*", "net.0", "net.3"],
    ]
    values = torch.linalg.eigvalsh(dense(module))
    assert callback.history[-1].largest[0][0] == pytest.approx(values[-1].item(), rel=1e-8)
    head = torch.linalg.eigvalsh(dense(module)[-21:, -21:])
    assert callback.history[-1].largest[0][0] > 1.01 * head[-1].item()


def test_layers_that_are_frozen_later_are_measured_all_the_same():
    class Freezes(Silent):
        def on_train_epoch_start(self):
            self.net[0].requires_grad_(self.current_epoch == 0)

    callback = monitor(layers=["net.0.*"])
    fit(Freezes(), [callback], max_epochs=2)
    assert [list(one.layers) for one in callback.history] == [["net.0"]] * 3


def test_parameters_that_are_all_frozen_are_refused():
    module = Silent()
    module.net[0].requires_grad_(False)
    with pytest.raises(MisconfigurationException, match=r"parameters='net\.0\.\*' matches only frozen parameters"):
        fit(module, [monitor(parameters="net.0.*")])


def test_fewer_batches_than_asked_for_are_all_measured_and_said():
    module, callback = Silent(), monitor(n_batches=9, iterations=SIZE, layers=[])
    exact = torch.linalg.eigvalsh(dense(module))
    with pytest.warns(UserWarning, match="n_batches=9, and the train dataloader has 6"):
        fit(module, [callback], max_steps=1)
    assert callback.history[0].largest[0][0] == pytest.approx(exact[-1].item(), rel=1e-8)


def test_two_monitors_on_the_same_data_are_refused_and_on_different_data_are_not():
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `CurvatureMonitor`"):
        fit(Silent(), [monitor(), monitor()])
    both = [monitor(), monitor(batches="val")]
    trainer = L.Trainer(**CPU, max_epochs=1, callbacks=both, num_sanity_val_steps=0)
    trainer.fit(Validated(), data(), data())
    assert {"curvature/trace", "curvature/val/trace"} <= set(trainer.callback_metrics)


def test_a_dataloader_that_is_an_iterator_is_refused():
    with pytest.raises(MisconfigurationException, match="The data are an iterator"):
        fit(Silent(), [monitor()], iter([(X, Y)]))


def test_sharded_parameters_are_refused(monkeypatch):
    trainer = L.Trainer(**CPU)
    monkeypatch.setattr(L.Trainer, "strategy", FSDPStrategy.__new__(FSDPStrategy))
    with pytest.raises(MisconfigurationException, match="FSDPStrategy shards the parameters"):
        monitor().setup(trainer, Silent(), "fit")


def test_two_ranks_equal_one(tmp_path):
    settings = {"n_batches": 3, "iterations": 12, "overlap": {"net.3.*": 2}, "density_runs": 1, "mode": "train"}

    class Save(L.Callback):
        def on_train_end(self, trainer, pl_module):
            hand_over([one.state_dict() for one in trainer.callbacks[0].history], trainer, tmp_path)

    def normalized():
        return Silent(middle=nn.LayerNorm(6))

    loader = data(8)
    trainer = L.Trainer(
        **CPU, **two_ranks(), max_epochs=2, callbacks=[monitor(**settings), Save()], use_distributed_sampler=False
    )
    trainer.fit(normalized(), dealt(loader))
    first, second = handed_over(tmp_path)
    one = monitor(**settings)
    joined = DataLoader(loader.dataset, 16)
    fit(normalized(), [one], joined, max_epochs=2)
    for mine, theirs, expected in zip(first, second, one.history, strict=True):
        assert mine["trace"] == theirs["trace"]
        assert mine["largest"] == theirs["largest"]
        found = lh.monitoring.measurement.Curvature.from_state_dict(mine)
        assert found.scalars() == pytest.approx(expected.scalars(), rel=1e-6, abs=1e-9)
        torch.testing.assert_close(found.density.nodes, expected.density.nodes)
