"""The penalties, the estimator and the distribution of docs/extending.md, against dense Hessians."""

import re
from pathlib import Path

import pytest
import torch
from nets import LABELS, POINTS, context_of, data, fit, plain_loop, smooth, task_loss, two_layers
from oracles import dense_hessian, hessian_by_differences
from ranks import fit_two, joined
from recorders import Recorder
from torch.nn import functional as F

import lightning_hessian as lh
from lightning_hessian.curvature import ProbeSource

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()


def defined_on_the_page():
    """The classes and functions of the page's blocks, without what the blocks run."""
    namespace = {"lh": lh, "torch": torch}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        for part in re.split(r"\n(?=\S)", block):
            if part.startswith(("class ", "def ", "from ")):
                exec(part, namespace)
    return namespace


DEFINED = defined_on_the_page()
HessianFrobeniusNorm, RadialCurvature = DEFINED["HessianFrobeniusNorm"], DEFINED["RadialCurvature"]
BODY = re.search(r"class HessianFrobeniusNorm.*?\n(.*?)```", PAGE, re.DOTALL).group(1)


def loss(net):
    return F.cross_entropy(net(POINTS), LABELS)


def mean_and_error(penalty, draws):
    net = two_layers()
    values = torch.stack([penalty(context_of(net, loss, probes=ProbeSource(step=k))).detach() for k in range(draws)])
    return values.mean(), values.std() / draws**0.5


def test_the_page_has_a_penalty_of_fifteen_lines_that_is_the_frobenius_norm():
    assert len([line for line in BODY.splitlines() if line.strip()]) <= 15
    mean, error = mean_and_error(HessianFrobeniusNorm(), 2000)
    assert abs(mean - dense_hessian(two_layers(), loss).square().sum()) < 4 * error


def test_it_trains_by_the_callback_on_two_ranks_as_by_hand(tmp_path):
    def of_one(module, x, y, step):
        total = 0
        for rank, halves in enumerate(zip(x.chunk(2), y.chunk(2), strict=True)):
            context = context_of(module, task_loss, halves, probes=ProbeSource(0, step, step, rank))
            total = total + (context.loss + 0.02 * HessianFrobeniusNorm()(context)) / 2
        return total

    loader, regularizer = data(8), lh.HessianRegularizer(HessianFrobeniusNorm(), 0.02)
    first, second = fit_two(tmp_path, smooth(), regularizer, loader)
    assert torch.equal(first["weights"], second["weights"])
    torch.testing.assert_close(first["weights"], plain_loop(smooth(), of_one, joined(loader)), rtol=1e-6, atol=1e-6)
    assert "curvature/hessian_frobenius_norm" in first["logged"][0]


def test_verify_and_suggest_strength_take_it():
    batch = next(iter(data(8)))
    assert lh.verify(smooth(), batch, HessianFrobeniusNorm()).ok
    found = lh.suggest_strength(smooth(), [batch], HessianFrobeniusNorm(parameters="*.weight"))
    assert found.strength > 0


def test_a_penalty_of_differences_has_the_value_of_the_dense_hessian():
    module, recorder = smooth(), Recorder()
    x, y = next(iter(data(8)))
    theta = torch.cat([p.detach().flatten() for p in module.net.parameters()])
    hessian = hessian_by_differences(module.net, lambda net: F.cross_entropy(net(x), y))
    v = theta / theta.norm()
    fit(module, [lh.HessianRegularizer(RadialCurvature(), 1e-3), recorder], data(8), max_steps=1)
    assert recorder.rows[0]["curvature/radial_curvature"] == pytest.approx((v @ hessian @ v).item(), rel=1e-3)


def test_an_estimator_of_ones_own_is_unbiased_and_exact_with_all_probes():
    trace, penalty = dense_hessian(two_layers(), loss).trace(), DEFINED["OrthogonalHessianTrace"]
    mean, error = mean_and_error(penalty(probes=2), 1000)
    assert abs(mean - trace) < 4 * error
    mean, _ = mean_and_error(penalty(probes=32), 2)
    assert mean.item() == pytest.approx(trace.item(), rel=1e-9)


@pytest.mark.parametrize("distribution", ["gaussian", DEFINED["uniform"]])
@pytest.mark.parametrize("settings", [{}, {"keep": 0.5, "drop": "element"}, {"method": "gauss_newton"}], ids=str)
def test_the_trace_is_unbiased_with_every_distribution(distribution, settings):
    reference, _ = mean_and_error(lh.HessianTrace(probes=-1), 2)
    if settings.get("method") == "gauss_newton":
        reference, other_error = mean_and_error(lh.HessianTrace(**settings), 4000)
    else:
        other_error = 0.0
    mean, error = mean_and_error(lh.HessianTrace(distribution=distribution, **settings), 4000)
    assert error > 0
    assert abs(mean - reference) < 4 * (error**2 + other_error**2) ** 0.5


def test_an_unknown_distribution_is_refused():
    with pytest.raises(ValueError, match=r"distribution='normal' is unknown\. Choose one of rademacher, gaussian"):
        lh.HessianTrace(distribution="normal")
