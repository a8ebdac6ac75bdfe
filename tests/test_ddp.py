"""Two ranks equal one rank with the joined batch; estimates are reduced for the logs."""

import functools

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from nets import (
    CPU,
    Classifier,
    context_of,
    context_of_inputs,
    data,
    fit,
    plain_loop,
    root_of_zero,
    smooth,
    task_loss,
    weights,
)
from oracles import loss_by_differences
from ranks import STEPS, Result, fit_two, joined
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lightning_hessian as lh
from lightning_hessian.curvature import ProbeSource
from lightning_hessian.regularization.callback import enlist
from lightning_hessian.regularization.fit import RegularizedFit
from lightning_hessian.step.lightning_loop import LightningLoop


def callback(penalty, **settings):
    return lh.HessianRegularizer(penalty, strength=0.02, **settings)


def exact(module, x, y, step):
    context = context_of(module, task_loss, (x, y))
    return context.loss + 0.02 * lh.HessianTrace(probes=-1)(context)


def with_each_ranks_own_probe(module, x, y, step, method="autograd"):
    total = 0
    for rank, halves in enumerate(zip(x.chunk(2), y.chunk(2), strict=True)):
        context = context_of(module, task_loss, halves, probes=ProbeSource(0, step, step, rank))
        total = total + (context.loss + 0.02 * lh.HessianTrace(method=method)(context)) / 2
    return total


class Unused(Classifier):
    def __init__(self):
        super().__init__(middle=nn.LayerNorm(6))
        self.spare = nn.Linear(3, 3).double()


CASES = {
    "exact": (lh.HessianTrace(probes=-1), exact, {}),
    "own probes": (lh.HessianTrace(), with_each_ranks_own_probe, {}),
    "unused parameters": (lh.HessianTrace(probes=-1), exact, {"find_unused_parameters": True}),
    "static graph": (lh.HessianTrace(), with_each_ranks_own_probe, {"static_graph": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one(tmp_path, case):
    penalty, of_one, strategy = CASES[case]

    def module():
        return Unused() if case == "unused parameters" else smooth()

    loader = data(8)
    first, second = fit_two(tmp_path, module(), callback(penalty), loader, **strategy)
    assert torch.equal(first["weights"], second["weights"])
    torch.testing.assert_close(first["weights"], plain_loop(module(), of_one, joined(loader)), rtol=1e-6, atol=1e-6)
    # The logged value is the mean over ranks, the same on both.
    assert first["logged"][0]["curvature/hessian_trace"] == second["logged"][0]["curvature/hessian_trace"]
    if case == "exact":
        (x, y), fresh = next(joined(loader)), module()
        value = penalty(context_of(fresh, task_loss, (x, y)))
        assert first["logged"][0]["curvature/hessian_trace"] == pytest.approx(value.item())


ON_INPUTS = {
    "hessian": lh.InputHessianNorm(),
    "lanczos": lh.InputHessianNorm(3, "lanczos"),
    "finite differences": lh.InputHessianNorm(method="finite_difference"),
    "gradient": lh.InputGradientNorm(),
    "jacobian": lh.JacobianNorm(projections=-1),
}


FIRST_ORDER = {
    "two_pass": {},
    "central_difference": {},
    "gauss_newton": {},
    "taylor": {},
    "taylor, unused parameters": {"find_unused_parameters": True},
    "taylor, static graph": {"static_graph": True},
    "two_pass, unused parameters": {"find_unused_parameters": True},
    "two_pass, static graph": {"static_graph": True, "gradient_as_bucket_view": True},
}


@pytest.mark.parametrize("case", FIRST_ORDER)
def test_two_ranks_equal_one_for_methods_of_ordinary_passes(tmp_path, case):
    method, loader = case.partition(",")[0], data(8)

    def of_one(module, x, y, step):
        if method in ("gauss_newton", "taylor"):
            return with_each_ranks_own_probe(module, x, y, step, method)
        total = 0
        for rank, halves in enumerate(zip(x.chunk(2), y.chunk(2), strict=True)):
            key = {"step": step, "micro_batch": step, "rank": rank}
            loss = functools.partial(task_loss, batch=halves)
            total = total + loss_by_differences(method, module, loss, 0.02, **key) / 2
        return total

    def module():
        return Unused() if "unused" in case else smooth()

    regularizer = callback(lh.HessianTrace(method=method))
    first, second = fit_two(tmp_path, module(), regularizer, loader, **FIRST_ORDER[case])
    assert torch.equal(first["weights"], second["weights"])
    torch.testing.assert_close(first["weights"], plain_loop(module(), of_one, joined(loader)), rtol=1e-6, atol=1e-6)
    logged = [rank["logged"][0][f"curvature/{regularizer.penalty.name}"] for rank in (first, second)]
    assert logged[0] == logged[1]


@pytest.mark.parametrize("method", ["taylor", "autograd", "central_difference"])
def test_two_ranks_equal_one_for_the_norm_of_the_mean_hessian(tmp_path, method):
    """The same fit in one process, where a batch is that of both ranks."""

    def fitted():
        module, result = smooth(), Result(tmp_path)
        batches = DataLoader(list(joined(loader)), batch_size=None)
        fit(module, [callback(lh.HessianNorm(method=method)), result], batches, max_steps=STEPS)
        return weights(module), result.logged

    loader = data(8)
    regularizer = callback(lh.HessianNorm(method=method))
    first, second = fit_two(tmp_path, smooth(), regularizer, loader)
    expected, logged = fitted()
    assert torch.equal(first["weights"], second["weights"])
    torch.testing.assert_close(first["weights"], expected, rtol=1e-6, atol=1e-6)
    for one, other, joint in zip(first["logged"], second["logged"], logged, strict=True):
        assert one["curvature/hessian_norm"] == other["curvature/hessian_norm"]
        assert one["curvature/hessian_norm"] == pytest.approx(joint["curvature/hessian_norm"], rel=1e-6)


@pytest.mark.parametrize("name", ON_INPUTS)
def test_two_ranks_equal_one_for_penalties_on_the_inputs(tmp_path, name):
    penalty, loader = ON_INPUTS[name], data(8)

    def of_one(module, x, y, step):
        context = context_of_inputs(module, x, y)
        return context.loss + 0.02 * penalty(context)

    first, second = fit_two(tmp_path, smooth(), callback(penalty), loader)
    assert torch.equal(first["weights"], second["weights"])
    expected = plain_loop(smooth(), of_one, joined(loader))
    torch.testing.assert_close(first["weights"], expected, rtol=1e-6, atol=1e-6)
    logged = [rank["logged"][0][f"curvature/{penalty.name}"] for rank in (first, second)]
    assert logged[0] == logged[1] > 0


class UnusedWithBatchNorm(Unused):
    def __init__(self):
        super().__init__()
        self.net[1] = nn.BatchNorm1d(6).double()


def test_batch_norm_takes_its_second_pass_on_two_ranks(tmp_path):
    penalty, loader = lh.InputHessianNorm(), data(8)

    def of_one(module, x, y, step):
        """Each rank normalizes by its own half, and begins with the buffers of rank 0, as DDP has it."""
        before, after, total = dict(module.net.named_buffers()), [], 0

        def run(inputs, training):
            module.net.train(training)
            buffers = {name: buffer.clone() for name, buffer in before.items()}
            outputs = torch.func.functional_call(module.net, buffers, (inputs,))
            after.append(buffers)
            return outputs

        for inputs, targets in zip(x.chunk(2), y.chunk(2), strict=True):
            task = F.cross_entropy(run(inputs, training=True), targets)
            context = lh.StepContext.evaluate(
                lambda inputs, targets=targets: F.cross_entropy(run(inputs, training=False), targets),
                inputs,
                dict(module.named_parameters()),
            )
            total = total + (task + 0.02 * penalty(context)) / 2
        module.net.load_state_dict(after[0], strict=False)
        return total

    first, _ = fit_two(tmp_path, UnusedWithBatchNorm(), callback(penalty), loader, find_unused_parameters=True)
    torch.testing.assert_close(
        first["weights"], plain_loop(UnusedWithBatchNorm(), of_one, joined(loader)), rtol=1e-6, atol=1e-6
    )


class NotFiniteOnOneRank(lh.Penalty):
    name = "odd"

    def value(self, context):
        bad = context.probes.step == 1 and dist.get_rank() == 1
        return context.loss * (float("nan") if bad else 1.0)


def test_a_penalty_that_is_not_finite_on_one_rank_is_skipped_on_all(tmp_path):
    def task_loss_alone_at_step_1(module, x, y, step):
        return (1.0 if step == 1 else 1.02) * task_loss(module, (x, y))

    loader = data(8)
    module = smooth()
    first, _ = fit_two(tmp_path, module, callback(NotFiniteOnOneRank()), loader)
    expected = plain_loop(smooth(), task_loss_alone_at_step_1, joined(loader))
    torch.testing.assert_close(first["weights"], expected, rtol=1e-6, atol=1e-6)


def test_sync_batch_norm_is_refused_by_name(monkeypatch):
    # DDP itself refuses these layers on a CPU, so several processes are pretended.
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    module = nn.SyncBatchNorm.convert_sync_batchnorm(Classifier())
    message = r"'net\.1' is a SyncBatchNorm.*sync_batchnorm=False"
    with pytest.raises(lh.HigherOrderError, match=message), lh.higher_order(module):
        pass


@pytest.mark.parametrize("strategy", ["FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"])
def test_sharded_parameters_are_refused(strategy, monkeypatch):
    import lightning.pytorch.strategies as strategies

    sharded = getattr(strategies, strategy)
    trainer = L.Trainer(**CPU)
    module = Classifier()
    module.trainer = trainer
    monkeypatch.setattr(L.Trainer, "precision", "32-true")
    monkeypatch.setattr(L.Trainer, "strategy", sharded.__new__(sharded))
    message = rf"{strategy} shards the parameters.*HessianTrace\(\), HessianTrace\(method='two_pass'\)"
    refused = [lh.HessianTrace(method=method) for method in ("autograd", "gauss_newton")]
    refused += [lh.HessianTrace(-1), lh.HessianNorm(), lh.HessianNorm(method="central_difference"), lh.JacobianNorm()]
    if strategy != "ModelParallelStrategy":  # FSDP2
        refused += [lh.HessianTrace(), lh.HessianTrace(method="two_pass")]
    for penalty in refused:
        fit = RegularizedFit(module, LightningLoop(module.trainer, module))
        enlist(fit, [callback(penalty)])
        with pytest.raises(MisconfigurationException, match=message):
            fit.start()


class BadOnRankOne(lh.HessianTrace):
    """Finite, and from the second step on without a finite gradient on one of the ranks."""

    def value(self, context):
        value = super().value(context)
        if dist.get_rank() == 1 and context.probes.step >= 1:
            value = value + root_of_zero(next(iter(context.parameters.values())))
        return value


@pytest.mark.parametrize("strategy", [{}, {"gradient_as_bucket_view": True}], ids=str)
def test_a_gradient_that_is_not_finite_on_one_rank_lets_all_train_on_the_task_loss(tmp_path, strategy):
    regularizer = callback(BadOnRankOne(probes=-1))
    first, second = fit_two(tmp_path, smooth(), regularizer, data(8), **strategy)
    assert torch.equal(first["weights"], second["weights"])
    assert first["logged"][-1]["train/hessian_trace_skipped"] == STEPS - 1

    def only_first(module, x, y, step):
        return exact(module, x, y, step) if step == 0 else task_loss(module, (x, y))

    expected = plain_loop(smooth(), only_first, joined(data(8)))
    torch.testing.assert_close(first["weights"], expected, rtol=1e-6, atol=1e-8)
