"""HessianRegularizer: what it trains, what it logs, what it leaves as found, and what it refuses."""

import copy
import gc
import itertools
import pickle
import weakref

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from nets import (
    CPU,
    Classifier,
    context_of,
    data,
    fit,
    plain_loop,
    smooth,
    task_loss,
    weights,
    without_automatic_optimization,
)
from recorders import LiveTensors, Recorder, SaveAt, all_warnings, no_garbage_collector
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lightning_hessian as lh
from lightning_hessian.curvature import ProbeSource
from lightning_hessian.regularization.active_penalty import unique_names


def regularizer(strength=0.02, **settings):
    penalty = settings.pop("penalty", None) or lh.HessianTrace()
    return lh.HessianRegularizer(penalty, strength=strength, **settings)


def by_hand(module, strength_at, steps, penalty=None):
    """The same training written as a plain loop."""
    penalty = penalty or lh.HessianTrace()

    def loss_of(module, x, y, step):
        context = context_of(module, task_loss, (x, y), probes=ProbeSource(0, step, step))
        strength = strength_at(step)
        return context.loss + strength * penalty(context) if strength else context.loss

    plain_loop(module, loss_of, itertools.islice(itertools.cycle(data()), steps))


def assert_same(a, b, rtol=1e-10):
    torch.testing.assert_close(weights(a), weights(b), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("returns", ["tensor", "dict"])
def test_trains_on_loss_plus_strength_times_trace(returns):
    ours, reference, plain = Classifier(returns=returns), Classifier(), Classifier()
    fit(ours, [regularizer()])
    by_hand(reference, lambda step: 0.02, 6)
    fit(plain)
    assert_same(ours, reference)
    assert (weights(ours) - weights(plain)).norm() > 1e-3


def test_a_large_strength_brings_the_trace_down():
    def trace_after(strength):
        torch.manual_seed(0)
        module = smooth()
        fit(module, [regularizer(strength, penalty=lh.HessianTrace(probes=2))], max_epochs=15)
        return lh.HessianTrace(probes=-1)(context_of(module, task_loss, data().dataset.tensors)).item()

    assert trace_after(0.05) < 0.5 * trace_after(0.0)


def test_strength_0_is_bit_equal_to_training_without_the_callback():
    ours, plain = Classifier(dtype=torch.float32), Classifier(dtype=torch.float32)
    loader = data(dtype=torch.float32)
    fit(ours, [regularizer(0.0)], loader, max_steps=20, max_epochs=-1)
    fit(plain, [], loader, max_steps=20, max_epochs=-1)
    assert torch.equal(weights(ours), weights(plain))
    assert ours.losses == plain.losses


def test_none_skips_the_batch():
    ours, reference = Classifier(returns="every other None"), Classifier()
    fit(ours, [regularizer()])
    optimizer = reference.configure_optimizers()
    for index, batch in enumerate(data()):
        # A skipped batch is an optimizer step to Lightning all the same.
        context = context_of(reference, task_loss, batch, probes=ProbeSource(0, index, index))
        if index % 2 == 0:
            optimizer.zero_grad()
            (context.loss + 0.02 * lh.HessianTrace()(context)).backward()
            optimizer.step()
    assert_same(ours, reference)


def test_every_n_steps_acts_on_every_nth_with_n_times_the_strength():
    ours, reference = Classifier(), Classifier()
    fit(ours, [regularizer(every_n_steps=3)])
    by_hand(reference, lambda step: 0.06 if step % 3 == 0 else 0.0, 6)
    assert_same(ours, reference)


def test_warmup_raises_the_strength_linearly():
    callback = regularizer(0.1, warmup_steps=4)
    assert [callback.strengths_at(step)[0] for step in range(6)] == pytest.approx([0, 0.025, 0.05, 0.075, 0.1, 0.1])
    ours, reference = Classifier(), Classifier()
    fit(ours, [callback])
    by_hand(reference, lambda step: callback.strengths_at(step)[0], 6)
    assert_same(ours, reference)


@pytest.mark.parametrize("settings", [{"max_epochs": 2}, {"max_steps": 12, "max_epochs": -1}], ids=str)
def test_a_later_start_is_a_share_of_the_training_steps(settings):
    callback = regularizer(0.02, start=0.75, warmup_steps=2)
    ours, reference = Classifier(), Classifier()
    fit(ours, [callback], **settings)
    by_hand(reference, lambda step: {10: 0.01, 11: 0.02}.get(step, 0.0), 12)
    assert_same(ours, reference)


def test_a_later_start_needs_a_known_number_of_steps():
    with pytest.raises(MisconfigurationException, match="Pass max_steps to the Trainer"):
        fit(Classifier(), [regularizer(start=0.5)], max_epochs=-1, max_time={"seconds": 5})
    scheduler = GradientAccumulationScheduler({0: 1, 1: 2})
    with pytest.raises(MisconfigurationException, match="GradientAccumulationScheduler their number is not known"):
        fit(Classifier(), [regularizer(start=0.5), scheduler])
    fit(Classifier(), [regularizer(start=0.5)], max_steps=0)


def test_a_warmup_that_is_longer_than_training_is_said():
    with pytest.warns(UserWarning, match="warmup_steps=10 exceeds the 2 steps .* reaches 20% of its strength"):
        fit(Classifier(), [regularizer(warmup_steps=10)], max_steps=2)


def test_the_strength_is_a_plain_attribute_that_a_schedule_may_set():
    callback = regularizer(0.0)

    class Schedule(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            callback.strength = 0.01 * trainer.global_step

    ours, reference = Classifier(), Classifier()
    fit(ours, [Schedule(), callback])
    by_hand(reference, lambda step: 0.01 * step, 6)
    assert_same(ours, reference)


def test_accumulation_equals_the_large_batch():
    exact = lh.HessianTrace(probes=-1)
    accumulated, large = smooth(), smooth()
    recorder = Recorder()
    fit(accumulated, [regularizer(penalty=exact), recorder], data(8), accumulate_grad_batches=2)
    fit(large, [regularizer(penalty=exact)], data(16))
    assert_same(accumulated, large)
    # What is logged is the penalty itself, not divided by the number of micro-batches.
    assert recorder.rows[0]["train/penalty"] == pytest.approx(0.02 * recorder.rows[0]["curvature/hessian_trace"])


def test_every_n_steps_counts_optimizer_steps_under_accumulation():
    accumulated, large = smooth(), smooth()
    settings = {"penalty": lh.HessianTrace(probes=-1), "every_n_steps": 2}
    fit(accumulated, [regularizer(**settings)], data(8), accumulate_grad_batches=2)
    fit(large, [regularizer(**settings)], data(16))
    assert_same(accumulated, large)


def test_micro_batches_draw_different_probes():
    module = smooth(lr=0.0)
    batch = next(iter(data(8)))
    loader = DataLoader([batch] * 4, batch_size=None)
    recorder = Recorder()
    fit(module, [regularizer(), recorder], loader, accumulate_grad_batches=4)
    values = [row["curvature/hessian_trace"] for row in recorder.rows]
    assert len(set(values)) == 4


def test_resumed_equals_uninterrupted_to_the_bit(tmp_path):
    def module():
        return Classifier(dtype=torch.float32)

    loader = data(dtype=torch.float32)
    whole, first, second = module(), module(), module()
    fit(whole, [regularizer()], loader, max_epochs=2)
    trainer = fit(first, [regularizer()], loader, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "at-one.ckpt")
    fit(second, [regularizer()], loader, max_epochs=2, ckpt_path=tmp_path / "at-one.ckpt")
    assert torch.equal(weights(whole), weights(second))


def test_dropout_draws_from_the_users_stream_as_without_the_callback():
    def masks(callbacks):
        module = Classifier(middle=nn.Dropout(0.5))
        torch.manual_seed(7)
        fit(module, callbacks)
        return torch.get_rng_state()

    assert torch.equal(masks([]), masks([regularizer()]))


def test_running_statistics_move_once_a_step():
    ours, plain = Classifier(lr=0.0), Classifier(lr=0.0)
    fit(ours, [regularizer()])
    fit(plain)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer, rtol=1e-12, atol=1e-12)
    assert ours.net[1].num_batches_tracked == 6


def test_logs_the_raw_value_the_contribution_and_leaves_the_task_loss(tmp_path):
    module, recorder = Classifier(), Recorder()
    callback = regularizer(penalty=lh.HessianTrace(clamp=1e9))
    fit(module, [callback, recorder], logger=CSVLogger(tmp_path), log_every_n_steps=1)
    for row, loss in zip(recorder.rows, module.losses, strict=True):
        assert row["train/loss"] == pytest.approx(loss)
        assert abs(row["curvature/hessian_trace"]) < 1e3
        assert row["train/penalty"] == pytest.approx(0.02 * 1e9)
    assert "curvature/hessian_trace" in next(tmp_path.rglob("metrics.csv")).read_text()


def test_several_callbacks_share_the_forward_and_see_the_task_loss_alone():
    first = regularizer(0.02, penalty=lh.HessianTrace(method="autograd", parameters="net.0.*"))
    second = regularizer(0.03, penalty=lh.HessianTrace(method="autograd", parameters="net.3.*"))
    ours, reference, recorder = Classifier(), Classifier(), Recorder()
    fit(ours, [first, second, recorder])
    row = recorder.rows[0]
    added = 0.02 * row["curvature/hessian_trace"] + 0.03 * row["curvature/hessian_trace_2"]
    assert row["train/penalty"] == pytest.approx(added)

    class Both(lh.HessianTrace):
        def value(self, context):
            return 0.02 * first.penalty(context) + 0.03 * second.penalty(context)

    by_hand(reference, lambda step: 1.0, 6, penalty=Both())
    assert_same(ours, reference)
    assert len(ours.losses) == 6


def test_fit_validate_and_test_on_one_device():
    module = Classifier()
    trainer = L.Trainer(**CPU, max_epochs=1, callbacks=[regularizer()])
    trainer.fit(module, data(), data())
    trainer.validate(module, data())
    trainer.test(module, data())


class TakesTheIterator(Classifier):
    def training_step(self, dataloader_iter):
        batch, batch_idx, _ = next(dataloader_iter)
        return super().training_step(batch, batch_idx)


class WithClosure(Classifier):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)


def test_a_step_that_takes_the_iterator():
    ours, reference = TakesTheIterator(), Classifier()
    fit(ours, [regularizer()])
    by_hand(reference, lambda step: 0.02, 6)
    assert_same(ours, reference)


def test_a_closure_sees_one_function_in_all_its_calls():
    drawn = []

    class Watched(lh.HessianTrace):
        def value(self, context):
            drawn.append((context.probes.step, context.probes.draw(16, 0).tolist()))
            return super().value(context)

    fit(WithClosure(), [regularizer(penalty=Watched())], max_steps=2)
    for step in (0, 1):
        probes = [probe for at, probe in drawn if at == step]
        assert len(probes) > 1
        assert all(probe == probes[0] for probe in probes)


def test_the_same_callback_again_and_with_averaged_weights():
    callback, first, second = regularizer(), Classifier(), Classifier()
    fit(first, [StochasticWeightAveraging(0.05), callback], max_epochs=3)
    fit(second, [StochasticWeightAveraging(0.05), callback], max_epochs=3)
    assert torch.equal(weights(first), weights(second))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_made_during_fit_is_not_penalized(copied):
    class Copy(L.Callback):
        def on_train_start(self, trainer, pl_module):
            self.copy = copied(pl_module)

    keep, plain = Copy(), Classifier()
    fit(Classifier(), [regularizer(), keep])
    fit(keep.copy)
    fit(plain)
    assert torch.equal(weights(keep.copy), weights(plain))


def test_a_validation_step_may_call_the_training_step():
    class Shared(Classifier):
        def validation_step(self, batch, batch_idx):
            self.training_step(batch, batch_idx)

    ours, plain = Shared(), Classifier()
    trainer = L.Trainer(**CPU, max_epochs=1, callbacks=[regularizer()])
    trainer.fit(ours, data(), data())
    fit(plain, [regularizer()])
    assert torch.equal(weights(ours), weights(plain))


def test_the_same_callback_twice_is_refused():
    callback = regularizer()
    with pytest.raises(MisconfigurationException, match="twice"):
        fit(Classifier(), [callback, callback])


def test_resumed_in_the_middle_of_an_epoch_equals_uninterrupted(tmp_path):
    # The same batch all along: where the data go on after a restart is the data loader's affair.
    loader = DataLoader([next(iter(data(dtype=torch.float32)))] * 6, batch_size=None)
    whole, second = Classifier(dtype=torch.float32), Classifier(dtype=torch.float32)

    fit(whole, [regularizer(), SaveAt(tmp_path / "at-two.ckpt")], loader)
    fit(second, [regularizer()], loader, ckpt_path=tmp_path / "at-two.ckpt")
    assert torch.equal(weights(whole), weights(second))


@pytest.mark.parametrize("compiled", ["submodule", "module"])
def test_compiled_equals_eager(compiled):
    ours, eager = Classifier(), Classifier()
    if compiled == "submodule":
        ours.net.compile(backend="aot_eager")
        fit(ours, [regularizer(every_n_steps=2)])
    else:
        for module in (ours, eager):  # a compiled training step cannot log
            module.log = lambda *args, **kwargs: None
        fit(torch.compile(ours, backend="aot_eager"), [regularizer(every_n_steps=2)])
    fit(eager, [regularizer(every_n_steps=2)])
    assert_same(ours, eager)


def test_bf16_mixed_is_near_float32():
    def gradient(precision):
        module = Classifier(dtype=torch.float32, lr=1.0)
        before = weights(module)
        fit(module, [regularizer(1.0)], data(16, 16, torch.float32), precision=precision)
        return weights(module)[: 6 * 4] - before[: 6 * 4]

    full, mixed = gradient("32-true"), gradient("bf16-mixed")
    assert (full - mixed).norm() / full.norm() < 0.1


class Observed(Classifier):
    def on_train_batch_start(self, batch, batch_idx):
        self.was_wrapped = "training_step" in self.__dict__


def test_the_training_step_is_put_back_after_fit():
    module = Observed()
    fit(module, [regularizer()])
    assert module.was_wrapped
    assert "training_step" not in module.__dict__
    assert module.training


def test_the_training_step_is_put_back_after_an_exception():
    module = Classifier()

    class Fails(L.Callback):
        def on_train_batch_end(self, *_):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(module, [regularizer(), Fails()])
    assert "training_step" not in module.__dict__


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("taylor", r"multi_margin_loss \(called in net\.1\.2\)"),
        ("autograd", r"multi_margin_loss_backward \(called in net\.1\.2\)"),
    ],
)
def test_a_failing_step_leaves_everything_as_found(method, message):
    class Unsupported(nn.Module):
        def forward(self, x):
            return x * F.multi_margin_loss(x, torch.zeros(len(x), dtype=torch.long))

    module = Classifier(middle=nn.Sequential(nn.Dropout(0.3), nn.BatchNorm1d(6), Unsupported()))
    before, states = weights(module), []

    class State(L.Callback):
        def on_train_batch_start(self, *_):
            states.append(torch.get_rng_state())

    with pytest.raises(lh.HigherOrderError, match=message):
        fit(module, [regularizer(penalty=lh.HessianTrace(method=method)), State()])
    assert torch.equal(before, weights(module))
    assert torch.equal(states[0], torch.get_rng_state())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert "training_step" not in module.__dict__
    fit(module)  # and it still trains


def test_memory_is_flat_and_nothing_is_kept_alive():
    module = Classifier(dtype=torch.float32)
    live = LiveTensors((20, 300), collect=True)
    with no_garbage_collector():
        fit(module, [regularizer(), live], data(dtype=torch.float32), max_steps=301, max_epochs=-1)
    assert live.counts[0] == live.counts[1]
    alive = weakref.ref(module)
    del module, live  # Lightning hands the module's methods to a callback
    gc.collect()
    assert alive() is None


def test_no_step_leaves_a_cycle_behind():
    """Without the collector the number of tensors stays the same from step to step."""
    module = Classifier(dtype=torch.float32)
    live = LiveTensors((10, 30))
    with no_garbage_collector():
        fit(module, [regularizer(), live], data(dtype=torch.float32), max_steps=30, max_epochs=-1)
    assert live.counts[0] == live.counts[1]


class NotFinite(lh.Penalty):
    name = "odd"

    def value(self, context):
        return context.loss * (float("nan") if context.probes.step in (1, 3) else 1.0)


def test_a_nonfinite_penalty_trains_that_step_on_the_task_loss_counts_and_warns_once():
    ours, reference, recorder = Classifier(), Classifier(), Recorder()
    callback = regularizer(0.5, penalty=NotFinite())
    with pytest.warns(UserWarning, match=r"penalty odd is nan at step 1.*task loss alone") as warned:
        fit(ours, [callback, recorder])
    assert sum("task loss alone" in str(w.message) for w in warned) == 1
    plain_loop(
        reference, lambda module, x, y, step: (1.0 if step in (1, 3) else 1.5) * task_loss(module, (x, y)), data()
    )
    assert_same(ours, reference)
    assert callback.nonfinite_steps == 2
    assert recorder.rows[-1]["train/odd_skipped"] == 2


def test_each_of_two_penalties_counts_and_warns_for_itself():
    class Sound(lh.Penalty):
        name = "odd"

        def value(self, context):
            return context.loss

    recorder = Recorder()
    callback = lh.HessianRegularizer([Sound(), NotFinite(), NotFinite()], [0.5, 0.5, 0.0])
    other = lh.HessianRegularizer(NotFinite(), 0.5)
    with all_warnings() as told:
        fit(Classifier(), [callback, other, recorder])
    for name in ("odd_2", "odd_4"):
        assert sum(f"The penalty {name} is nan at step 1" in message for message in told) == 1
        assert recorder.rows[-1][f"train/{name}_skipped"] == 2
    assert not {"train/odd_skipped", "train/odd_3_skipped"} & set(recorder.rows[-1])
    assert (callback.nonfinite_steps, other.nonfinite_steps) == (2, 2)


def test_a_nonfinite_penalty_can_raise():
    with pytest.raises(FloatingPointError, match="odd is nan at step 1"):
        fit(Classifier(), [regularizer(penalty=NotFinite(), on_nonfinite="raise")])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": -1.0}, "strength=-1.0"),
        ({"strength": float("nan")}, "strength=nan"),
        ({"strength": float("inf")}, "strength=inf"),
        ({"strength": "1"}, "strength='1'"),
        ({"every_n_steps": 0}, "every_n_steps=0"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"start": 1.0}, "start=1.0 must be a number from 0 to below 1"),
        ({"start": -0.1}, "start=-0.1"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite='ignore'"),
        ({"penalty": "hessian_trace"}, "not a Penalty"),
        ({"seed": "abc"}, "seed='abc'"),
    ],
)
def test_bad_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        lh.HessianRegularizer(**{"penalty": lh.HessianTrace(), **settings})


class Returns(Classifier):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def training_step(self, batch, batch_idx):
        return self.output(super().training_step(batch, batch_idx))


def frozen():
    module = Classifier()
    module.requires_grad_(False)
    return module


@pytest.mark.parametrize(
    ("module", "callback", "message"),
    [
        (without_automatic_optimization, regularizer, "HessianRegularizationMixin"),
        (frozen, regularizer, "requires_grad_"),
        (Classifier, lambda: regularizer(penalty=lh.HessianTrace(parameters="net.O.*")), r"Near names: .*net\.0\.bias"),
        (lambda: Returns(lambda loss: loss.detach()), regularizer, "has no graph"),
        (lambda: Returns(lambda loss: loss.item()), regularizer, "returned a float"),
        (lambda: Returns(lambda loss: {"lost": loss}), regularizer, "its keys: lost"),
        (lambda: Returns(lambda loss: loss.expand(3)), regularizer, r"shape \(3,\)"),
    ],
)
def test_bad_modules(module, callback, message):
    module = module()
    before = weights(module)
    with pytest.raises(MisconfigurationException, match=message):
        fit(module, [callback()])
    assert torch.equal(before, weights(module))
    assert "training_step" not in module.__dict__


def test_an_empty_batch_is_refused():
    empty = [(torch.empty(0, 4, dtype=torch.float64), torch.empty(0, dtype=torch.long))]
    with pytest.raises(MisconfigurationException, match="batch is empty"):
        fit(Classifier(), [regularizer()], DataLoader(empty, batch_size=None))


@pytest.mark.parametrize("penalty", [lh.HessianTrace(method="autograd"), lh.HessianNorm()])
def test_float16_is_refused_unless_asked_for(penalty):
    from lightning.pytorch.plugins import MixedPrecision

    def run(**settings):
        half = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
        regularizer = lh.HessianRegularizer(penalty, strength=1e-2, **settings)
        fit(smooth(dtype=torch.float32), [regularizer], data(dtype=torch.float32), max_steps=1, plugins=[half])

    with pytest.raises(MisconfigurationException, match="allow_fp16=True"):
        run()
    run(allow_fp16=True)


def test_lightning_cli(tmp_path, monkeypatch):
    from lightning.pytorch.cli import LightningCLI

    monkeypatch.chdir(tmp_path)

    class Model(Classifier):
        def __init__(self):
            super().__init__()

    class Data(L.LightningDataModule):
        def train_dataloader(self):
            return data()

    cli = LightningCLI(
        Model,
        Data,
        args=[
            "fit",
            "--trainer.accelerator=cpu",
            "--trainer.fast_dev_run=2",
            "--trainer.callbacks+=lightning_hessian.HessianRegularizer",
            "--trainer.callbacks.penalty=lightning_hessian.HessianTrace",
            "--trainer.callbacks.penalty.keep=0.5",
            "--trainer.callbacks.strength=0.01",
        ],
        save_config_callback=None,
    )
    callback = next(c for c in cli.trainer.callbacks if isinstance(c, lh.HessianRegularizer))
    assert (callback.strength, callback.penalty.keep) == (0.01, 0.5)


class Halved(L.Callback):
    def on_after_backward(self, trainer, pl_module):
        pl_module.net[0].weight.grad.mul_(0.5)


@pytest.mark.parametrize(
    "penalty",
    [lambda: lh.HessianTrace(), lambda: lh.HessianTrace(method="gauss_newton"), lambda: lh.HessianNorm()],
    ids=["trace", "gauss_newton", "norm"],
)
def test_a_hook_on_a_gradient_sees_the_one_that_is_trained_on_and_no_other(penalty):
    hooked, plain, calls = Classifier(), Classifier(), []

    def halve(gradient):
        calls.append(1)
        return 0.5 * gradient

    hooked.net[0].weight.register_hook(halve)
    fit(hooked, [lh.HessianRegularizer(penalty(), 0.05)])
    fit(plain, [lh.HessianRegularizer(penalty(), 0.05), Halved()])
    assert len(calls) == 6
    torch.testing.assert_close(weights(hooked), weights(plain), rtol=1e-10, atol=1e-12)


def test_settings_may_change_during_a_fit():
    class Stronger(lh.HessianRegularizer):
        def strengths_at(self, step):
            return [2 * strength for strength in super().strengths_at(step)]

    class Reseeds(L.Callback):
        def on_fit_start(self, trainer, pl_module):
            regularizers[0].seed = 7

    seen = []

    class Looks(lh.Penalty):
        name = "looks"

        def value(self, context):
            seen.append(context.probes.seed)
            return context.loss

    recorder = Recorder()
    regularizers = [Stronger(Looks(), 0.25)]
    fit(Classifier(), [*regularizers, Reseeds(), recorder], max_steps=1)
    assert seen == [7]
    assert recorder.rows[0]["train/penalty"] == pytest.approx(0.5 * recorder.rows[0]["curvature/looks"])


def test_a_callback_that_wraps_the_step_between_two_regularizers():
    class Wraps(L.Callback):
        def setup(self, trainer, pl_module, stage):
            step = pl_module.training_step
            pl_module.training_step = lambda batch, batch_idx: step(batch, batch_idx)

    both = [lh.HessianRegularizer(lh.HessianTrace(seed_free), 0.01) for seed_free in (1, 2)]
    plain, between = Classifier(), Classifier()
    fit(plain, both, max_steps=2)
    fit(between, [both[0], Wraps(), both[1]], max_steps=2)
    assert_same(plain, between)


def test_names_are_unique_whatever_they_are():
    class Named(lh.Penalty):
        def __init__(self, name):
            self._name = name

        @property
        def name(self):
            return self._name

        def value(self, context):
            return context.loss

    assert unique_names([Named("a_2"), Named("a"), Named("a")]) == ["a_2", "a", "a_3"]
