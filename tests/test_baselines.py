"""The group `baseline` of the command line: each choice against its paper's formula, and beside every regularizer."""

import itertools
from pathlib import Path

import hydra
import pytest
import torch
from omegaconf import DictConfig
from torch import nn
from torch.nn import functional as F

import lightning_hessian as lh
from lightning_hessian.cli import final_curvature
from lightning_hessian.cli.parts import make_module
from lightning_hessian.cli.run import train

CONF = Path(__file__).parents[1] / "conf"
BASELINES = sorted(path.stem for path in (CONF / "baseline").glob("*.yaml"))
REGULARIZERS = sorted(path.stem for path in (CONF / "regularizer").glob("*.yaml"))


def composed(*overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("config", ["logger=none", "model=mlp", "data.batch_size=8", *overrides])


class Fixed(nn.Module):
    """Logits that depend on the pixels and a few weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.last = nn.Linear(64, 10)

    def forward(self, images):
        return self.last(images.flatten(1))


def parts(*overrides):
    """The data as training gets them, the raw batch of the same images, and the module."""
    config = composed(*overrides)
    data, plain = (hydra.utils.instantiate(one.data) for one in (config, composed()))
    for one in (data, plain):
        one.setup("fit")
    torch.manual_seed(4)
    batch = next(data.training_batches(1))
    module = make_module(config, data)
    module.net = Fixed()
    return batch, next(plain.training_batches(1)), module, data


def loss_of(module, batch):
    module.log = lambda *args, **settings: None
    return module.training_step(batch, 0)


def test_label_smoothing_is_the_mean_over_the_batch_of_the_smoothed_cross_entropy():
    batch, (x, y), module, _ = parts("baseline=label_smoothing")
    log_p = module(x).log_softmax(1)
    smoothed = 0.9 * log_p[range(8), y] + 0.1 * log_p.mean(1)
    torch.testing.assert_close(loss_of(module, batch), -smoothed.mean())
    torch.testing.assert_close(module.loss((x, y)), F.cross_entropy(module(x), y))  # what is measured is not smoothed


def weight_of(labels, y):
    """What the images' own labels weigh, the same for all."""
    rows = torch.arange(8)[y != y.roll(1)]
    (weight,) = labels[rows, y[rows]].unique()
    assert 0 < weight < 1
    return weight


def test_mixup_combines_the_images_and_the_labels_with_the_same_weight():
    (images, labels), (x, y), module, _ = parts("baseline=mixup")
    weight = weight_of(labels, y)
    torch.testing.assert_close(images, weight * x + (1 - weight) * x.roll(1, 0))
    z = module(images)
    expected = weight * F.cross_entropy(z, y) + (1 - weight) * F.cross_entropy(z, y.roll(1))
    torch.testing.assert_close(loss_of(module, (images, labels)), expected)


def test_cutmix_puts_in_a_rectangle_of_another_image_and_weights_the_labels_by_area():
    *_, module, data = parts("baseline=cutmix")
    x, y = torch.rand(8, 1, 8, 8), torch.arange(8)  # digits have the same background
    images, labels = data.mix(x, F.one_hot(y, 10).float())
    weight = weight_of(labels, y)
    is_other = (images != x).any(0)[0]  # a pixel that is not the image's own in some image
    top, bottom, left, right = (f(one) for one in is_other.nonzero().T for f in (min, max))
    area = (bottom - top + 1) * (right - left + 1)
    assert 64 * (1 - weight) == pytest.approx(area.item(), abs=1e-4)
    torch.testing.assert_close(images[..., is_other], x.roll(1, 0)[..., is_other])
    z = module(images)
    expected = weight * F.cross_entropy(z, y) + (1 - weight) * F.cross_entropy(z, y.roll(1))
    torch.testing.assert_close(loss_of(module, (images, labels)), expected)


def erased(images, x):
    """Each image's rows and columns with changed pixels."""
    changed = (images != x)[:, 0]
    return [(one.any(1).nonzero().flatten(), one.any(0).nonzero().flatten()) for one in changed], changed


def test_cutout_sets_a_square_of_half_the_side_to_the_mean_in_each_image():
    (images, labels), (x, y), module, _ = parts("baseline=cutout")
    places, changed = erased(images, x)
    assert (images[:, 0][changed] == 0).all()
    for rows, columns in places:
        assert max(rows) - min(rows) == max(columns) - min(columns) == 3
    assert len({(int(rows[0]), int(columns[0])) for rows, columns in places}) > 1
    torch.testing.assert_close(loss_of(module, (images, labels)), F.cross_entropy(module(images), y))


def test_random_erasing_puts_noise_in_a_rectangle_of_half_of_the_images():
    (_, labels), (_, y), _, data = parts("baseline=random_erasing")
    assert torch.equal(labels, y)
    counts = []
    for _ in range(40):
        batch = data.prepared((data._sets["train"].inputs[:8], y), in_training=True)[0]
        _, changed = erased(batch, data._scaled(data._sets["train"].inputs[:8]))
        counts += [int(one.sum()) for one in changed]
    touched = [count for count in counts if count]
    assert abs(len(touched) / len(counts) - 0.5) < 4 * (0.25 / len(counts)) ** 0.5
    assert max(touched) <= 0.45 * 64  # a third of the area, rounded to whole pixels


def test_weight_decay_adds_its_multiple_of_the_weights_to_the_gradient():
    batch, _, module, _ = parts("baseline=weight_decay", "optimizer.momentum=0", "optimizer.nesterov=false")
    before = module.net.last.weight.detach().clone()
    loss_of(module, batch).backward()
    gradient = module.net.last.weight.grad.clone()
    module.optimizer().step()
    torch.testing.assert_close(module.net.last.weight, before - 0.1 * (gradient + 5e-3 * before))
    plain, more = (composed(f"baseline={name}", "optimizer=adamw") for name in ("none", "weight_decay"))
    assert composed().optimizer.weight_decay == 5e-4
    assert more.optimizer.weight_decay == 10 * plain.optimizer.weight_decay


@pytest.mark.parametrize(
    ("name", "penalty", "strength"),
    [
        ("confidence_penalty", lh.ConfidencePenalty, 0.1),
        ("jacobian", lh.JacobianNorm, 1e-4),
        ("input_gradient", lh.InputGradientNorm, 3e-2),
    ],
)
def test_penalties_as_baselines_are_the_regularizers_of_the_same_name(name, penalty, strength):
    config = composed(f"baseline={name}", "regularizer=none")
    assert config.baseline == composed(f"regularizer={name}").regularizer
    regularizer = hydra.utils.instantiate(config.baseline)
    assert isinstance(regularizer.penalty, penalty)
    assert regularizer.strength == strength


@pytest.mark.parametrize("baseline", [name for name in BASELINES if composed(f"baseline={name}").data.get("mix")])
def test_validation_and_test_images_are_not_mixed(baseline):
    *_, data = parts(f"baseline={baseline}")
    for loader in (data.val_dataloader(), data.test_dataloader()):
        images, labels = data.on_after_batch_transfer(next(iter(loader)), 0)
        assert labels.dim() == 1
        assert len(images.unique()) <= 17


OTHERS = {
    "model": ["mlp", "cnn", "softplus_cnn", "vit", "resnet18"],
    "optimizer": ["sgd", "adamw"],
    "scheduler": ["cosine", "one_cycle", "none"],
    "monitor": ["none", "curvature"],
    "robustness": ["none", "pgd", "study"],
    "logger": ["tensorboard", "csv", "none"],
    "tested": ["last", "best"],
}
WIDTHS = {"mlp": 8, "cnn": 4, "softplus_cnn": 4, "vit": 8}


def covering():
    """Every baseline with every regularizer, and choices of the other groups such that all pairs of choices occur."""
    covered, rows = set(), []
    for baseline, regularizer in itertools.product(BASELINES, REGULARIZERS):
        row = {"baseline": baseline, "regularizer": regularizer}
        for group, choices in OTHERS.items():
            new = {choice: {frozenset([(group, choice), one]) for one in row.items()} - covered for choice in choices}
            row[group] = max(choices, key=lambda choice: len(new[choice]))
        covered |= {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}
        rows.append(row)
    groups = {"baseline": BASELINES, "regularizer": REGULARIZERS, **OTHERS}
    every = {
        frozenset([(a, x), (b, y)]) for a, b in itertools.combinations(groups, 2) for x in groups[a] for y in groups[b]
    }
    assert covered == every
    return rows


@pytest.mark.parametrize("baseline", BASELINES)
def test_every_choice_of_a_group_runs_with_every_choice_of_another(baseline, tmp_path, monkeypatch):
    monkeypatch.setattr(final_curvature, "LANCZOS", 2)
    quick = ["trainer.accelerator=cpu", "trainer.max_epochs=1", "trainer.limit_train_batches=2"]
    quick += ["+trainer.limit_val_batches=1", "+trainer.limit_test_batches=1", "trainer.enable_progress_bar=false"]
    quick += ["trainer.enable_model_summary=false", "trainer.log_every_n_steps=1", "trace.samples=8", "trace.probes=2"]
    for number, row in enumerate(row for row in covering() if row["baseline"] == baseline):
        overrides = [f"{group}={choice}" for group, choice in row.items()]
        overrides += [f"model.width={WIDTHS[row['model']]}"] if row["model"] in WIDTHS else []
        overrides += ["model.heads=2", "model.depth=1"] if row["model"] == "vit" else []
        overrides += ["robustness.max_samples=8"] if row["robustness"] != "none" else []
        overrides += ["monitor.probes=2", "monitor.iterations=3"] if row["monitor"] != "none" else []
        overrides += ["data.normalize=false"] if row["robustness"] == "study" else []
        directory = tmp_path / str(number)
        directory.mkdir()
        overrides += [] if row["logger"] == "none" else [f"logger.save_dir={directory}"]
        results = train(composed(*quick, *overrides), directory)
        assert 0 <= results.test_accuracy <= 1
