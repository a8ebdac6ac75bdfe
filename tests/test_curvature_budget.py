"""A strength that holds a measured curvature at a target."""

import copy
import itertools
import math
import statistics

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from nets import Classifier, context_of, data, fit, smooth, task_loss, weights
from ranks import fit_two
from recorders import Recorder, SaveAt
from torch import nn
from torch.utils.data import DataLoader

import lightning_hessian as lh
from lightning_hessian.curvature import Estimate
from lightning_hessian.monitoring.measurement import Curvature
from lightning_hessian.regularization.curvature_budget import BudgetControl


def whole_batch(samples=64):
    x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(0)).double()
    batch = (x, (x[:, :3] + 0.5 * x[:, 1:].sin()).argmax(1))
    return DataLoader([batch], batch_size=None)


class Measures(L.Callback):
    """The exact trace, and the largest eigenvalue, of the batch's loss at the given steps."""

    def __init__(self, steps):
        self.steps = steps
        self.traces, self.norms = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step in self.steps:
            twin = Classifier(middle=nn.LayerNorm(6))
            twin.net = copy.deepcopy(module.net)
            context = context_of(twin, task_loss, batch)
            self.traces.append(lh.HessianTrace(-1)(context).item())
            self.norms.append(lh.HessianNorm(30, "autograd")(context).item())


def trained(regularizer, steps=500, **settings):
    module, measures = smooth(**settings), Measures(range(350, steps, 10))
    fit(module, [*([regularizer] if regularizer else []), measures], whole_batch(), max_steps=steps, max_epochs=-1)
    return measures


@pytest.mark.parametrize("name", ["trace", "stability"])
def test_the_curvature_is_held_near_the_target(name):
    plain = trained(None, lr=0.05)
    if name == "trace":
        found = trained(lh.HessianRegularizer(lh.HessianTrace(4), lh.CurvatureBudget(trace=1.5)), lr=0.05).traces
        assert statistics.median(found) == pytest.approx(1.5, rel=0.2)
        assert min(plain.traces) > 4
    else:
        budget = lh.CurvatureBudget(stability=0.03)
        norms = trained(lh.HessianRegularizer(lh.HessianNorm(3), budget), lr=0.05).norms
        assert statistics.median(norms) * 0.05 / 2 == pytest.approx(0.03, rel=0.2)
        assert min(plain.norms) * 0.05 / 2 > 0.045


def test_a_target_that_is_met_without_help_leaves_the_penalty_at_its_least():
    recorder = Recorder()
    regularizer = lh.HessianRegularizer(lh.HessianTrace(), lh.CurvatureBudget(trace=1e6))
    fit(smooth(), [regularizer, recorder], max_steps=6)
    added = [abs(row["train/penalty"]) for row in recorder.rows]
    assert max(added) < 0.05


def test_the_share_moves_at_a_bounded_rate_within_its_bounds():
    control = BudgetControl(lh.CurvatureBudget(trace=2.0), by_penalty=True)
    trainer = L.Trainer(accelerator="cpu", logger=False)
    shares = [control.share]
    for value in [1e9] * 200 + [math.nan] + [-1.0] * 200:
        control.see(value, trainer)
        shares.append(control.share)
    rates = [abs(math.log(b / a)) for a, b in itertools.pairwise(shares)]
    assert max(rates) < 0.2 + 1e-9
    assert min(shares) == 0.01
    assert max(shares) == 2.0


PENALTIES = {
    "two_pass": (lh.HessianTrace(method="two_pass"), {"stability": 0.04}),
    "scaled": (lh.HessianTrace(method="gauss_newton", scale="parameter"), {"trace": 3.0}),
    "norm": (lh.HessianNorm(), {"trace": 2.0}),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_a_monitor_measures_for_any_penalty(name):
    """From step 300 on the curvature stays below the targets by itself."""
    penalty, target = PENALTIES[name]
    regularizer = lh.HessianRegularizer(copy.deepcopy(penalty), lh.CurvatureBudget(**target))
    monitor = lh.CurvatureMonitor(every_n_steps=5, probes=20, layers=[])
    measures, module = Measures(range(120, 260, 5)), smooth(lr=0.05)
    fit(module, [monitor, regularizer, measures], whole_batch(), max_steps=260, max_epochs=-1)
    (wanted,) = target.values()
    found = measures.traces if "trace" in target else [0.05 / 2 * norm for norm in measures.norms]
    assert statistics.median(found) == pytest.approx(wanted, rel=0.2)


def test_one_measurement_changes_the_share_by_a_factor_of_two_at_most_and_counts_once():
    monitor = lh.CurvatureMonitor()
    trainer = L.Trainer(accelerator="cpu", logger=False, callbacks=[monitor])
    control = BudgetControl(lh.CurvatureBudget(trace=2.0), by_penalty=False)
    shares = [control.share]
    for step, trace in [(0, 1e9), (5, 1e9), (5, 1e9), (10, math.nan), (15, 2.0), (20, -3.0), (25, 1e9)]:
        zero = Estimate(0.0, 0.0, 2)
        rest = {"frobenius_norm": zero, "layers": {}, "largest": [(1.0, 0.0)], "smallest": [(0.0, 0.0)]}
        measured = Curvature(step=step, trace=Estimate(trace, 0.0, 2), scheduled=step != 25, **rest)
        monitor.history.append(measured)
        control.see(0.0, trainer)
        shares.append(control.share)
    assert shares == pytest.approx([0.01, 0.02, 0.04, 0.04, 0.04, 0.04, 0.02, 0.02])


@pytest.mark.parametrize(
    ("at", "schedule"),
    [(7, None), (7, {"every_n_steps": 2}), (6, {"every_n_steps": 2}), (4, {}), (6, {}), (6, {"every_n_epochs": 2})],
    ids=str,
)
def test_resumed_equals_uninterrupted(tmp_path, at, schedule):
    """With an epoch of four steps."""

    def run(**settings):
        module = smooth()
        penalty = lh.HessianTrace() if schedule is None else lh.HessianNorm()
        others = settings.pop("others", [])
        if schedule is not None:
            others.append(lh.CurvatureMonitor(**schedule, layers=[]))
        regularizer = lh.HessianRegularizer(penalty, lh.CurvatureBudget(trace=1.0))
        fit(module, [*others, regularizer], loader, max_epochs=3, **settings)
        return weights(module)

    loader, path = DataLoader([next(iter(data()))] * 4, batch_size=None), tmp_path / "half.ckpt"
    whole = run(others=[SaveAt(path, at)])
    assert torch.equal(whole, run(ckpt_path=path))


def test_two_ranks_see_the_same_curvature(tmp_path):
    regularizer = lh.HessianRegularizer(lh.HessianTrace(), lh.CurvatureBudget(trace=1.0))
    first, second = fit_two(tmp_path, smooth(), regularizer, data(8))
    assert torch.equal(first["weights"], second["weights"])
    strengths = [[row["train/strength"] for row in rank["logged"]] for rank in (first, second)]
    assert strengths[0] == strengths[1]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({}, "has 0 targets"),
        ({"trace": 1.0, "stability": 0.5}, "has 2 targets. Give one"),
        ({"trace": 0}, "trace=0 must be a positive number"),
        ({"stability": "1"}, "stability='1' must be a positive number"),
    ],
)
def test_targets_out_of_range_are_refused(targets, message):
    with pytest.raises(ValueError, match=message):
        lh.CurvatureBudget(**targets)


@pytest.mark.parametrize(
    ("penalty", "targets"),
    [
        (lh.HessianNorm(), {"trace": 1.0}),
        (lh.HessianTrace(), {"stability": 0.5}),
        (lh.HessianTrace(scale="parameter"), {"trace": 1.0}),
        (lh.HessianTrace(parameters="net.0.*"), {"trace": 1.0}),
        (lh.HessianNorm(parameters="net.0.*"), {"stability": 0.5}),
        (lh.InputGradientNorm(), {"trace": 1.0}),
    ],
)
def test_a_target_that_the_penalty_does_not_measure_is_refused(penalty, targets):
    with pytest.raises(MisconfigurationException, match="does not measure"):
        fit(smooth(), [lh.HessianRegularizer(penalty, lh.CurvatureBudget(**targets))])


def test_a_budget_without_a_learning_rate_or_set_in_mid_fit_without_a_monitor_is_refused():
    class Rate(torch.optim.Optimizer):
        """Without a learning rate."""

        def __init__(self, parameters):
            super().__init__(parameters, {})

        def step(self, closure=None):
            return closure()

    class Other(Classifier):
        def configure_optimizers(self):
            return Rate(self.parameters())

    budget = lh.CurvatureBudget(stability=0.5)
    with pytest.raises(MisconfigurationException, match="no optimizer has a learning rate"):
        fit(Other(), [lh.HessianRegularizer(lh.HessianNorm(), budget)])

    class Sets(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if batch_idx == 2:
                regularizer.strength = budget

    regularizer = lh.HessianRegularizer(lh.HessianTrace(), 1e-3)
    with pytest.raises(MisconfigurationException, match="does not measure"):
        fit(smooth(), [regularizer, Sets()])
