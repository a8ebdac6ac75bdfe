"""Penalties and the monitor in the Trainer of transformers, against steps by plain PyTorch with the same probes."""

import importlib
import os
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import transformers
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from oracles import Differences, by_differences, flat, gradient_of, hessian_by_differences, relative_error
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments

import lightning_hessian as lh
from lightning_hessian.huggingface import attach

WORDS, LENGTH, STRENGTH = 11, 5, 0.03
GENERATOR = torch.Generator().manual_seed(3)
TOKENS = torch.randint(2, WORDS, (16, LENGTH), generator=GENERATOR)
SENTENCES = [{"input_ids": row, "labels": torch.tensor(i % 3)} for i, row in enumerate(TOKENS)]
# every second text has fewer labels
TEXTS = [
    {"input_ids": row, "labels": row.masked_fill(torch.arange(LENGTH) < 3 * (i // 2 % 2), -100)}
    for i, row in enumerate(TOKENS)
]
SMALL = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 4}
WORDY = {
    "vocab_size": WORDS,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "max_position_embeddings": LENGTH,
}


def bert(attention="eager", dtype=torch.float64):
    """A classifier of sentences, with dropout off so that it is a function."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        **SMALL, **WORDY, num_labels=3, attn_implementation=attention, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, initializer_range=0.4,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).to(dtype)


def llama(attention="eager"):
    """A language model, whose loss the Trainer divides by the number of labels of all accumulated batches."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SMALL, **WORDY, num_key_value_heads=1, attn_implementation=attention, initializer_range=0.4
    )
    return transformers.LlamaForCausalLM(config)


class Gradients(TrainerCallback):
    """Keeps the gradient of each optimizer step."""

    def __init__(self):
        self.found = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        model = getattr(model, "module", model)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        self.found.append(flat([g.detach().clone() for g in grads]))


def arguments(path, **settings):
    usual = {
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "optim": "sgd",
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
    }
    return TrainingArguments(str(path), **{**usual, **settings})


def trained(path, model, data, *callbacks, kind=Trainer, resume=None, trainer_settings=None, **settings):
    """A Trainer after training, with the gradients of its steps."""
    gradients = Gradients()
    trainer = kind(
        model, arguments(path, **settings), train_dataset=data, callbacks=[gradients], **(trainer_settings or {})
    )
    if callbacks:
        attach(trainer, *callbacks)
    trainer.train(resume_from_checkpoint=resume)
    trainer.gradients = gradients.found
    return trainer


def collated(data, start, size=4):
    rows = data[start : start + size]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def classified(net):
    return net(**collated(SENTENCES, 0)).loss


def weights(trainer):
    return flat([p.detach() for p in trainer.model.parameters()])


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def regularizer(penalty, strength=STRENGTH, **settings):
    return lh.HessianRegularizer(penalty, strength, **settings)


def probe(model):
    return lh.ProbeSource(0, 0, 0).draw(sum(p.numel() for p in model.parameters()), 0, dtype=torch.float64)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("method", ["taylor", "autograd"])
def test_a_step_with_the_trace_has_the_gradient_of_first_order_differences(tmp_path, method, attention):
    model = bert(attention)
    of = Differences(bert(), classified)
    v = probe(model)
    expected = of.gradient(of.theta) + STRENGTH * of.gradient_of_quadratic_form(v)
    trainer = trained(tmp_path, model, SENTENCES, regularizer(lh.HessianTrace(method=method)))
    assert relative_error(trainer.gradients[0], expected) < 1e-6
    assert logged(trainer, "curvature/hessian_trace")[0] == pytest.approx(of.quadratic_form(v), rel=1e-5)
    assert logged(trainer, "train/penalty")[0] == pytest.approx(STRENGTH * of.quadratic_form(v), rel=1e-5)
    task = classified(bert()).item()
    assert logged(trainer, "loss")[0] - logged(trainer, "train/penalty")[0] == pytest.approx(task, rel=1e-5)


@pytest.mark.parametrize("method", ["two_pass", "central_difference"])
def test_a_step_of_several_passes_has_the_gradient_of_these_passes(tmp_path, method):
    expected = by_differences(method, bert(), classified, STRENGTH)
    trainer = trained(tmp_path, bert("sdpa"), SENTENCES, regularizer(lh.HessianTrace(method=method)))
    assert relative_error(trainer.gradients[0], expected) < 1e-7


def test_a_step_of_sharpness_aware_minimization(tmp_path):
    of = Differences(bert(), classified)
    g = of.gradient(of.theta)
    trainer = trained(tmp_path, bert(), SENTENCES, lh.HessianRegularizer(lh.SharpnessAware(rho=0.1)))
    assert relative_error(trainer.gradients[0], of.gradient(of.theta + 0.1 * g / g.norm())) < 1e-9


def test_a_step_with_the_confidence_penalty(tmp_path):
    net = bert()
    log_p = net(input_ids=collated(SENTENCES, 0)["input_ids"]).logits.log_softmax(-1)
    value = (log_p.exp() * log_p).sum(-1).mean()
    expected = gradient_of(classified(net) + STRENGTH * value, list(net.parameters()))
    trainer = trained(tmp_path, bert(), SENTENCES, regularizer(lh.ConfidencePenalty()))
    assert relative_error(trainer.gradients[0], expected) < 1e-9


@pytest.mark.parametrize(
    "penalty",
    [
        lh.HessianTrace(method="gauss_newton"),
        lh.HessianTrace(parameters="*.attention.*"),
        lh.HessianNorm(),
        lh.InputGradientNorm(layer="bert.embeddings"),
    ],
    ids=repr,
)
def test_a_step_with_another_penalty_has_the_gradient_of_its_value(tmp_path, penalty):
    net = bert()
    context = penalized_context(net, collated(SENTENCES, 0), penalty)
    expected = gradient_of(context.loss + STRENGTH * penalty(context), list(net.parameters()))
    penalty.load_state_dict({})
    trainer = trained(tmp_path, bert(), SENTENCES, regularizer(penalty))
    assert relative_error(trainer.gradients[0], expected) < 1e-9


def penalized_context(net, batch, penalty, probes=None):
    """What a penalty sees of the mean loss of a batch, by hand."""
    inputs = []
    layer = getattr(penalty, "layer", None)
    if layer is not None:
        net.get_submodule(layer).register_forward_hook(lambda layer, args, output: inputs.append(output) or output)
    with lh.higher_order(net), lh.watch_losses() as seen:
        loss = net(**batch).loss
    return lh.StepContext(
        loss, dict(net.named_parameters()), probes=probes or lh.ProbeSource(0, 0, 0), losses=seen, inputs=inputs,
        batch_size=len(batch["input_ids"]),
    )  # fmt: skip


def weighted(parts, method):
    """The gradient of a language model's step, and what its penalty adds: each batch by its share of the labels."""
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch, _ in parts]
    gradient, added = 0, 0.0
    for (batch, key), count in zip(parts, counts, strict=True):
        net, share = llama(), count / sum(counts)
        context = penalized_context(net, batch, lh.HessianTrace(), lh.ProbeSource(0, 0, **key))
        penalty = lh.HessianTrace()(context)
        if method == "taylor":
            own = gradient_of(context.loss + STRENGTH * penalty, list(net.parameters()))
        else:
            own = by_differences(method, net, lambda net, batch=batch: net(**batch).loss, STRENGTH, **key)
            v = lh.ProbeSource(0, 0, **key).draw(len(own), 0)
            e, of = (2 * STRENGTH) ** 0.5, Differences(net, lambda net, batch=batch: net(**batch).loss)
            penalty = (of.gradient(of.theta + e * v) - of.gradient(of.theta - e * v)) @ v / (2 * e)
        gradient = gradient + share * own
        added += share * STRENGTH * penalty.item()
    return gradient, added


SETTINGS = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
PARTS = [(collated(TEXTS, 2 * i, 2), {"micro_batch": i}) for i in range(2)]


@pytest.mark.parametrize("method", ["taylor", "two_pass"])
def test_accumulated_batches_have_the_weights_of_their_labels(tmp_path, method):
    """The Trainer divides by the number of labels of both batches, here 8 and 4."""
    expected, added = weighted(PARTS, method)
    callback = regularizer(lh.HessianTrace(method=method))
    trainer = trained(tmp_path, llama("sdpa"), TEXTS, callback, **SETTINGS)
    assert relative_error(trainer.gradients[0], expected) < 1e-4
    assert logged(trainer, "train/penalty")[0] == pytest.approx(added, rel=1e-3)
    assert logged(trainer, "curvature/hessian_trace")[0] == pytest.approx(added / STRENGTH, rel=1e-3)
    if method == "taylor":
        plain = trained(tmp_path, llama("sdpa"), TEXTS, **SETTINGS)
        assert logged(trainer, "loss")[0] - added == pytest.approx(logged(plain, "loss")[0], rel=1e-4)


def test_a_step_without_a_penalty_is_the_trainers_own(tmp_path):
    settings = {**SETTINGS, "max_steps": 2}
    trainer = trained(tmp_path, llama(), TEXTS, regularizer(lh.HessianTrace(), lambda step: 0.0), **settings)
    plain = trained(tmp_path, llama(), TEXTS, **settings)
    assert torch.equal(weights(trainer), weights(plain))
    assert logged(trainer, "loss") == logged(plain, "loss")


def test_a_batch_without_a_label_has_no_penalty(tmp_path):
    unlabeled = [{**text, "labels": torch.full_like(text["labels"], -100)} for text in TEXTS[:2]]
    found = []
    for start in (unlabeled, []):  # the Trainer shuffles nothing here
        steps = {} if not start else SETTINGS
        callback = regularizer(lh.HessianTrace(method="two_pass"), 1e-9)
        settings = {"per_device_train_batch_size": 2, **steps}
        found.append(trained(tmp_path, llama(), start + TEXTS[:2], callback, **settings).gradients[0])
    assert relative_error(*found) < 1e-3


def test_accumulated_batches_have_the_mean_of_a_penalty_that_is_not_proportional_to_the_loss(tmp_path):
    net, penalty = llama(), lh.ConfidencePenalty()
    contexts = [penalized_context(net, batch, penalty) for batch, _ in PARTS]
    expected = (8 * penalty(contexts[0]) + 4 * penalty(contexts[1])).item() / 12
    trainer = trained(tmp_path, llama(), TEXTS, regularizer(penalty), **SETTINGS)
    assert logged(trainer, "train/penalty")[0] == pytest.approx(STRENGTH * expected, rel=1e-4)


class OwnLoss(Trainer):
    """A loss of the user's own, which has outputs, calls the usual one and is no sum over labels."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = loss + 0.1 * outputs.logits.square().mean()
        return (loss, outputs) if return_outputs else loss


def own_loss(outputs, labels, num_items_in_batch=None):
    """The same as a function, which divides by the number of items itself."""
    total = F.cross_entropy(outputs.logits, labels, reduction="sum")
    return total / num_items_in_batch + 0.1 * outputs.logits.square().sum() / (3 * num_items_in_batch)


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("by", ["override", "function"])
def test_a_loss_of_the_users_own(tmp_path, by, batches):
    def loss(net, start):
        outputs = net(**collated(SENTENCES, start))
        return outputs.loss + 0.1 * outputs.logits.square().mean()

    expected = 0
    for i in range(batches):
        of = Differences(bert(), lambda net, i=i: loss(net, 4 * i))
        v = lh.ProbeSource(0, 0, i).draw(len(of.theta), 0, dtype=torch.float64)
        part = of.gradient(of.theta) + STRENGTH * of.gradient_of_quadratic_form(v)
        expected = expected + part / batches
    kind = {"kind": OwnLoss} if by == "override" else {"trainer_settings": {"compute_loss_func": own_loss}}
    callback = regularizer(lh.HessianTrace())
    trainer = trained(tmp_path, bert(), SENTENCES, callback, gradient_accumulation_steps=batches, **kind)
    assert relative_error(trainer.gradients[0], expected) < 1e-6


def test_a_loss_with_outputs_in_training(tmp_path):
    class WithOutputs(OwnLoss):
        def training_step(self, model, inputs, num_items_in_batch=None):
            model.train()
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
            assert outputs.logits.shape == (4, 3)
            self.accelerator.backward(loss)
            return loss.detach()

    found = [
        trained(tmp_path, bert(), SENTENCES, regularizer(lh.HessianTrace()), kind=kind).gradients[0]
        for kind in (OwnLoss, WithOutputs)
    ]
    assert torch.equal(*found)


def test_label_smoothing(tmp_path):
    def loss(net):
        return F.cross_entropy(
            net(input_ids=collated(SENTENCES, 0)["input_ids"]).logits, collated(SENTENCES, 0)["labels"],
            label_smoothing=0.2,
        )  # fmt: skip

    of = Differences(bert(), loss)
    expected = of.gradient(of.theta) + STRENGTH * of.gradient_of_quadratic_form(probe(bert()))
    for method in ("taylor", "two_pass"):
        callback = regularizer(lh.HessianTrace(method=method))
        trainer = trained(tmp_path, bert(), SENTENCES, callback, label_smoothing_factor=0.2)
        if method == "two_pass":
            expected = by_differences(method, bert(), loss, STRENGTH)
        assert relative_error(trainer.gradients[0], expected) < 1e-6


@pytest.mark.parametrize("method", ["taylor", "autograd", "gauss_newton", "two_pass"])
def test_half_precision_is_near_full_precision(tmp_path, method):
    penalty = lh.HessianTrace(method=method)
    full, half = (
        trained(tmp_path, bert("sdpa", torch.float32), SENTENCES, regularizer(penalty), bf16=bf16)
        for bf16 in (False, True)
    )
    assert relative_error(half.gradients[0], full.gradients[0]) < 0.05
    assert not torch.equal(half.gradients[0], full.gradients[0])
    for name in ("loss", f"curvature/{penalty.name}"):
        assert logged(half, name)[0] == pytest.approx(logged(full, name)[0], rel=0.05)


def test_two_passes_in_half_precision_are_those_of_plain_pytorch(tmp_path):
    def loss(net):
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(input_ids=collated(SENTENCES, 0)["input_ids"]).logits
            return F.cross_entropy(logits, collated(SENTENCES, 0)["labels"])

    expected = by_differences("two_pass", bert(dtype=torch.float32), loss, STRENGTH)
    callback = regularizer(lh.HessianTrace(method="two_pass"))
    trainer = trained(tmp_path, bert(dtype=torch.float32), SENTENCES, callback, bf16=True)
    assert relative_error(trainer.gradients[0], expected) < 1e-5


def test_what_rounding_destroys_is_refused(tmp_path):
    callback = regularizer(lh.HessianTrace(method="central_difference"))
    with pytest.raises(MisconfigurationException, match="round away"):
        trained(tmp_path, bert(dtype=torch.float32), SENTENCES, callback, bf16=True)


def test_the_strength_follows_the_schedule(tmp_path):
    callback = regularizer(lh.HessianTrace(), every_n_steps=2, warmup_steps=4, start=0.25)
    trainer = trained(tmp_path, bert(), SENTENCES, callback, max_steps=8, learning_rate=0.0)
    values = {e["step"] - 1: e["curvature/hessian_trace"] for e in trainer.state.log_history if "train/penalty" in e}
    added = {e["step"] - 1: e["train/penalty"] for e in trainer.state.log_history if "train/penalty" in e}
    assert list(values) == [4, 6]  # from step 2 on, where the strength is 0
    for step, ramp in ((4, 0.5), (6, 1.0)):
        assert added[step] == pytest.approx(STRENGTH * 2 * ramp * values[step])


def test_logs_are_means_since_the_last_log(tmp_path):
    callback = regularizer(lh.HessianTrace(method="two_pass"), every_n_steps=2)
    often, seldom = (
        trained(tmp_path, bert(), SENTENCES, callback, max_steps=4, logging_steps=steps) for steps in (1, 4)
    )
    assert logged(seldom, "train/penalty")[0] == pytest.approx(sum(logged(often, "train/penalty")) / 4)
    name = "curvature/hessian_trace"
    assert logged(seldom, name)[0] == pytest.approx(sum(logged(often, name)) / 2)


def test_several_penalties_see_the_task_loss_alone(tmp_path):
    first, second = lh.HessianTrace(), lh.HessianTrace(method="two_pass")
    alone = [trained(tmp_path, bert(), SENTENCES, regularizer(one)).gradients[0] for one in (first, second)]
    plain = trained(tmp_path, bert(), SENTENCES).gradients[0]
    both = trained(tmp_path, bert(), SENTENCES, regularizer(first), regularizer(second)).gradients[0]
    assert relative_error(both, sum(alone) - plain) < 1e-9


def test_a_strength_that_adapts(tmp_path):
    callback = regularizer(lh.HessianTrace(), lh.GradientShare(0.1))
    trainer = trained(tmp_path, bert(), SENTENCES, callback, max_steps=3)
    of = Differences(bert(), classified)
    g, p = of.gradient(of.theta), of.gradient_of_quadratic_form(probe(bert()))
    assert logged(trainer, "train/strength")[0] == pytest.approx((0.1 * g.norm() / p.norm()).item(), rel=1e-4)


def test_evaluation_has_no_penalty(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.0, "max_steps": 2}
    evaluated = {"trainer_settings": {"eval_dataset": SENTENCES}}
    plain = trained(tmp_path, bert(), SENTENCES, **settings, **evaluated)
    trainer = trained(tmp_path, bert(), SENTENCES, regularizer(lh.HessianTrace(), 1.0), **settings, **evaluated)
    assert logged(trainer, "eval_loss") == logged(plain, "eval_loss")
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


def test_a_penalty_that_is_not_finite_leaves_the_step_to_the_task_loss(tmp_path):
    class NotFinite(lh.HessianTrace):
        def value(self, context):
            return super().value(context) * float("nan")

    with pytest.warns(UserWarning, match="is nan at step 0"):
        trainer = trained(tmp_path, bert(), SENTENCES, regularizer(NotFinite()), max_steps=2)
    plain = trained(tmp_path, bert(), SENTENCES, max_steps=2)
    torch.testing.assert_close(weights(trainer), weights(plain), rtol=1e-12, atol=1e-15)
    assert logged(trainer, "train/hessian_trace_skipped") == [1.0, 2.0]


def test_a_gradient_that_is_not_finite_is_replaced_by_the_task_loss(tmp_path):
    class Root(lh.WeightPenalty):
        name = "root"

        def value(self, context):
            parameter = next(iter(self.selected(context).values()))
            return (parameter - parameter.detach()).square().sum().sqrt()

    with pytest.warns(UserWarning, match="not finite at step 0"):
        trainer = trained(tmp_path, bert(), SENTENCES, regularizer(Root()), max_steps=2)
    plain = trained(tmp_path, bert(), SENTENCES, max_steps=2)
    torch.testing.assert_close(weights(trainer), weights(plain), rtol=1e-12, atol=1e-15)
    assert logged(trainer, "train/root_skipped") == [1.0, 2.0]


def test_a_monitor_measures_the_hessian(tmp_path):
    monitor = lh.CurvatureMonitor(every_n_steps=2, iterations=40, probes=2, layers=["bert.*"])
    trainer = trained(tmp_path, bert(), SENTENCES, monitor, max_steps=4)
    hessian = hessian_by_differences(bert(), classified)
    eigenvalues = torch.linalg.eigvalsh(hessian)
    first = monitor.history[0]
    assert [one.step for one in monitor.history] == [0, 2, 4]
    assert first.largest[0][0] == pytest.approx(eigenvalues[-1].item(), rel=1e-3)
    assert first.smallest[0][0] == pytest.approx(eigenvalues[0].item(), rel=1e-3)
    assert first.stability == pytest.approx(0.01 * eigenvalues[-1].item() / 2, rel=1e-3)
    assert logged(trainer, "curvature/largest_eigenvalue") == [one.largest[0][0] for one in monitor.history]
    assert logged(trainer, "curvature/trace/bert") == [one.layers["bert"].estimate for one in monitor.history]


@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}], ids=str)
def test_a_monitor_changes_nothing(tmp_path, settings):
    settings = {**settings, "max_steps": 3, "train_sampling_strategy": "random"}
    monitors = [
        lh.CurvatureMonitor(every_n_steps=1),
        lh.CurvatureMonitor(batches="val", mode="train"),
    ]
    model = lambda: bert(dtype=torch.float32)  # noqa: E731
    evaluated = {"trainer_settings": {"eval_dataset": SENTENCES}}
    trainer = trained(tmp_path, model(), SENTENCES, *monitors, **settings, **evaluated)
    assert torch.equal(weights(trainer), weights(trained(tmp_path, model(), SENTENCES, **settings)))
    assert logged(trainer, "curvature/val/trace")


def test_a_monitor_measures_in_full_precision(tmp_path):
    full, half = (lh.CurvatureMonitor(layers=[]) for _ in range(2))
    trained(tmp_path, bert(dtype=torch.float32), SENTENCES, full)
    trained(tmp_path, bert(dtype=torch.float32), SENTENCES, half, bf16=True)
    assert half.history[0].trace == full.history[0].trace


def test_a_resumed_training_goes_on_as_if_uninterrupted(tmp_path):
    def callbacks():
        shared = lh.HessianRegularizer([lh.HessianNorm(), lh.HessianTrace()], [0.01, lh.GradientShare(0.1)])
        return shared, lh.CurvatureMonitor(every_n_steps=1, layers=[])

    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = callbacks()
    uninterrupted = trained(tmp_path / "whole", bert(), SENTENCES, *whole, **settings)
    resumed = callbacks()
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    trainer = trained(tmp_path / "rest", bert(), SENTENCES, *resumed, resume=checkpoint, **settings)
    assert torch.equal(weights(trainer), weights(uninterrupted))
    assert [one.step for one in resumed[1].history] == [0, 1, 2, 3, 4]
    assert resumed[1].history[-1].trace == whole[1].history[-1].trace


def trainer_with(path, **changed):
    trainer = Trainer(bert(), arguments(path), train_dataset=SENTENCES)
    for name, value in changed.items():
        vars(trainer)[name] = value
    return trainer


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"is_deepspeed_enabled": True}, "DeepSpeed shards the parameters"),
        ({"is_fsdp_enabled": True}, "FSDP shards the parameters"),
        ({"is_distributed_loading_by_transformers": True}, "shards the parameters"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_sharded_parameters_are_refused(tmp_path, changed, message):
    for one in (regularizer(lh.HessianTrace()), lh.CurvatureMonitor()):
        with pytest.raises(MisconfigurationException, match=message):
            attach(trainer_with(tmp_path, **changed), one)


def test_data_parallel_is_refused(tmp_path):
    trainer = trainer_with(tmp_path)
    trainer.args._n_gpu = 2
    with pytest.raises(MisconfigurationException, match=r"nn\.DataParallel.*torchrun"):
        attach(trainer, regularizer(lh.HessianTrace()))


def test_a_penalty_that_finds_no_parameter_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"hessian_trace cannot be computed.*nothing\.\*"):
        trained(tmp_path, bert(), SENTENCES, regularizer(lh.HessianTrace(parameters="nothing.*")))


def test_what_is_no_callback_is_refused(tmp_path):
    for one in (lh.HessianTrace(), TrainerCallback()):
        with pytest.raises(ValueError, match="attach"):
            attach(trainer_with(tmp_path), one)
    with pytest.raises(ValueError, match="nothing to attach"):
        attach(trainer_with(tmp_path))


def test_a_second_call_is_refused(tmp_path):
    trainer = trainer_with(tmp_path)
    attach(trainer, lh.CurvatureMonitor())
    with pytest.raises(MisconfigurationException, match="before"):
        attach(trainer, regularizer(lh.HessianTrace()))


def test_a_step_that_does_not_compute_the_loss_there_is_refused(tmp_path):
    class Elsewhere(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = model(**inputs).loss
            self.accelerator.backward(loss)
            return loss.detach()

    with pytest.raises(MisconfigurationException, match="Elsewhere has trained a step without a call"):
        trained(tmp_path, bert(), SENTENCES, regularizer(lh.HessianTrace()), kind=Elsewhere)


def test_a_monitor_without_validation_data_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="no eval_dataset"):
        trained(tmp_path, bert(), SENTENCES, lh.CurvatureMonitor(batches="val"))


def test_a_second_training_starts_anew(tmp_path):
    trainer = Trainer(bert(), arguments(tmp_path, max_steps=2), train_dataset=SENTENCES)
    attach(trainer, regularizer(lh.HessianNorm()), monitor := lh.CurvatureMonitor(layers=[]))
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    first, history = weights(trainer), monitor.history
    trainer.model.load_state_dict(before)
    trainer.optimizer = None
    trainer.train()
    assert torch.equal(weights(trainer), first)
    assert [one.trace for one in monitor.history] == [one.trace for one in history]


WORKER = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, {tests!r})
from test_huggingface import TEXTS, llama, logged, regularizer, trained
import lightning_hessian as lh
path = Path({path!r})
settings = {{"ddp_backend": "gloo", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}}
for method in ("taylor", "two_pass"):
    monitor = lh.CurvatureMonitor(layers=[])
    trainer = trained(path, llama(), TEXTS, regularizer(lh.HessianTrace(method=method)), monitor, **settings)
    found = [trainer.gradients[0], logged(trainer, "train/penalty"), monitor.history[0].trace.estimate]
    torch.save(found, path / f"{{method}}_{{trainer.args.process_index}}.pt")
"""


def test_two_processes_train_on_the_mean_over_all_labels(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(tests=str(Path(__file__).parent), path=str(tmp_path)))
    together = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script)], env={**together, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    for method in ("taylor", "two_pass"):
        (first, *told), (second, *told_too) = (torch.load(tmp_path / f"{method}_{rank}.pt") for rank in range(2))
        assert torch.equal(first, second)
        assert told == told_too
        parts = [
            (collated(TEXTS, 2 * (2 * i + rank), 2), {"micro_batch": i, "rank": rank})
            for i in (0, 1)
            for rank in (0, 1)
        ]
        expected, added = weighted(parts, method)
        assert relative_error(first, expected) < 1e-4
        assert told[0][0] == pytest.approx(added, rel=1e-3)


def test_only_one_part_of_the_package_needs_transformers(monkeypatch):
    root = Path(lh.__file__).parent
    users = [path for path in root.rglob("*.py") if "transformers import" in path.read_text()]
    assert {path.parent.name for path in users} == {"huggingface"}
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "lightning_hessian.huggingface")
    with pytest.raises(ImportError, match=r"pip install 'lightning-hessian\[huggingface\]'"):
        importlib.import_module("lightning_hessian.huggingface")


def test_probes_differ_from_step_to_step(tmp_path):
    callback = regularizer(lh.HessianTrace(), 1e-6)
    trainer = trained(tmp_path, bert(), SENTENCES[:4], callback, max_steps=4, learning_rate=0.0)
    assert all(a != b for a, b in pairwise(logged(trainer, "curvature/hessian_trace")))


def test_a_penalty_on_adapters_alone(tmp_path):
    def adapted():
        net = llama()
        torch.manual_seed(1)
        return get_peft_model(net, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))

    net, penalty = adapted(), lh.HessianTrace(parameters="*lora_A*")
    context = penalized_context(net, collated(TEXTS, 0), penalty)
    adapters = [p for p in net.parameters() if p.requires_grad]
    found = torch.autograd.grad(context.loss + STRENGTH * penalty(context), adapters)
    gradients = dict(zip(adapters, found, strict=True))
    expected = flat([gradients.get(p, torch.zeros_like(p)) for p in net.parameters()])
    for method in ("taylor", "autograd"):
        callback = regularizer(lh.HessianTrace(parameters="*lora_A*", method=method))
        trainer = trained(tmp_path, adapted(), TEXTS, callback)
        assert relative_error(trainer.gradients[0], expected) < 1e-4


@pytest.mark.parametrize("method", ["taylor", "two_pass"])
def test_gradient_checkpointing_changes_nothing(tmp_path, method):
    found = [
        trained(
            tmp_path, llama("sdpa"), TEXTS, regularizer(lh.HessianTrace(method=method)), gradient_checkpointing=on
        ).gradients[0]
        for on in (True, False)
    ]
    assert relative_error(*found) < 1e-6
