"""Operators, probes and Hutchinson's estimate, on matrices with known traces and against dense Hessians."""

import pytest
import torch
from nets import LABELS, POINTS, two_layers
from oracles import dense_hessian, relative_error
from torch import nn
from torch.nn import functional as F

from lightning_hessian.curvature import (
    BatchedHessianOperator,
    HessianOperator,
    MatrixOperator,
    ProbeSource,
    hutchinson_trace,
    select_parameters,
)


def test_hessian_products_equal_the_dense_hessian():
    net = two_layers()
    dense = dense_hessian(net, lambda call: F.cross_entropy(call(POINTS), LABELS))
    operator = HessianOperator(F.cross_entropy(net(POINTS), LABELS), net.parameters())
    products = torch.stack([operator.matvec(e) for e in torch.eye(operator.size, dtype=torch.float64)])
    assert relative_error(products, dense) < 1e-12


def test_the_batched_hessian_is_that_of_the_mean_over_all_samples():
    net = two_layers()
    dense = dense_hessian(net, lambda call: F.cross_entropy(call(POINTS), LABELS))
    batches = [(POINTS[:7], LABELS[:7]), (POINTS[7:], LABELS[7:])]
    operator = BatchedHessianOperator(
        lambda batch: F.cross_entropy(net(batch[0]), batch[1]), net.parameters(), batches, lambda batch: len(batch[0])
    )
    v = torch.randn(operator.size, dtype=torch.float64)
    assert relative_error(operator.matvec(v), dense @ v) < 1e-12


@pytest.mark.parametrize(("batches", "message"), [([], "no batch"), ([(POINTS[:0], LABELS[:0])], "no sample")])
def test_batches_without_samples_are_refused(batches, message):
    with pytest.raises(ValueError, match=message):
        BatchedHessianOperator(lambda batch: batch[0].sum(), two_layers().parameters(), batches, lambda b: len(b[0]))


def test_a_loss_linear_in_the_parameters_has_no_curvature():
    w, unused = (torch.ones(3, requires_grad=True) for _ in range(2))
    operator = HessianOperator(w.sum(), [w, unused])
    assert torch.equal(operator.matvec(torch.ones(6)), torch.zeros(6))
    assert operator.quadratic_form(torch.ones(6)).item() == 0


def test_a_loss_without_a_graph_is_refused():
    with pytest.raises(ValueError, match="no graph"):
        HessianOperator(torch.tensor(1.0), [torch.ones(2, requires_grad=True)])


def test_hutchinson_is_within_four_standard_errors_and_its_standard_error_is_right():
    a = torch.randn(20, 20, dtype=torch.float64)
    a = a + a.T
    estimate = hutchinson_trace(MatrixOperator(a), probes=400, seed=1)
    assert abs(estimate.estimate - a.trace().item()) < 4 * estimate.standard_error
    off_diagonal = a - a.diag().diag()
    expected = (2 * off_diagonal.square().sum() / 400).sqrt().item()
    assert estimate.standard_error == pytest.approx(expected, rel=0.15)  # 4 / sqrt(2 * 400) = 0.14
    assert estimate.matvecs == 400


def test_hutchinson_is_exact_on_a_diagonal_matrix():
    estimate = hutchinson_trace(MatrixOperator(torch.arange(5.0).diag()), probes=2)
    assert (estimate.estimate, estimate.standard_error) == (10.0, 0.0)


def test_hutchinson_refuses_one_probe():
    with pytest.raises(ValueError, match="at least 2"):
        hutchinson_trace(MatrixOperator(torch.eye(2)), probes=1)


def test_probes_are_signs_with_unit_covariance():
    n = 200_000
    v = ProbeSource(seed=5).draw(n, 0)
    assert v.shape == (n,)
    assert set(v.tolist()) == {-1.0, 1.0}
    assert abs(v.mean().item()) < 4 / n**0.5
    for lag in (1, 7, 8, 63, 64):  # the bits of one byte, and of one word, are independent
        assert abs((v[lag:] * v[:-lag]).mean().item()) < 4 / (n - lag) ** 0.5


def test_sparse_probes_have_unit_second_moment():
    v = ProbeSource().draw(100_000, 0, keep=0.25)
    assert set(v.tolist()) == {-2.0, 0.0, 2.0}
    kept = (v != 0).double()
    assert abs(kept.mean().item() - 0.25) < 4 * (0.25 * 0.75 / 100_000) ** 0.5


@pytest.mark.parametrize(("count", "keep"), [(3, 0.2), (5, 0.5), (1, 0.01)])
def test_kept_tensors_are_never_none_and_the_factor_is_their_probability(count, keep):
    draws = [ProbeSource(step=step).kept_tensors(count, keep, 0) for step in range(2000)]
    assert all(kept for kept, _ in draws)
    probability = 1 / draws[0][1]
    for tensor in range(count):
        share = sum(tensor in kept for kept, _ in draws) / len(draws)
        assert abs(share - probability) <= 4 * (probability * (1 - probability) / len(draws)) ** 0.5


@pytest.mark.parametrize("field", ["seed", "step", "micro_batch", "rank"])
def test_every_part_of_the_key_changes_the_probe(field):
    assert not torch.equal(ProbeSource(**{field: 1}).draw(64, 0), ProbeSource().draw(64, 0))
    assert not torch.equal(ProbeSource().draw(64, 1), ProbeSource().draw(64, 0))


def test_probes_leave_the_global_random_state_alone():
    state = torch.get_rng_state()
    ProbeSource().draw(10, 0, keep=0.5)
    ProbeSource().kept_tensors(3, 0.5, 0)
    assert torch.equal(state, torch.get_rng_state())


NAMED = dict(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).named_parameters())


def test_parameters_are_chosen_by_glob_list_or_predicate():
    assert list(select_parameters(NAMED)) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert list(select_parameters(NAMED, "0.*")) == ["0.weight", "0.bias"]
    assert list(select_parameters(NAMED, ["*.bias", "1.*"])) == ["0.bias", "1.weight", "1.bias"]
    assert list(select_parameters(NAMED, lambda name, parameter: parameter.dim() > 1)) == ["0.weight"]


def test_a_glob_without_match_lists_near_names():
    with pytest.raises(ValueError, match=r"'0.wieght' matches no trainable parameter\. Near names: 0\.weight"):
        select_parameters(NAMED, "0.wieght")
    with pytest.raises(ValueError, match=r"'2\.\*' matches no"):
        select_parameters(NAMED, ["0.*", "2.*"])
    with pytest.raises(ValueError, match="predicate"):
        select_parameters(NAMED, lambda name, parameter: False)


def test_an_empty_list_of_globs_is_refused():
    with pytest.raises(ValueError, match="chooses none"):
        select_parameters(NAMED, [])


def test_frozen_parameters_are_left_out_and_said_to_be_frozen():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[0].requires_grad_(False)
    assert list(select_parameters(dict(net.named_parameters()))) == ["1.weight", "1.bias"]
    with pytest.raises(ValueError, match="only frozen"):
        select_parameters(dict(net.named_parameters()), "0.*")
    net.requires_grad_(False)
    with pytest.raises(ValueError, match="Unfreeze"):
        select_parameters(dict(net.named_parameters()))
