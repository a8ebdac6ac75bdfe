"""The group `baseline` of the command line: each choice against its paper's formula, and beside every regularizer."""

from pathlib import Path

import hydra
import pytest
import torch
from omegaconf import DictConfig
from torch import nn
from torch.nn import functional as F

import lightning_hessian as lh
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
        batch = data._prepared((data._sets["train"].images[:8], y), in_training=True)[0]
        _, changed = erased(batch, data._scaled(data._sets["train"].images[:8]))
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
    assert composed().optimizer.weight_decay == 5e-4


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


@pytest.mark.parametrize("baseline", BASELINES)
def test_every_baseline_runs_beside_every_regularizer(baseline, tmp_path):
    for regularizer in REGULARIZERS:
        config = composed(
            f"baseline={baseline}",
            f"regularizer={regularizer}",
            "model.width=8",
            "trainer.accelerator=cpu",
            "trainer.fast_dev_run=2",
            "trainer.enable_model_summary=false",
            "trace.samples=8",
            "trace.probes=2",
        )
        results = train(config, tmp_path)
        assert 0 <= results.test_accuracy <= 1
