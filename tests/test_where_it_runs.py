"""The methods of the trace penalty in the surroundings of ordinary training: precision, compilers, kernels, devices."""

import functools

import lightning as L
import pytest
import torch
import torch._dynamo.testing
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from nets import (
    CPU,
    Checkpointed,
    Classifier,
    Manual,
    Silent,
    context_of,
    data,
    fit,
    plain_loop,
    smooth,
    task_loss,
    weights,
)
from oracles import DIFFERENCES, loss_by_differences, relative_error
from ranks import STEPS, Result, dealt, fit_two, handed_over, joined
from torch import nn
from torch.nn import functional as F

import lightning_hessian as lh

STRENGTH = 1e-2
METHODS = (*DIFFERENCES, "gauss_newton", "autograd")


def callback(method, **settings):
    return lh.HessianRegularizer(lh.HessianTrace(method=method), strength=STRENGTH, **settings)


def trained(module, method, **settings):
    fit(module, [callback(method)] if method else [], max_steps=2, **settings)
    return weights(module)


class Images(Classifier):
    """Any network on eight numbers a sample."""

    def __init__(self, net, dtype=torch.float64):
        super().__init__()
        self.net = net.to(dtype)


class Attends(nn.Module):
    """A Transformer layer over the four numbers of a sample, dropout 0: PyTorch takes the fused kernel."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Linear(1, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="gelu", batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layer(self.embed(x.unsqueeze(2))).mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.lstm = nn.LSTM(1, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.lstm(x.unsqueeze(2))[0][:, -1])


class WithCheckpoint(nn.Sequential):
    def __init__(self, use_reentrant=None):
        torch.manual_seed(3)
        block = nn.Sequential(nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 6))
        super().__init__(nn.Linear(4, 6), Checkpointed(block, use_reentrant), nn.Linear(6, 3))


def expected(net, method):
    """Two steps in plain code."""

    def loss_of(module, x, y, step):
        loss = functools.partial(task_loss, batch=(x, y))
        return loss_by_differences(method, module, loss, STRENGTH, step=step, micro_batch=step)

    return plain_loop(Images(net), loss_of, list(data(8))[:2])


@pytest.mark.parametrize("method", DIFFERENCES)
@pytest.mark.parametrize("net", [Attends, Recurrent, WithCheckpoint])
def test_fused_attention_and_recurrent_layers_run_as_they_are(net, method):
    torch.testing.assert_close(trained(Images(net()), method), expected(net(), method), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", DIFFERENCES)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints_of_both_kinds_change_nothing(use_reentrant, method):
    ours = trained(Images(WithCheckpoint(use_reentrant)), method)
    torch.testing.assert_close(ours, trained(Images(WithCheckpoint()), method), rtol=1e-9, atol=1e-10)


def test_reentrant_checkpoints_in_a_static_graph_are_refused(tmp_path):
    message = "DDP with static_graph=True counts the backward passes"
    with pytest.raises(Exception, match=message):
        fit_two(tmp_path, Images(WithCheckpoint(True)), callback("two_pass"), data(8), static_graph=True)


@pytest.mark.parametrize("net", [Attends, Recurrent])
def test_gauss_newton_through_attention_and_recurrent_layers_equals_the_context(net):
    module, plain = Images(net()), Images(net())
    fit(module, [callback("gauss_newton")], max_steps=1)
    x, y = next(iter(data(8)))
    optimizer = plain.configure_optimizers()
    context = context_of(plain, task_loss, (x, y))
    (context.loss + STRENGTH * lh.HessianTrace(method="gauss_newton")(context)).backward()
    optimizer.step()
    torch.testing.assert_close(weights(module), weights(plain), rtol=1e-9, atol=1e-10)


def test_gauss_newton_with_a_compiled_network_runs_it_eagerly():
    ours, eager = Classifier(), Classifier()
    ours.net.compile(backend="aot_eager")
    torch.testing.assert_close(trained(ours, "gauss_newton"), trained(eager, "gauss_newton"), rtol=1e-9, atol=1e-10)


def test_the_refusal_of_a_reentrant_checkpoint_names_a_method_that_works():
    with pytest.raises(lh.HigherOrderError, match=r"method='two_pass'"):
        trained(Images(WithCheckpoint(use_reentrant=True)), "autograd")


@pytest.mark.parametrize("method", DIFFERENCES)
@pytest.mark.parametrize("what", ["submodule", "LightningModule"])
def test_compiled_steps_stay_compiled(what, method):
    def fitted(callbacks):
        torch._dynamo.reset()
        counter, module = torch._dynamo.testing.CompileCounterWithBackend("aot_eager"), Silent()
        if what == "submodule":
            module.net.compile(backend=counter)
        fit(module if what == "submodule" else torch.compile(module, backend=counter), callbacks, max_steps=4)
        return weights(module), counter.frame_count

    eager = Silent()
    fit(eager, [callback(method)], max_steps=4)
    ours, frames = fitted([callback(method)])
    torch.testing.assert_close(ours, weights(eager), rtol=1e-8, atol=1e-9)
    assert frames == fitted([])[1]  # all passes run the same code


@pytest.mark.parametrize("method", ["two_pass", "gauss_newton"])
def test_bfloat16_is_near_float32(method):
    def step(precision):
        module = smooth(dtype=torch.float32, lr=1.0)
        before = weights(module)
        fit(module, [callback(method)], data(16, 16, torch.float32), precision=precision)
        return weights(module) - before

    assert relative_error(step("bf16-mixed"), step("32-true")) < 0.05


def test_central_differences_in_bfloat16_are_refused():
    with pytest.raises(MisconfigurationException, match=r"train on noise.*method='autograd'"):
        fit(Classifier(), [callback("central_difference")], precision="bf16-mixed")


@pytest.mark.parametrize("method", DIFFERENCES)
def test_float16_with_a_scaler_is_near_float32(method):
    """Small losses, whose gradients float16 cannot hold unscaled."""

    class Small(Classifier):
        def training_step(self, batch, batch_idx):
            return 1e-4 * F.cross_entropy(self.net(batch[0]), batch[1])

    def step(**settings):
        module = Small(middle=nn.LayerNorm(6), dtype=torch.float32, lr=1e4)
        before = weights(module)
        fit(module, [callback(method)], data(16, 16, torch.float32), max_steps=1, **settings)
        return weights(module) - before

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    half = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    if method == "central_difference":
        with pytest.raises(MisconfigurationException, match="train on noise"):
            step(plugins=[half])
        return
    assert relative_error(step(plugins=[half]), step()) < 0.05


def test_a_float16_overflow_is_left_to_the_scaler():
    module = smooth(dtype=torch.float32)
    before = weights(module)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    trainer = fit(
        module,
        [callback("two_pass")],
        data(16, 16, torch.float32),
        max_steps=1,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)],
    )
    assert torch.equal(weights(module), before)
    assert scaler.get_scale() == 2.0**59
    assert "train/hessian_trace_skipped" not in trainer.logged_metrics


@pytest.mark.parametrize("method", [*DIFFERENCES, "gauss_newton"])
def test_manual_optimization_equals_the_callback(method):
    torch.testing.assert_close(
        trained(Manual(callback(method)), None), trained(Classifier(), method), rtol=1e-10, atol=1e-12
    )


def test_a_step_that_takes_the_iterator_is_refused():
    class Iterates(Classifier):
        def training_step(self, dataloader_iter):
            batch, _, _ = next(dataloader_iter)
            return F.cross_entropy(self.net(batch[0]), batch[1])

    with pytest.raises(MisconfigurationException, match=r"would take another batch.*method='autograd'"):
        fit(Iterates(), [callback("two_pass")])


@pytest.mark.parametrize("method", METHODS)
def test_every_fourth_step_and_a_schedule(method):
    strengths = []

    def schedule(step):
        strengths.append(step)
        return 1e-3 * (step + 1)

    regularizer = lh.HessianRegularizer(lh.HessianTrace(method=method), strength=schedule, every_n_steps=4)
    assert regularizer.strengths_at(4) == [4 * 1e-3 * 5]
    assert regularizer.strengths_at(5) == [0.0]
    module = smooth()
    fit(module, [regularizer], data(8), max_steps=5)
    assert strengths[-1] == 4
    if method in DIFFERENCES:
        acting = {0: 4e-3, 4: 20e-3}

        def loss_of(module, x, y, step):
            loss = functools.partial(task_loss, batch=(x, y))
            if step not in acting:
                return loss(module)
            return loss_by_differences(method, module, loss, acting[step], step=step, micro_batch=step)

        plain = plain_loop(smooth(), loss_of, list(data(8))[:5])
        torch.testing.assert_close(weights(module), plain, rtol=1e-7, atol=1e-9)


def test_a_schedule_that_turns_negative_is_refused():
    regularizer = lh.HessianRegularizer(lh.HessianTrace(), strength=lambda step: 0.1 - step)
    with pytest.raises(ValueError, match="A negative one would reward curvature"):
        fit(Classifier(), [regularizer], max_steps=3)


class Sharded(Classifier):
    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        for layer in (self.net[0], self.net[3], self.net):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])


class Gathered(Result):
    def weights(self, module):
        return torch.cat([p.detach().full_tensor().reshape(-1) for p in module.parameters()])


def sharded_fit(rank, path, method, settings, port):
    import os

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": "2", "NODE_RANK": "0"}
    torch.set_num_threads(1)
    dtype = torch.float32 if "precision" in settings else torch.float64
    accumulated = settings.get("accumulate_grad_batches", 1)
    loader = data(8 // accumulated, dtype=dtype)
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    trainer = L.Trainer(
        **CPU, max_steps=STEPS, callbacks=[callback(method), Gathered(path)], devices=2, strategy=strategy,
        use_distributed_sampler=False, **settings,
    )  # fmt: skip
    trainer.fit(Sharded(middle=nn.LayerNorm(6), dtype=dtype), dealt(loader))


@pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="this version of PyTorch has no FSDP2 on the CPU"
)
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        *((method, {}) for method in DIFFERENCES),
        ("two_pass", {"accumulate_grad_batches": 2}),
        ("two_pass", {"precision": "bf16-mixed"}),
    ],
    ids=str,
)
def test_fsdp2_on_two_processes_equals_one(tmp_path, method, settings):
    from torch.distributed.elastic.utils.distributed import get_free_port

    torch.multiprocessing.start_processes(
        sharded_fit, (tmp_path, method, settings, get_free_port()), nprocs=2, start_method="fork"
    )
    first, second = handed_over(tmp_path)
    assert torch.equal(first["weights"], second["weights"])
    assert first["logged"][0]["curvature/hessian_trace"] == second["logged"][0]["curvature/hessian_trace"]
    module = smooth()
    before = nn.utils.parameters_to_vector(module.parameters()).detach()
    optimizer = module.configure_optimizers()
    accumulated = settings.get("accumulate_grad_batches", 1)
    for count, (x, y) in enumerate(joined(data(8 // accumulated), STEPS * accumulated)):
        step = count // accumulated
        loss = functools.partial(task_loss, batch=(x, y))
        whole = loss_by_differences(method, module, loss, STRENGTH, step=step, micro_batch=count)
        (whole / accumulated).backward()
        if (count + 1) % accumulated == 0:
            optimizer.step()
            optimizer.zero_grad()
    expected = nn.utils.parameters_to_vector(module.parameters()).detach()
    if "precision" in settings:  # 8 bits
        assert relative_error(first["weights"] - before, expected - before) < 0.02
    else:
        torch.testing.assert_close(first["weights"], expected, rtol=1e-5, atol=1e-5)
