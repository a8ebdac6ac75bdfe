"""The methods of the trace penalty in the surroundings of ordinary training: precision, compilers, kernels, devices."""

import functools
import gc
import weakref
from typing import ClassVar

import lightning as L
import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
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
from oracles import DIFFERENCES, loss_by_differences, relative_error, sharp_loss
from ranks import STEPS, Result, dealt, fit_two, handed_over, joined, needs_fsdp2, on_two_processes
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lightning_hessian as lh
from lightning_hessian.curvature.taylor import taylor_mode
from lightning_hessian.curvature.taylor.coefficients import has_coefficients

STRENGTH = 1e-2
METHODS = (*DIFFERENCES, "gauss_newton", "autograd")


def callback(method, **settings):
    penalty = lh.ConfidencePenalty() if method == "confidence" else lh.HessianTrace(method=method)
    return lh.HessianRegularizer(penalty, strength=STRENGTH, **settings)


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


@pytest.mark.parametrize(
    ("method", "what"),
    [*((method, what) for method in DIFFERENCES for what in ("submodule", "LightningModule")),
     ("confidence", "submodule")],
)  # fmt: skip
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


def test_the_first_look_allows_for_the_rounding_of_half_precision(monkeypatch):
    original = taylor_mode.first
    monkeypatch.setattr(taylor_mode, "first", lambda mode, loss: tuple(1.15 * x for x in original(mode, loss)))
    settings = {"loader": data(16, 16, torch.float32), "max_steps": 1}
    fit(smooth(dtype=torch.float32), [callback("taylor")], precision="bf16-mixed", **settings)
    with pytest.raises(lh.HigherOrderError, match="lost a part of the loss"):
        fit(smooth(dtype=torch.float32), [callback("taylor")], **settings)


def test_lost_coefficients_are_seen_on_the_first_step_that_moves_their_parameters():
    scripted = torch.jit.trace(torch.tanh, torch.ones(2, 16, dtype=torch.float64))

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = nn.Linear(4, 16), nn.Linear(4, 16), nn.Linear(16, 3)

        def forward(self, x):
            return self.last(scripted(self.first(x)) + self.second(x).tanh())

    for seed in range(4):
        module = smooth()
        module.net = Branches().double()
        callback = lh.HessianRegularizer(lh.HessianTrace(keep=0.2), 0.1, seed=seed)
        with pytest.raises(lh.HigherOrderError, match="lost a part of the loss"):
            fit(module, [callback], max_steps=20, max_epochs=-1)


def test_central_differences_in_bfloat16_are_refused():
    with pytest.raises(MisconfigurationException, match=r"train on noise.*method='autograd'"):
        fit(Classifier(), [callback("central_difference")], precision="bf16-mixed")


@pytest.mark.parametrize("method", [*DIFFERENCES, "taylor", "confidence"])
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


def wide():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 1024), nn.SiLU(), nn.Linear(1024, 1024), nn.SiLU(), nn.Linear(1024, 3))


def convolutional():
    torch.manual_seed(3)
    layers = [nn.Unflatten(1, (1, 2, 2))]
    for channels in (1, 32, 32, 32, 32, 32):
        layers += [nn.Conv2d(channels, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.SiLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 3))


@pytest.mark.parametrize("net", [wide, convolutional, Attends])
def test_taylor_coefficients_stay_in_the_range_of_float16(net):
    def step(**settings):
        module = Images(net(), torch.float32)
        module.lr = 1e-2
        before = weights(module)
        trainer = fit(module, [callback("taylor")], data(16, 16, torch.float32), max_steps=1, **settings)
        return weights(module) - before, trainer.logged_metrics["curvature/hessian_trace"].item()

    half = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**7))
    moved, value = step(plugins=[half])
    exact, exact_value = step()
    assert relative_error(moved, exact) < 0.01
    assert value == pytest.approx(exact_value, rel=0.01)


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
    """Parameters sharded by FSDP2, in several groups."""

    fully_shard: ClassVar = {}

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        for layer in (self.net[0], self.net[3], self.net):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"], **self.fully_shard)


class ShardedManual(Sharded, Manual):
    pass


class Validated(Sharded):
    """A forward pass without a backward pass leaves parameters whole."""

    def on_train_batch_start(self, batch, batch_idx):
        with torch.no_grad():
            self.net(batch[0])


class Gathered(Result):
    def weights(self, module):
        whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in module.parameters()]
        return torch.cat([p.detach().reshape(-1) for p in whole])


class BadGradientOnRankOne(lh.HessianTrace):
    """On the second step one rank's penalty is finite, and its gradient is not."""

    def value(self, context):
        value = super().value(context)
        if context.probes.step == 1 and dist.is_initialized() and dist.get_rank() == 1:
            value = value + (value - value.detach()).square().sqrt()
        return value


def sharded_fit(rank, path, module, penalty, settings):
    dtype = next(module.parameters()).dtype
    loader = data(8 // settings.get("accumulate_grad_batches", 1), dtype=dtype)
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    regularizer = lh.HessianRegularizer(penalty, strength=STRENGTH)
    callbacks = [Gathered(path)]
    if isinstance(module, Manual):
        module.regularizer = regularizer
    else:
        callbacks.insert(0, regularizer)
    trainer = L.Trainer(
        **CPU, max_steps=STEPS, callbacks=callbacks, devices=2, strategy=strategy, use_distributed_sampler=False,
        **settings,
    )  # fmt: skip
    trainer.fit(module, dealt(loader))


def unsharded_fit(penalty, settings):
    """The weights of one process, and the values of the penalty if it has a graph."""
    module, values = smooth(), []
    optimizer = module.configure_optimizers()
    accumulated = settings.get("accumulate_grad_batches", 1)
    for count, batch in enumerate(joined(data(8 // accumulated), STEPS * accumulated)):
        step = count // accumulated
        if penalty.needs.differences:
            loss = functools.partial(task_loss, batch=batch)
            whole = loss_by_differences(penalty.method, module, loss, STRENGTH, step=step, micro_batch=count)
        else:
            context = context_of(module, task_loss, batch, probes=lh.ProbeSource(0, step, count, 0))
            values.append(penalty(context))  # by autograd, because the loss is computed already
            is_left_out = isinstance(penalty, BadGradientOnRankOne) and step == 1
            whole = context.loss if is_left_out else context.loss + STRENGTH * values[-1]
        (whole / accumulated).backward()
        if (count + 1) % accumulated == 0:
            optimizer.step()
            optimizer.zero_grad()
    return nn.utils.parameters_to_vector(module.parameters()).detach(), [value.item() for value in values]


def trace(*args, penalty=lh.HessianTrace, **settings):
    return lambda: penalty(*args, **settings)


@needs_fsdp2
@pytest.mark.parametrize(
    ("penalty", "shard", "settings", "kind"),
    [
        *(pytest.param(trace(method=method), {}, {}, Sharded, id=method) for method in (*DIFFERENCES, "taylor")),
        pytest.param(trace(method="two_pass"), {}, {"accumulate_grad_batches": 2}, Sharded, id="two_pass accumulates"),
        pytest.param(trace(), {"reshard_after_forward": False}, {"accumulate_grad_batches": 2}, Sharded,
                     id="taylor accumulates"),
        pytest.param(trace(3, keep=0.7), {"reshard_after_forward": True}, {}, Sharded, id="taylor with three probes"),
        pytest.param(trace(scale="parameter"), {}, {}, Sharded, id="taylor with scale"),
        pytest.param(trace(parameters="net.0.*"), {}, {}, ShardedManual, id="taylor in manual optimization"),
        *(pytest.param(trace(method=method), {}, {}, Validated, id=f"{method} after validation")
          for method in ("two_pass", "taylor")),
        pytest.param(trace(penalty=lh.ConfidencePenalty), {}, {}, Sharded, id="confidence"),
        pytest.param(trace(penalty=BadGradientOnRankOne), {}, {}, Sharded, id="taylor without a finite gradient"),
    ],
)  # fmt: skip
def test_fsdp2_on_two_processes_equals_one(tmp_path, penalty, shard, settings, kind):
    penalty, module = penalty(), kind(middle=nn.LayerNorm(6))
    module.fully_shard = shard
    on_two_processes(sharded_fit, tmp_path, module, penalty, settings)
    first, second = handed_over(tmp_path)
    weights, values = unsharded_fit(penalty, settings)
    assert torch.equal(first["weights"], second["weights"])
    name = f"curvature/{penalty.name}"
    assert first["logged"][0][name] == second["logged"][0][name]
    if penalty.needs.differences:
        torch.testing.assert_close(first["weights"], weights, rtol=1e-5, atol=1e-5)
    else:
        torch.testing.assert_close(first["weights"], weights, rtol=1e-10, atol=1e-12)
        assert [logged[name] for logged in first["logged"]] == pytest.approx(values, rel=1e-10)


@needs_fsdp2
@pytest.mark.parametrize("adaptive", [False, True])
def test_sharpness_aware_steps_under_fsdp2_ascend_together(tmp_path, adaptive):
    module, settings = Sharded(middle=nn.LayerNorm(6)), {"rho": 0.5, "adaptive": adaptive}
    module.fully_shard = {}
    on_two_processes(sharded_fit, tmp_path, module, lh.SharpnessAware(**settings), {})

    def loss_of(module, x, y, step):
        return sharp_loss(module, (x, y), **settings, strength=STRENGTH)

    expected = plain_loop(smooth(), loss_of, joined(data(8)))
    torch.testing.assert_close(handed_over(tmp_path)[0]["weights"], expected, rtol=1e-6, atol=1e-7)


@needs_fsdp2
@pytest.mark.parametrize("method", ["two_pass", "taylor", "taylor with a policy"])
def test_fsdp2_in_bfloat16_is_near_one_process(tmp_path, method):
    from torch.distributed.fsdp import MixedPrecisionPolicy

    penalty = lh.HessianTrace(method=method.partition(" ")[0])
    module, settings = Sharded(middle=nn.LayerNorm(6), dtype=torch.float32), {}
    if "policy" in method:
        half = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32, "output_dtype": torch.float32}
        module.fully_shard = {"mp_policy": MixedPrecisionPolicy(**half)}
    else:
        settings["precision"] = "bf16-mixed"
    before = weights(module)
    on_two_processes(sharded_fit, tmp_path, module, penalty, settings)
    trained, _ = unsharded_fit(penalty, {})
    assert relative_error(handed_over(tmp_path)[0]["weights"] - before, trained - before) < 0.02


class Block(nn.Module):
    """Returns nested containers, and may be recomputed from inside or from outside."""

    def __init__(self, checkpointed):
        super().__init__()
        self.checkpointed = checkpointed
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)

    def body(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (6, 4)).transpose(1, 2).chunk(3, 1)
        return x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

    def forward(self, x, *, scale=1.0):
        y = checkpoint(self.body, x, use_reentrant=False) if self.checkpointed == "inside" else self.body(x)
        return {"y": scale * y, "others": (y.tanh(), 3)}


class Tokens(nn.Module):
    def __init__(self, checkpointed=None, tied=False, times=1, fails=False):
        super().__init__()
        torch.manual_seed(0)
        self.checkpointed, self.times, self.fails = checkpointed, times, fails
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(Block(checkpointed) for _ in range(2))
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.double()

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            for _ in range(self.times):
                if self.checkpointed == "outside":
                    found = checkpoint(block, x, use_reentrant=False)
                else:
                    found = block(x, scale=0.9)
                x = found["y"] + found["others"][0]
                x += 0.5
            if self.fails:
                raise RuntimeError("stop")
        return self.head(x).flatten(0, 1)


def shard(net, **settings):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    for layer in (*net.blocks, net):
        fully_shard(layer, mesh=mesh, **settings)


def penalized_loss(net, batch, probes, penalty):
    """The loss, and a weak reference to what holds the directions."""
    parameters = dict(net.named_parameters())
    with penalty.forward_mode(lh.ForwardContext(parameters, probes, net)) as mode:
        loss = F.cross_entropy(net(batch[0]), batch[1].flatten())
    return loss + 0.1 * penalty(lh.StepContext(loss, parameters, probes, taylor=mode)), weakref.ref(mode)


def remains(net):
    """How many hooks the layers have, and tensors with coefficients."""
    hooks = sum(len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in net.modules())
    return hooks, sum(issubclass(type(one), torch.Tensor) and has_coefficients(one) for one in gc.get_objects())


def step_of_tokens(rank, settings, sharding):
    net, whole = Tokens(**settings), Tokens(**settings)
    shard(net, **sharding)
    tokens = torch.arange(48).reshape(4, 12).square() % 11
    batch = tokens[:, :6], tokens[:, 6:]
    penalty = lh.HessianTrace(2, parameters=["embed*", "blocks.0.*", "blocks.1.qkv*"])
    before = remains(net)
    for step in range(3):
        probes = lh.ProbeSource(0, step)
        loss, mode = penalized_loss(net, [part.chunk(2)[rank] for part in batch], probes, penalty)
        loss.backward()
        del loss
        assert mode() is None
        assert remains(net) == before
        penalized_loss(whole, batch, probes, penalty)[0].backward()
        for sharded, p in zip(net.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(sharded.grad.full_tensor(), p.grad, rtol=1e-9, atol=1e-10)
        with torch.no_grad():
            for p in (*net.parameters(), *whole.parameters()):
                p.sub_(0.1 * p.grad)
                p.grad = None


TOKENS = {
    "plain": ({}, {}),
    "kept whole": ({}, {"reshard_after_forward": False}),
    "checkpoint inside": ({"checkpointed": "inside"}, {}),
    "checkpoint outside": ({"checkpointed": "outside"}, {}),
    "tied": ({"tied": True}, {}),
    "twice": ({"times": 2}, {}),
}


@needs_fsdp2
@pytest.mark.parametrize("case", TOKENS)
def test_taylor_mode_with_sharded_blocks_equals_one_process_and_leaves_nothing(case):
    on_two_processes(step_of_tokens, *TOKENS[case])


def failing_step(rank):
    net = Tokens(fails=True)
    shard(net)
    before = remains(net)
    with pytest.raises(RuntimeError, match="stop"):
        penalized_loss(net, (torch.zeros(2, 3, dtype=torch.int64),) * 2, lh.ProbeSource(0, 0), lh.HessianTrace())
    assert remains(net) == before


@needs_fsdp2
def test_a_step_with_sharded_parameters_that_fails_leaves_nothing():
    on_two_processes(failing_step)


def parallel_tensors(rank, with_fsdp2):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensors"))
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    parallelize_module(net, mesh["tensors"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    if with_fsdp2:
        fully_shard(net, mesh=mesh["data"])
    parameters = dict(net.named_parameters())
    message = r"'0.weight' is a DTensor in the forward pass .*tensor parallelism.*method='two_pass'"
    mode = lh.HessianTrace().forward_mode
    with pytest.raises(lh.HigherOrderError, match=message), mode(lh.ForwardContext(parameters, module=net)):
        net(torch.ones(3, 4))
    with pytest.raises(lh.HigherOrderError, match=r"Pass it: ForwardContext\(parameters, module=net\)"):
        mode(lh.ForwardContext(parameters))


@needs_fsdp2
@pytest.mark.parametrize("with_fsdp2", [False, True])
def test_tensor_parallelism_is_refused_by_name(with_fsdp2):
    on_two_processes(parallel_tensors, with_fsdp2)


class Parallel(Images):
    """Each process has a part of the linear layers and the whole norm, and sees the whole batch."""

    def configure_model(self):
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        mesh = self.device_mesh["tensor_parallel"]
        parallelize_module(self.net, mesh, {"1": ColwiseParallel(), "3": RowwiseParallel()})


def two_layers():
    torch.manual_seed(3)
    return nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def parallel_fit(rank, path):
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2, process_group_backend="gloo")
    callbacks = [callback("two_pass"), Gathered(path)]
    trainer = L.Trainer(
        **CPU, max_steps=2, callbacks=callbacks, devices=2, strategy=strategy, use_distributed_sampler=False
    )
    trainer.fit(Parallel(two_layers()), data(8))


@needs_fsdp2
def test_tensor_parallelism_with_two_passes_equals_one_process(tmp_path):
    on_two_processes(parallel_fit, tmp_path)
    for rank in handed_over(tmp_path):
        torch.testing.assert_close(rank["weights"], expected(two_layers(), "two_pass"), rtol=1e-6, atol=1e-7)
