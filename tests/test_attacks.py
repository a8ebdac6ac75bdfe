"""FGSM, PGD and the radius estimate: exact on models with a closed form, and everything else left as found."""

import functools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_hessian.robustness.attacks import FGSM, PGD, Attack
from lightning_hessian.robustness.radius import radius_estimate


def linear(dtype=torch.float64):
    """Two classes with z_1 - z_0 = w'x + b, points of both, and their signed margins w'x + b (for class 1)."""
    generator = torch.Generator().manual_seed(3)
    net = nn.Linear(5, 2).to(dtype)
    with torch.no_grad():
        net.weight.copy_(torch.randn(2, 5, generator=generator))
        net.bias.copy_(torch.tensor([0.1, -0.2]))
    x = torch.randn(200, 5, generator=generator).to(dtype)
    w, b = net.weight.detach()[1] - net.weight.detach()[0], net.bias.detach()[1] - net.bias.detach()[0]
    margin = x @ w + b
    return net, x, (margin > 0).long(), margin.abs(), w


@functools.cache
def digits():
    """A small network trained on the digits, and test samples with pixels in [0, 1]."""
    from sklearn.datasets import load_digits

    x, y = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    x, y = x.float() / 16, y.long()
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        for _ in range(150):
            optimizer.zero_grad()
            F.cross_entropy(net(x[:1500]), y[:1500]).backward()
            optimizer.step()
        optimizer.zero_grad()
    return net.requires_grad_(True), x[1500:1650], y[1500:1650]


@torch.no_grad()
def right(net, x, y, attack):
    return net(attack(net, x, y)).argmax(1) == y


def accuracy(attack):
    net, x, y = digits()
    return right(net, x, y, attack).float().mean().item()


@pytest.mark.parametrize("loss", ["cross_entropy", "cw"])
@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("kind", ["fgsm", "pgd"])
def test_on_a_linear_model_exactly_the_samples_nearer_than_the_radius_fall(kind, norm, loss):
    net, x, y, margin, w = linear()
    distance = margin / (w.norm() if norm == "l2" else w.abs().sum())
    radius = distance.median().item() * 1.001  # between two samples
    attack = (
        FGSM(radius, norm, loss=loss)
        if kind == "fgsm"
        else PGD(radius, norm, steps=100, step_size=radius / 4, loss=loss)
    )
    assert torch.equal(right(net, x, y, attack), distance > radius)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_dlr_is_as_exact_on_a_linear_model_of_three_classes(norm):
    net, x, y, margin, w = linear()
    distance = margin / (w.norm() if norm == "l2" else w.abs().sum())
    radius = distance.median().item() * 1.001

    def third_class_far_below(x):
        return F.pad(net(x), (0, 1), value=-100.0)

    attack = PGD(radius, norm, steps=100, step_size=radius / 4, loss="dlr")
    assert torch.equal(right(third_class_far_below, x, y, attack), distance > radius)


def test_dlr_is_refused_for_two_classes():
    net, x, y, *_ = linear()
    with pytest.raises(ValueError, match=r"loss='dlr' .*two classes only. Choose loss='cw'"):
        PGD(0.1, loss="dlr")(net, x, y)


def test_dlr_of_equal_logits_is_finite():
    x, y = torch.zeros(4, 3), torch.arange(4) % 3
    for norm in ("l2", "linf"):
        assert PGD(0.1, norm, loss="dlr")(lambda x: x, x, y).isfinite().all()


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_linear_models_fgsm_is_the_step_by_formula(norm):
    net, x, y, _, w = linear()
    down = (1 - 2 * y).unsqueeze(1) * w  # where the margin of y shrinks
    step = down.sign() if norm == "linf" else down / w.norm()
    torch.testing.assert_close(FGSM(0.3, norm)(net, x, y), x + 0.3 * step)


def test_robust_accuracy_falls_with_the_radius_to_zero():
    curve = [accuracy(PGD(radius, steps=10, bounds=(0, 1))) for radius in (0, 0.03, 0.1, 0.2, 1)]
    assert curve[0] > 0.85
    assert curve == sorted(curve, reverse=True)
    assert 0 < curve[2] < curve[1] < curve[0]
    assert curve[-1] == 0


def test_radius_0_gives_the_clean_accuracy():
    net, x, y = digits()
    for attack in (FGSM(0), FGSM(0, "l2"), PGD(0, steps=2), PGD(0, "l2", steps=2)):
        assert torch.equal(attack(net, x, y), x)


@pytest.mark.parametrize(("norm", "radius"), [("linf", 0.1), ("l2", 0.8)])
def test_pgd_is_no_weaker_than_fgsm(norm, radius):
    assert accuracy(PGD(radius, norm)) <= accuracy(FGSM(radius, norm))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_more_restarts_never_raise_the_robust_accuracy(norm):
    net, x, y = digits()
    radius = 0.08 if norm == "linf" else 0.5
    before = torch.ones_like(y, dtype=torch.bool)
    for restarts in (1, 2, 4):
        now = right(net, x, y, PGD(radius, norm, steps=2, restarts=restarts, bounds=(0, 1)))
        assert not (now & ~before).any()  # sample by sample
        before = now


def test_a_restarts_start_does_not_depend_on_which_samples_are_left():
    # In one run the first half falls at once and only the second goes into the restarts.
    net, x, y, *_ = linear()
    settings = {"steps": 1, "step_size": 1e-9, "restarts": 3}
    fallen = torch.where(torch.arange(len(x)) < 100, 1 - y, y)  # the first half is misclassified at once
    alone, among = PGD(0.01, **settings)(net, x, fallen), PGD(0.01, **settings)(net, x, y)
    torch.testing.assert_close(alone[100:], among[100:])
    assert torch.equal(alone[:100], x[:100])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("kind", [FGSM, PGD])
def test_the_result_is_in_the_ball_and_of_the_same_shape_and_type(kind, norm, dtype):
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).to(dtype)
    x = torch.randn(6, 3, 2, 2).to(dtype)
    result = kind(0.3, norm)(net, x, net(x).argmax(1))
    assert (result.shape, result.dtype) == (x.shape, dtype)
    change = (result.double() - x.double()).flatten(1)
    size = change.abs().amax(1) if norm == "linf" else change.norm(dim=1)
    assert (size <= 0.3 + 4 * torch.finfo(dtype).eps).all()
    assert (size > 0.2).all()


def test_a_half_precision_input_moves_by_steps_smaller_than_its_spacing():
    # 0.001 steps from 1.0, where neighboring bfloat16 numbers are 0.0078 apart.
    net = nn.Linear(4, 2).to(torch.bfloat16)
    x = torch.ones(1, 4, dtype=torch.bfloat16)
    result = PGD(0.03, steps=100, step_size=0.001)(net, x, net(x).argmax(1))
    assert (result.float() - 1).abs().amax() > 0.02


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("kind", [FGSM, PGD])
def test_the_result_stays_in_the_bounds(kind, norm):
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    x, y = torch.rand(6, 3, 2, 2), torch.arange(6) % 3
    result = kind(0.7, norm, bounds=(0, 1))(net, x, y)
    assert result.min() >= 0
    assert result.max() <= 1
    mean, std = torch.tensor([0.1, 0.5, 0.9]).view(3, 1, 1), torch.tensor([0.2, 1.0, 3.0]).view(3, 1, 1)
    low, high = (0 - mean) / std, (1 - mean) / std
    result = kind(0.7, norm, bounds=(low, high))(net, (x - mean) / std, y)
    assert (result >= low).all()
    assert (result <= high).all()


def test_the_l2_ball_is_filled_evenly():
    # A constant loss and no steps worth the name: the start is what is returned.
    x = torch.zeros(2000, 3, dtype=torch.float64)

    def any_point_is_better_than_x(x):
        return torch.stack([-x.norm(dim=1), 0 * x[:, 0]], 1)

    y = torch.zeros(2000, dtype=torch.long)
    found = PGD(2.0, "l2", steps=1, step_size=1e-9)(any_point_is_better_than_x, x, y)
    shares = (found.norm(dim=1) / 2) ** 3  # uniform in [0, 1]
    assert shares.mean().item() == pytest.approx(0.5, abs=0.03)
    assert (shares < 0.25).double().mean().item() == pytest.approx(0.25, abs=0.03)
    assert found.mean(0).abs().max() < 0.08


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_zero_gradient_does_not_hold_the_attack(norm):
    def flat_inside(x):  # the class changes where |x| > 0.95; no gradient before |x| = 0.9
        return torch.cat([1 - 10 * F.relu(x.abs() - 0.9), 0 * x + 0.5], 1)

    x, y = torch.zeros(20, 1), torch.zeros(20, dtype=torch.long)
    assert right(flat_inside, x, y, FGSM(0.94, norm)).all()
    assert not right(flat_inside, x, y, FGSM(0.96, norm)).any()
    assert not right(flat_inside, x, y, PGD(2.0, norm, steps=40, step_size=0.5)).any()


def test_a_gradient_too_small_to_square_still_points_the_way():
    net, x, y, margin, w = linear(torch.float32)
    distance = margin / w.norm()
    radius = distance.median().item() * 1.001

    def tiny(x):
        return 1e-30 * net(x)

    assert torch.equal(right(tiny, x, y, FGSM(radius, "l2", loss="cw")), distance > radius)


def test_the_same_seed_gives_the_same_points_and_another_seed_others():
    net, x, y = digits()
    first, again, other = (PGD(0.05, steps=2, seed=seed)(net, x, y) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


class Odd(nn.Module):
    """Draws random numbers, normalizes by batch statistics in training, and may break."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
        self.calls_left = math.inf

    def forward(self, x):
        self.calls_left -= 1
        if self.calls_left < 0:
            raise RuntimeError("broken")
        return self.head(self.norm(x)) + 0.01 * torch.rand(())


@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("what", [FGSM(0.1), PGD(0.1, steps=3), radius_estimate], ids=["fgsm", "pgd", "radius"])
def test_everything_is_left_as_found(what, breaks):
    model, x = Odd(), torch.randn(6, 4)
    y = model.eval()(x).argmax(1)
    model.train()(x).sum().backward()
    model.head.eval()
    model.calls_left = 0 if breaks else math.inf
    if breaks and isinstance(what, PGD):
        model.calls_left = 2  # in the midst of the steps
    modes = [module.training for module in model.modules()]
    gradients = [p.grad.clone() for p in model.parameters()]
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    before = x.clone()
    state = torch.get_rng_state()
    if breaks:
        with pytest.raises(RuntimeError, match="broken"):
            what(model, x, y)
    else:
        what(model, x, y)
    assert [module.training for module in model.modules()] == modes == [True, True, False, False, False]
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, before)
    assert not x.requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("what", [FGSM(0.1), PGD(0.1, steps=3), radius_estimate], ids=["fgsm", "pgd", "radius"])
def test_works_where_gradients_are_off(what, context):
    net, x, y = digits()
    expected = what(net, x, y)
    with context():
        torch.testing.assert_close(what(net, x * 1, y * 1), expected)
        assert not torch.is_grad_enabled()


def test_bounds_made_in_inference_mode_are_taken():
    net, x, y = digits()
    with torch.inference_mode():
        result = PGD(0.1, steps=2, bounds=(torch.zeros(64), torch.ones(64)))(net, x * 1, y * 1)
    assert result.min() >= 0


def test_an_lstm_and_the_evaluation_mode():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.lstm(x)[0][:, -1])

    model, x, y = Recurrent(), torch.randn(5, 7, 3), torch.zeros(5, dtype=torch.long)
    assert PGD(0.1, steps=2)(model, x, y).shape == x.shape
    assert radius_estimate(model, x, y).shape == (5,)


def test_an_attack_under_autocast_leaves_the_training_gradients():
    net = nn.Linear(5, 2)
    x, y = torch.randn(6, 5), torch.arange(6) % 2
    with torch.autocast("cpu", torch.bfloat16):
        F.cross_entropy(net(PGD(0.1, steps=2)(net, x, y)), y).backward()
    assert net.weight.grad.abs().sum() > 0


def test_attacks_are_attacks_with_names():
    names = {
        FGSM(0.1): "fgsm_linf_0.1",
        FGSM(8 / 255): "fgsm_linf_0.0313725",
        PGD(0.5, "l2"): "pgd_l2_0.5",
        PGD(1, loss="cw"): "pgd_cw_linf_1",
        PGD(0.1, "l2", loss="dlr"): "pgd_dlr_l2_0.1",
    }
    for attack, name in names.items():
        assert isinstance(attack, Attack)
        assert attack.name == name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"radius": -1}, "radius=-1 must be a finite number of at least 0"),
        ({"radius": math.nan}, "radius=nan"),
        ({"radius": math.inf}, "radius=inf"),
        ({"radius": True}, "radius=True"),
        ({"norm": "l1"}, "norm='l1' is unknown. Choose one of linf, l2"),
        ({"loss": "hinge"}, "loss='hinge' is unknown. Choose one of cross_entropy, cw, dlr"),
        ({"steps": 0}, "steps=0 must be a whole number of at least 1"),
        ({"restarts": 0}, "restarts=0 must be a whole number of at least 1"),
        ({"step_size": 0}, "step_size=0 must be a positive number"),
        ({"seed": 1.5}, r"seed=1.5 must be a whole number\."),
        ({"bounds": (1, 0)}, "low must be less than high"),
        ({"bounds": (0, torch.tensor([1.0, 0.0]))}, "low must be less than high"),
        ({"bounds": 1.0}, "must be a pair"),
        ({"bounds": [0, 1, 2]}, "must be a pair"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PGD(**{"radius": 0.1, **settings})


@pytest.mark.parametrize(
    ("x", "bounds", "message"),
    [
        (torch.full((3, 4), 2.0), (0, 1), "x goes from 2 to 2 and leaves the bounds.*Perhaps x is normalized"),
        (torch.zeros(3, 4), (torch.zeros(3, 1, 1), torch.ones(3, 1, 1)), "do not broadcast to x of shape"),
        (torch.zeros(3, 4, dtype=torch.long), None, "x is of type torch.int64.*token ids"),
    ],
)
def test_inputs_that_cannot_be_attacked_are_refused(x, bounds, message):
    with pytest.raises(ValueError, match=message):
        FGSM(0.1, bounds=bounds)(nn.Linear(4, 2), x, torch.zeros(3, dtype=torch.long))


def test_x_may_miss_the_bounds_by_rounding():
    x = torch.full((2, 4), 1 + 1e-6)
    assert FGSM(0.1, bounds=(0, 1))(nn.Linear(4, 2), x, torch.zeros(2, dtype=torch.long)).max() < 1 + 2e-6


@pytest.mark.parametrize("what", [FGSM(0.1), PGD(0.1), radius_estimate], ids=["fgsm", "pgd", "radius"])
@pytest.mark.parametrize(
    ("model", "y", "message"),
    [
        (nn.Linear(4, 1), [0, 0, 0], "a single logit"),
        (nn.Unflatten(1, (2, 2)), [0, 0, 0], r"of shape \(3, 2, 2\), and an attack needs logits"),
        (lambda x: (x, x), [0, 0, 0], "a tuple, and an attack needs logits"),
        (nn.Linear(4, 2), [0, 1, 2], r"whole numbers of shape \(3,\) from 0 to 1"),
        (nn.Linear(4, 2), [0, 1, -1], r"whole numbers of shape \(3,\) from 0 to 1"),
        (nn.Linear(4, 2), [0.0, 1.0, 0.0], r"whole numbers of shape \(3,\) from 0 to 1"),
        (nn.Linear(4, 2), [[0, 1]] * 3, r"whole numbers of shape \(3,\) from 0 to 1"),
    ],
)
def test_models_and_targets_that_do_not_fit_are_refused(what, model, y, message):
    with pytest.raises(ValueError, match=message):
        what(model, torch.randn(3, 4), torch.tensor(y))


@pytest.mark.parametrize("attack", [FGSM(0.1), PGD(0.1)])
def test_a_model_without_a_gradient_is_refused(attack):
    with pytest.raises(ValueError, match="Look for no_grad, detach or numpy"):
        attack(lambda x: x.detach(), torch.ones(2, 3), torch.zeros(2, dtype=torch.long))


def test_the_radius_of_a_linear_model_is_the_distance():
    net, x, y, margin, w = linear()
    torch.testing.assert_close(radius_estimate(net, x, y), margin / w.norm())
    torch.testing.assert_close(radius_estimate(net, x, 1 - y), torch.zeros(200, dtype=torch.float64))


def test_the_radius_of_a_quadratic_margin_is_the_formula():
    curvature = torch.diag(torch.tensor([1.0, -3.0, 0.5], dtype=torch.float64))
    slope = torch.tensor([0.3, 0.0, -0.4], dtype=torch.float64)

    def model(x):
        margin = 2 + x @ slope + (x @ curvature * x).sum(1) / 2
        return torch.stack([margin, torch.zeros_like(margin), torch.full_like(margin, -9.0)], 1)

    x = torch.randn(50, 3, dtype=torch.float64)
    x[0] = 0
    m = model(x)[:, 0]
    a = (slope + x @ curvature).norm(dim=1)
    expected = torch.where(m > 0, 2 * m / (a + (a**2 + 2 * 3 * m).sqrt()), 0)
    estimate = radius_estimate(model, x, torch.zeros(50, dtype=torch.long), iterations=3)
    torch.testing.assert_close(estimate, expected)
    # No attack gets through below it: here the Hessian is the same everywhere.
    nearest = 0.999 * estimate[m > 0].min().item()
    assert right(model, x, torch.zeros(50, dtype=torch.long), PGD(nearest, "l2", restarts=2))[m > 0].all()


def test_curvature_across_the_gradient_is_seen():
    def model(x):  # at (x, 0) the gradient has no part along the second, strongly curved axis
        return torch.stack([1 + x[:, 0] - 5 * x[:, 1] ** 2, 0 * x[:, 0]], 1)

    estimate = radius_estimate(model, torch.zeros(1, 2, dtype=torch.float64), torch.tensor([0]))
    assert estimate.item() == pytest.approx(2 / (1 + math.sqrt(1 + 20)))


def test_a_margin_that_is_flat_has_an_infinite_radius_and_a_tie_has_none():
    for margin, expected in ((1.0, math.inf), (0.0, 0.0)):

        def model(x, margin=margin):
            return torch.stack([0 * x[:, 0] + margin, 0 * x[:, 0]], 1)

        assert radius_estimate(model, torch.zeros(1, 2), torch.tensor([0])).item() == expected


def test_the_radius_of_attention_and_layer_norm_is_measured():
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(12, 2))
    x = torch.randn(5, 3, 4)
    with torch.inference_mode():
        estimate = radius_estimate(model, x * 1, model.eval()(x).argmax(1))
    assert (estimate > 0).all()
    assert estimate.isfinite().all()


@pytest.mark.parametrize("iterations", [0, 1.5, True])
def test_iterations_out_of_range_are_refused(iterations):
    with pytest.raises(ValueError, match=r"iterations=.* must be a whole number of at least 1"):
        radius_estimate(nn.Linear(4, 2), torch.zeros(1, 4), torch.tensor([0]), iterations=iterations)


def test_a_sample_may_be_a_single_number():
    def model(x):
        return torch.stack([x, 0 * x], 1)

    x, y = torch.tensor([0.3, 0.7]), torch.tensor([0, 0])
    for norm in ("linf", "l2"):
        assert right(model, x, y, PGD(0.5, norm)).tolist() == [False, True]
    torch.testing.assert_close(radius_estimate(model, x, y), x)


@pytest.mark.parametrize("attack", [FGSM(0.1), FGSM(0.1, "l2"), PGD(0.1), PGD(0.1, "l2")])
def test_an_empty_batch_stays_empty(attack):
    empty = torch.zeros(0, 4)
    assert attack(nn.Linear(4, 3), empty, torch.zeros(0, dtype=torch.long)).shape == empty.shape
