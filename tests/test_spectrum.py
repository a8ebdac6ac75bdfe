"""Eigenvalues, densities and moments, on matrices with known spectra and against dense Hessians."""

import curvlinops
import hessian_eigenthings
import pytest
import torch
from nets import LABELS, POINTS, two_layers
from oracles import dense_hessian
from scipy.sparse.linalg import eigsh
from torch import nn
from torch.nn import functional as F

from lightning_hessian.curvature import (
    BatchedHessianOperator,
    MatrixOperator,
    extreme_eigenvalues,
    hutchinson_moments,
    lanczos,
    spectral_density,
    subspace_overlap,
)

N = 300
OUTLIERS = [50.0, 30.0, 10.0, -20.0, -5.0]


def planted():
    """A bulk in [-1, 1] and outliers, in a random basis."""
    generator = torch.Generator().manual_seed(3)
    bulk = 2 * torch.rand(N - len(OUTLIERS), generator=generator, dtype=torch.float64) - 1
    values = torch.cat([torch.tensor(OUTLIERS, dtype=torch.float64), bulk])
    q = torch.linalg.qr(torch.randn(N, N, generator=generator, dtype=torch.float64))[0]
    return q @ values.diag() @ q.T, values, q


def test_planted_outliers_are_found_to_1e_8_with_their_eigenvectors():
    matrix, _, q = planted()
    ends = extreme_eigenvalues(MatrixOperator(matrix), largest=3, smallest=2, iterations=40)
    assert ends.matvecs == 40
    for pairs, expected in ((ends.largest, [50, 30, 10]), (ends.smallest, [-20, -5])):
        torch.testing.assert_close(pairs.values, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-8)
        assert pairs.residuals.max() < 1e-6
    top = torch.stack([q[:, 0], q[:, 1], q[:, 2]])
    assert subspace_overlap(ends.largest.vectors, top) == pytest.approx(1, abs=1e-8)


def test_residuals_are_those_of_the_pairs_and_bound_the_error():
    matrix, values, _ = planted()
    ends = extreme_eigenvalues(MatrixOperator(matrix), 4, 4, iterations=10)
    for pairs in (ends.largest, ends.smallest):
        residuals = (pairs.vectors @ matrix - pairs.values[:, None] * pairs.vectors).norm(dim=1)
        torch.testing.assert_close(pairs.residuals, residuals, rtol=1e-6, atol=1e-9)
        nearest = (pairs.values[:, None] - values).abs().amin(dim=1)
        assert (nearest <= pairs.residuals + 1e-12).all()


@pytest.mark.parametrize(
    "diagonal", [[2.0] * 6, [0.0] * 6, [1.0, 1.0, 0.0, 0.0, -3.0, -3.0]], ids=["identity", "zero", "multiple"]
)
def test_all_eigenvalues_are_found_where_the_krylov_space_ends_early(diagonal):
    matrix = torch.tensor(diagonal, dtype=torch.float64).diag()
    ends = extreme_eigenvalues(MatrixOperator(matrix), 6, 6, iterations=20)
    expected = torch.tensor(sorted(diagonal), dtype=torch.float64)
    torch.testing.assert_close(ends.smallest.values, expected)
    torch.testing.assert_close(ends.largest.values, expected.flip(0))
    eye = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(ends.largest.vectors @ ends.largest.vectors.T, eye)


@pytest.mark.parametrize(("k", "iterations", "message"), [(7, 20, "the matrix has 6"), (5, 4, "at least 10")])
def test_more_eigenvalues_than_there_can_be_are_refused(k, iterations, message):
    with pytest.raises(ValueError, match=message):
        extreme_eigenvalues(MatrixOperator(torch.eye(6)), k, 1, iterations)


def test_the_density_integrates_to_one_and_counts_the_outliers():
    matrix, values, _ = planted()
    density = spectral_density(MatrixOperator(matrix), runs=200, iterations=30, seed=1)
    torch.testing.assert_close(density.weights.sum(dim=1), torch.ones(200, dtype=torch.float64))
    grid = torch.linspace(-30, 60, 2000, dtype=torch.float64)
    on_grid = density.on_grid(grid, 0.2)
    assert torch.trapezoid(on_grid, grid).item() == pytest.approx(1, abs=1e-9)
    # Of each run, the share of eigenvalues above 5 is an unbiased quadratic form: v'Pv / n.
    share = torch.where(density.nodes > 5, density.weights, 0).sum(dim=1)
    assert abs(share.mean().item() - 3 / N) < 4 * share.std().item() / 200**0.5
    # Quadrature is exact for polynomials: trace and Frobenius norm are those of Hutchinson's estimate by the same v.
    trace = N * (density.nodes * density.weights).sum(dim=1)
    assert abs(trace.mean().item() - values.sum().item()) < 4 * trace.std().item() / 200**0.5


def test_quadrature_with_all_products_has_the_eigenvalues_for_nodes():
    matrix = planted()[0][:8, :8]
    density = spectral_density(MatrixOperator(matrix), runs=2, iterations=8)
    assert density.nodes.shape == (2, 8)
    eigenvalues = torch.linalg.eigvalsh(matrix)
    for run in range(2):
        torch.testing.assert_close(density.nodes[run], eigenvalues)


def test_moments_are_within_four_standard_errors():
    matrix, values, _ = planted()
    blocks = {"head": [slice(0, 100)], "ends": [slice(0, 10), slice(290, 300)]}
    found = hutchinson_moments(MatrixOperator(matrix), probes=300, seed=2, blocks=blocks)
    expected = {
        "trace": (found.trace, values.sum()),
        "norm": (found.frobenius_norm, values.square().sum().sqrt()),
        "head": (found.blocks["head"], matrix.diag()[:100].sum()),
        "ends": (found.blocks["ends"], matrix.diag()[:10].sum() + matrix.diag()[290:].sum()),
    }
    for name, (estimate, exact) in expected.items():
        assert abs(estimate.estimate - exact.item()) < 4 * estimate.standard_error, name
        assert estimate.matvecs == 300


@pytest.mark.parametrize("cuts", [[12], [5, 4, 3]], ids=["one batch", "several batches"])
def test_a_networks_spectrum_equals_that_of_the_dense_hessian(cuts):
    net = two_layers()
    calls = []

    def loss(batch):
        calls.append(1)
        return F.cross_entropy(net(batch[0]), batch[1])

    batches = list(zip(POINTS.split(cuts), LABELS.split(cuts), strict=True))
    operator = BatchedHessianOperator(loss, net.parameters(), batches, lambda batch: len(batch[1]))
    dense = dense_hessian(net, lambda call: F.cross_entropy(call(POINTS), LABELS))
    exact = torch.linalg.eigvalsh(dense)
    ends = extreme_eigenvalues(operator, 3, 3, iterations=operator.size)
    torch.testing.assert_close(ends.largest.values, exact.flip(0)[:3])
    torch.testing.assert_close(ends.smallest.values, exact[:3])
    if len(cuts) == 1:
        assert len(calls) == 1  # a single batch's graph serves all products
    calls.clear()
    rows = torch.randn(4, operator.size, dtype=torch.float64)
    torch.testing.assert_close(operator.matmat(rows), rows @ dense)
    assert len(calls) == (0 if len(cuts) == 1 else len(cuts))  # and of several, each serves all rows
    density = spectral_density(operator, runs=1, iterations=operator.size)
    weighed = (density.weights > 1e-8)[0]
    nearest = (density.nodes[0][weighed][:, None] - exact).abs().amin(dim=1)
    assert nearest.max() < 1e-6


def test_the_search_for_penalties_and_the_spectrum_share_their_recurrence():
    matrix = planted()[0]
    start = torch.randn(1, N, dtype=torch.float64)
    v = lanczos(lambda v: v @ matrix, start, 30)
    assert (v @ matrix).norm().item() == pytest.approx(50, abs=1e-6)


def test_overlap_is_one_for_the_same_space_in_another_basis_and_zero_for_orthogonal_ones():
    q = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0].T
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    assert subspace_overlap(q[:3], turn @ q[:3]) == pytest.approx(1)
    assert subspace_overlap(q[:3], q[3:]) == pytest.approx(0, abs=1e-12)


@pytest.fixture(scope="module")
def witnesses():
    """The same Hessian, of two batches of the same size, here and in two other libraries."""
    net = two_layers()
    batches = [(POINTS[:6], LABELS[:6]), (POINTS[6:], LABELS[6:])]

    def loss(net, batch):
        return F.cross_entropy(net(batch[0]), batch[1])

    return (
        BatchedHessianOperator(lambda batch: loss(net, batch), net.parameters(), batches),
        curvlinops.HessianLinearOperator(net, nn.CrossEntropyLoss(), list(net.parameters()), batches),
        hessian_eigenthings.HessianOperator(net, batches, loss),
    )


def test_eigenvalues_agree_with_other_libraries(witnesses):
    ours, theirs, eigenthings = witnesses
    v = torch.randn(ours.size, dtype=torch.float64)
    torch.testing.assert_close(theirs @ v, ours.matvec(v))
    torch.testing.assert_close(eigenthings.matvec(v), ours.matvec(v))
    ends = extreme_eigenvalues(ours, 3, 3, iterations=ours.size)
    for which, pairs in (("LA", ends.largest), ("SA", ends.smallest)):
        found = hessian_eigenthings.lanczos(eigenthings, k=3, max_iter=ours.size, which=which, seed=0).eigenvalues
        torch.testing.assert_close(pairs.values, found)
        by_scipy = torch.from_numpy(eigsh(theirs.to_scipy(), 3, which=which)[0].copy())
        torch.testing.assert_close(pairs.values.sort()[0], by_scipy.sort()[0])


def test_trace_norm_and_density_agree_with_other_libraries_within_four_standard_errors(witnesses):
    ours, theirs, eigenthings = witnesses
    found = hutchinson_moments(ours, probes=200, seed=1)
    trace = hessian_eigenthings.trace(eigenthings, num_matvecs=200, method="hutchinson", seed=2)
    combined = (found.trace.standard_error**2 + float(trace.stderr) ** 2) ** 0.5
    assert abs(found.trace.estimate - float(trace.estimate)) < 4 * combined
    torch.manual_seed(3)
    square = sum(float(curvlinops.hutchinson_squared_fro(theirs, 10)) for _ in range(20)) / 20
    error = 2 * found.frobenius_norm.estimate * found.frobenius_norm.standard_error
    assert abs(found.frobenius_norm.estimate**2 - square) < 4 * 2**0.5 * error
    steps, width = 16, 0.05
    other = hessian_eigenthings.spectral_density(
        eigenthings, num_runs=100, lanczos_steps=steps, num_grid_points=300, sigma=width, seed=9
    )
    density = spectral_density(ours, runs=100, iterations=steps, seed=4)
    runs = torch.exp(-((other.grid - density.nodes.unsqueeze(2)) / width).square() / 2) / (width * 2.5066282746)
    runs = (runs * density.weights.unsqueeze(2)).sum(dim=1)
    error = (2 * runs.var(dim=0) / 100).sqrt()
    on_grid = density.on_grid(other.grid, width)
    torch.testing.assert_close(on_grid, runs.mean(dim=0))
    assert ((on_grid - other.density).abs() <= 4 * error + 1e-9).all()
