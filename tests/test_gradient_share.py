"""A strength that holds the penalty's gradient at a share of the task loss's, measured independently."""

import copy
import functools
import statistics

import lightning as L
import pytest
from nets import Classifier, context_of, context_of_inputs, data, fit, task_loss
from oracles import gradient_of, loss_by_differences

import lightning_hessian as lh


class Measures(L.Callback):
    """At the given steps: the length of the added gradient, as a share of the task loss's, by the logged strength."""

    def __init__(self, steps, penalty_gradient):
        self.steps = steps
        self.penalty_gradient = penalty_gradient
        self.found = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step not in self.steps:
            return
        twin, strength = copy.deepcopy(self.bare(module)), trainer.logged_metrics["train/strength"].item()
        task = gradient_of(task_loss(twin, batch), twin.net.parameters())
        added = self.penalty_gradient(twin, batch, trainer.global_step, strength)
        self.found.append((added.norm() / task.norm()).item())

    @staticmethod
    def bare(module):
        twin = Classifier()
        twin.net = module.net
        return twin


def by_graph(penalty):
    def gradient(module, batch, step, strength):
        if isinstance(penalty, lh.InputPenalty):
            context = context_of_inputs(module.eval(), *batch)
        else:
            context = context_of(module, task_loss, batch, probes=lh.ProbeSource(0, step, step))
        fixed = copy.deepcopy(penalty)
        if isinstance(penalty, lh.HessianNorm):
            fixed.iterations, fixed.method = 20, "autograd"
        return strength * gradient_of(fixed(context), module.net.parameters())

    return gradient


def by_two_pass(method, module, batch, step, strength):
    loss = functools.partial(task_loss, batch=batch)
    whole = loss_by_differences(method, module, loss, strength, step=step, micro_batch=step)
    return gradient_of(whole, module.net.parameters()) - gradient_of(loss(module), module.net.parameters())


PENALTIES = {
    "taylor": lh.HessianTrace(),
    "autograd": lh.HessianTrace(method="autograd"),
    "gauss_newton": lh.HessianTrace(method="gauss_newton"),
    "two_pass": lh.HessianTrace(method="two_pass"),
    "central_difference": lh.HessianTrace(method="central_difference"),
    "norm": lh.HessianNorm(),
    "input gradient": lh.InputGradientNorm(),
    "input hessian": lh.InputHessianNorm(),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_the_share_is_held_throughout_training(name):
    penalty = copy.deepcopy(PENALTIES[name])
    differences = penalty.needs.differences
    gradient = functools.partial(by_two_pass, penalty.method) if differences else by_graph(penalty)
    module, measures = Classifier(lr=0.05), Measures(range(60, 240, 9), gradient)
    regularizer = lh.HessianRegularizer(penalty, lh.GradientShare(0.1, every_n_steps=10))
    fit(module, [regularizer, measures], data(16), max_steps=240, max_epochs=-1)
    print(name, [round(x,3) for x in measures.found])
    assert statistics.median(measures.found) == pytest.approx(0.1, rel=1 / 3)
