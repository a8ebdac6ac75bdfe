"""What a run of the command measures at its end, against dense Hessians and formulas."""

import lightning as L
import pytest
import torch
from torch.func import functional_call, hessian
from torch.nn import functional as F

from lightning_hessian.cli.classifier import Classifier
from lightning_hessian.cli.data import Digits
from lightning_hessian.cli.final_curvature import measure
from lightning_hessian.cli.history import History
from lightning_hessian.cli.models import mlp


@pytest.fixture(scope="module")
def trained():
    """A trained tiny network, its data, its Trainer and the epochs' metrics."""
    L.seed_everything(0, verbose=False)
    data, history = Digits(batch_size=64, train_samples=128), History()
    module = Classifier(mlp(data.shape, data.classes, width=4, depth=1), data.classes)
    trainer = L.Trainer(
        max_epochs=5,
        check_val_every_n_epoch=2,
        accelerator="cpu",
        callbacks=[history],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    return module, data, trainer, history


def test_the_curvature_also_along_relative_changes_against_the_dense_hessian(trained):
    module, data, trainer, _ = trained
    probes = 200
    curvature, images, _ = measure(trainer, module, data, 100, probes, 0, learning_rate=0.1)
    assert images == 100
    with torch.no_grad():
        batches = data.training_samples(100)
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    parameters = {name: p.detach() for name, p in module.net.named_parameters()}

    def loss(flat):
        parts = flat.split([p.numel() for p in parameters.values()])
        given = {name: part.view_as(p) for part, (name, p) in zip(parts, parameters.items(), strict=True)}
        return F.cross_entropy(functional_call(module.net, given, (x,)), y)

    dense = hessian(loss)(torch.cat([p.flatten() for p in parameters.values()]))
    sizes = [p.abs() if p.dim() == 1 else p.pow(2).mean(1, keepdim=True).sqrt() for p in parameters.values()]
    d = torch.cat([size.expand_as(p).flatten() for size, p in zip(sizes, parameters.values(), strict=True)])
    relative = d[:, None] * dense * d
    for matrix, trace, (largest, _) in (
        (dense, curvature.trace, curvature.largest[0]),
        (relative, curvature.relative_trace, curvature.relative_largest),
    ):
        assert abs(trace.estimate - matrix.trace()) < 4 * trace.standard_error
        assert trace.standard_error < 0.2 * trace.estimate
        assert largest == pytest.approx(torch.linalg.eigvalsh(matrix)[-1].item(), rel=1e-3)
    assert curvature.smallest[0][0] == pytest.approx(torch.linalg.eigvalsh(dense)[0].item(), abs=1e-3)


def test_the_calibration_error_is_the_mean_gap_between_confidence_and_accuracy_in_bins(trained):
    module, data, trainer, _ = trained
    module.eval()
    with torch.no_grad():
        batches = [data.prepared(batch, in_training=False) for batch in data.test_dataloader()]
        probabilities = torch.cat([module(x) for x, _ in batches]).softmax(1)
    confidence, predicted = probabilities.max(1)
    right = (predicted == torch.cat([y for _, y in batches])).double()
    bins = (confidence * 15).long()
    gaps = [(confidence[bins == b] - right[bins == b]).sum().abs() for b in range(16)]
    error = trainer.callback_metrics["test/calibration_error"]
    assert error == pytest.approx((sum(gaps) / len(right)).item(), abs=1e-5)


def test_an_epoch_without_validation_has_no_validation_metrics(trained):
    *_, history = trained
    assert [(epoch["epoch"], "val/loss" in epoch) for epoch in history.epochs] == [
        (1, False),
        (2, True),
        (3, False),
        (4, True),
        (5, False),
    ]
    assert all("train/loss" in epoch for epoch in history.epochs)


def test_label_noise_replaces_a_share_of_the_training_labels_only():
    sets = {}
    for noise, seed in ((0.0, 0), (0.4, 0), (0.4, 1)):
        data = Digits(label_noise=noise, seed=seed)
        data.setup("fit")
        data.test_dataloader()
        sets[noise, seed] = data._sets
    clean, noisy = sets[0.0, 0], sets[0.4, 0]
    wrong = clean["train"].targets != noisy["train"].targets
    assert wrong.sum() == round(0.4 * 1247)
    assert torch.equal(clean["train"].inputs, noisy["train"].inputs)
    assert torch.equal(noisy["train"].targets, sets[0.4, 1]["train"].targets)
    assert set(noisy["train"].targets[wrong].tolist()) == set(range(10))
    for part in ("val", "test"):
        assert torch.equal(clean[part].targets, noisy[part].targets)
    for share in (-0.1, 1.0, True, "much"):
        with pytest.raises(ValueError, match="label_noise"):
            Digits(label_noise=share)
