"""AdversarialAccuracy: what it logs, when, on which samples, and that nothing else changes."""

import dataclasses

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from nets import CPU, Classifier, data, fit, weights
from ranks import hand_over, handed_over, two_ranks
from recorders import all_warnings
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_hessian.robustness.attacks import FGSM, PGD
from lightning_hessian.robustness.callback import AdversarialAccuracy
from lightning_hessian.robustness.radius import radius_estimate

CLEAN, FGSM_KEY, PGD_KEY = (f"robust/{name}/accuracy" for name in ("clean", "fgsm_linf_0.2", "pgd_l2_0.3"))


class Net(Classifier):
    """With a forward; takes batches of any nesting apart itself."""

    def __init__(self, middle=None):
        super().__init__(middle=middle or nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.3)))
        self.contexts = []

    def forward(self, x):
        return self.net(x)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.contexts.append("inference" if torch.is_inference_mode_enabled() else "no_grad")

    test_step = validation_step


def callback(**settings):
    return AdversarialAccuracy([FGSM(0.2), PGD(0.3, "l2", steps=5)], **settings)


def expected(module, x, y, attack=None):
    module.eval()
    logits = module(x if attack is None else attack(module, x, y))
    return (logits.argmax(1) == y).double().mean().item()


def run(stage, module, callbacks, loader=None, **settings):
    trainer = L.Trainer(**CPU, callbacks=list(callbacks), **settings)
    getattr(trainer, stage)(module, loader if loader is not None else data(), verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_logs_clean_and_robust_accuracy_and_the_radius(stage):
    module = Net()
    logged = run(stage, module, [callback(radius_estimate=True)], data(48))
    x, y = data().dataset.tensors
    assert module.contexts == ["inference"]
    assert logged == pytest.approx(
        {
            CLEAN: expected(module, x, y),
            FGSM_KEY: expected(module, x, y, FGSM(0.2)),
            PGD_KEY: expected(module, x, y, PGD(0.3, "l2", steps=5)),
            "robust/radius_estimate": radius_estimate(module, x, y).mean().item(),
        }
    )


def test_the_mean_is_over_samples_where_batches_differ_in_size():
    module = Net()
    logged = run("validate", module, [AdversarialAccuracy(FGSM(0.2), radius_estimate=True)], data(20))
    x, y = data().dataset.tensors
    assert logged[FGSM_KEY] == pytest.approx(expected(module, x, y, FGSM(0.2)))
    assert logged["robust/radius_estimate"] == pytest.approx(radius_estimate(module, x, y).mean().item())


class Logged(L.Callback):
    def __init__(self):
        self.values = []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.values.append((trainer.current_epoch, trainer.callback_metrics.get(PGD_KEY)))


class Attacked(PGD):
    """Counts its calls."""

    def __call__(self, model, x, y):
        calls.append(len(x))
        return super().__call__(model, x, y)


calls: list[int] = []


def fit_and_validate(module, callbacks, **settings):
    trainer = L.Trainer(**{**CPU, "callbacks": callbacks, **settings})
    trainer.fit(module, data(), data())
    return trainer


def test_measures_in_the_validation_of_a_fit_but_not_in_the_sanity_check():
    calls.clear()
    logged, module = Logged(), Net()
    attack = Attacked(0.3, "l2", steps=5)
    fit_and_validate(module, [AdversarialAccuracy(attack), logged], max_epochs=2, num_sanity_val_steps=2)
    assert [epoch for epoch, _ in logged.values] == [0, 1]
    assert len(calls) == 2 * 6
    x, y = data().dataset.tensors
    by_batch = [expected(module, a, b, attack) for a, b in zip(x.split(8), y.split(8), strict=True)]
    assert logged.values[-1][1].item() == pytest.approx(sum(by_batch) / 6)


def test_every_n_epochs_is_for_fit_alone():
    calls.clear()
    module, measure = Net(), AdversarialAccuracy(Attacked(0.3, steps=1), every_n_epochs=2)
    fit_and_validate(module, [measure], max_epochs=3)
    assert len(calls) == 6  # in the second epoch
    run("validate", module, [measure])
    assert len(calls) == 12


def test_max_samples_measures_the_first():
    calls.clear()
    module = Net()
    logged = run("validate", module, [AdversarialAccuracy(Attacked(0.3, "l2", steps=5), max_samples=11)], data(8))
    assert calls == [8, 3]
    x, y = data().dataset.tensors
    assert logged[CLEAN] == pytest.approx(expected(module, x[:11], y[:11]))


def test_of_several_dataloaders_the_first_is_measured():
    calls.clear()
    run("validate", Net(), [AdversarialAccuracy(Attacked(0.3, steps=1))], [data(24), data(16)])
    assert calls == [24, 24]


class Noisy(Net):
    """Random and stateful enough that any disturbance shows."""

    def forward(self, x):
        return self.net(F.dropout(x, 0.2))

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", F.cross_entropy(self(batch[0]), batch[1]))


def test_training_and_validation_are_the_same_bit_by_bit():
    results = []
    for callbacks in ([], [callback(radius_estimate=True)]):
        torch.manual_seed(5)
        module = Noisy()
        torch.manual_seed(6)
        trainer = fit_and_validate(module, callbacks, max_epochs=2)
        results.append((weights(module), module.losses, trainer.callback_metrics["val/loss"]))
    (plain, losses, metrics), (ours, our_losses, our_metrics) = results
    assert torch.equal(plain, ours)
    assert losses == our_losses
    assert metrics == our_metrics


def test_bfloat16_is_measured_too():
    logged = run("validate", Net(), [callback(radius_estimate=True)], precision="bf16-true")
    assert 0 <= logged[PGD_KEY] <= logged[CLEAN]


@dataclasses.dataclass
class Batch:
    image: torch.Tensor
    label: torch.Tensor


def as_dict(samples):
    x, y = torch.utils.data.default_collate(samples)
    return {"index": torch.arange(2 * len(x)), "mask": x > 0, "image": x, "label": y}


def nested(samples):
    x, y = torch.utils.data.default_collate(samples)
    return [{"meta": ["a name", x]}, (y.int(),)]


def two_of_each(samples):
    x, y = torch.utils.data.default_collate(samples)
    return {"wrong": 0 * x, "zeros": 0 * y, "image": x, "label": y}


def a_dataclass(samples):
    return Batch(*torch.utils.data.default_collate(samples))


BATCHES = {
    "dict": (as_dict, {}),
    "nested": (nested, {}),
    "dataclass": (a_dataclass, {}),
    "attribute": (a_dataclass, {"inputs": "image", "targets": "label"}),
    "key": (two_of_each, {"inputs": "image", "targets": "label"}),
    "function": (two_of_each, {"inputs": lambda b: b["image"], "targets": lambda b: F.one_hot(b["label"]).argmax(1)}),
    "index": (lambda samples: list(two_of_each(samples).values()), {"inputs": 2, "targets": 3}),
}


@pytest.mark.parametrize("case", BATCHES)
def test_finds_inputs_and_targets(case):
    collate, settings = BATCHES[case]
    module = Net()
    loader = DataLoader(data().dataset, 48, collate_fn=collate)
    logged = run("validate", module, [AdversarialAccuracy(FGSM(0.2), **settings)], loader)
    x, y = data().dataset.tensors
    assert logged[CLEAN] == pytest.approx(expected(module, x, y))
    assert logged[FGSM_KEY] == pytest.approx(expected(module, x, y, FGSM(0.2)))


@pytest.mark.parametrize(
    ("collate", "settings", "message"),
    [
        (lambda s: [torch.stack([x for x, _ in s])], {}, r"no targets in the batch \(targets=None\)"),
        (two_of_each, {"targets": "class"}, r"no targets in the batch \(targets='class'\)"),
        (a_dataclass, {"targets": "class"}, r"no targets in the batch \(targets='class'\)"),
        (two_of_each, {"inputs": "picture"}, "no inputs to attack.*'picture'"),
        (lambda s: [torch.tensor([y for _, y in s])], {}, "no inputs to attack"),
        (two_of_each, {"inputs": ["image", "wrong"]}, "chooses 2 tensors"),
    ],
)
def test_a_batch_without_inputs_or_targets_is_refused(collate, settings, message):
    loader = DataLoader(data().dataset, 48, collate_fn=collate)
    with pytest.raises(MisconfigurationException, match=message):
        run("validate", Net(), [AdversarialAccuracy(FGSM(0.2), **settings)], loader)


def test_a_module_without_forward_is_refused_before_training():
    module = Classifier()
    with pytest.raises(MisconfigurationException, match="Classifier defines no `forward`"):
        fit(module, [callback()])
    assert module.losses == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attacks": []}, "at least one"),
        ({"attacks": "pgd"}, "must be an attack"),
        ({"attacks": [FGSM(0.1), FGSM(0.1, bounds=(0, 1))]}, "more than one named fgsm_linf_0.1"),
        ({"every_n_epochs": 0}, "every_n_epochs=0 must be a whole number of at least 1"),
        ({"max_samples": 0}, "max_samples=0 must be a whole number of at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AdversarialAccuracy(**{"attacks": FGSM(0.1), **settings})


class DropsOutAlways(Net):
    def forward(self, x):
        return self.net(F.dropout(x, 0.5))


@pytest.mark.parametrize(("kind", "times"), [(DropsOutAlways, 1), (Net, 0)])
def test_random_predictions_in_evaluation_are_warned_of_once(kind, times):
    module, states = kind(), []
    for callbacks in ([AdversarialAccuracy(FGSM(0.1))], []):
        torch.manual_seed(0)
        with all_warnings() as messages:
            for _ in range(2):
                run("validate", module, callbacks)
        states.append(torch.get_rng_state())
        if callbacks:
            assert sum("are random in evaluation mode" in message for message in messages) == times
    assert torch.equal(*states)


class Saturated(Net):
    """Rounds the probabilities of the wrong classes to zero, so cross-entropy has no gradient."""

    def forward(self, x):
        return 1e4 * self.net(x)


@pytest.mark.parametrize(("kind", "times"), [(Saturated, 1), (Net, 0)])
def test_masked_gradients_are_warned_of_once(kind, times):
    module, (x, _) = kind(), data().dataset.tensors
    y = module.eval()(x).argmax(1).detach()
    loader = DataLoader(torch.utils.data.TensorDataset(x, y), 8)
    stronger = PGD(0.3, steps=5, loss="cw")  # than any by cross-entropy here, so it tells nothing about gradients
    attacks = [PGD(0.3, steps=3), PGD(0.3, steps=3, loss="cw"), PGD(0.2, steps=3, loss="dlr"), stronger]
    measure = AdversarialAccuracy(attacks)
    with all_warnings() as told:
        for _ in range(2):
            logged = run("validate", module, [measure], loader)
    masked = [message for message in told if "masked" in message]
    assert len(masked) == times
    if times:
        assert "pgd_cw_linf_0.3_3x1 leaves" in masked[0]
        assert logged["robust/pgd_cw_linf_0.3_3x1/accuracy"] < logged["robust/pgd_linf_0.3/accuracy"] - 0.05


def test_an_attack_that_was_given_more_steps_is_no_sign_of_masking():
    module, (x, _) = Net(), data().dataset.tensors
    loader = DataLoader(torch.utils.data.TensorDataset(x, module.eval()(x).argmax(1).detach()), 8)
    attacks = [PGD(1.0, steps=1, step_size=1e-6, restarts=1), PGD(1.0, steps=20, loss="cw")]
    with all_warnings() as told:
        logged = run("validate", module, [AdversarialAccuracy(attacks)], loader)
    assert logged["robust/pgd_cw_linf_1/accuracy"] < logged["robust/pgd_linf_1/accuracy"] - 0.05
    assert not any("masked" in message for message in told)


class CountsCalls(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def test_buffers_are_left_as_found():
    module = CountsCalls()
    run("validate", module, [])
    alone = module.calls.item()
    run("validate", module, [AdversarialAccuracy(PGD(0.1, steps=2), radius_estimate=True)])
    assert module.calls.item() == 2 * alone


class Result(L.Callback):
    def __init__(self, path):
        self.path = path

    def on_validation_end(self, trainer, pl_module):
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        hand_over(logged, trainer, self.path)


@pytest.mark.parametrize("max_samples", [None, 9, 1])
def test_two_ranks_equal_one(tmp_path, max_samples):
    module = Net()
    measure = AdversarialAccuracy(FGSM(0.2), max_samples=max_samples, radius_estimate=True)
    # Lightning deals the samples out in turn, so both ranks' first ones are the first of all.
    run("validate", module, [measure, Result(tmp_path)], **two_ranks())
    first, second = handed_over(tmp_path)
    x, y = (tensor[:max_samples] for tensor in data().dataset.tensors)
    assert first == second
    assert first == pytest.approx(
        {
            CLEAN: expected(module, x, y),
            FGSM_KEY: expected(module, x, y, FGSM(0.2)),
            "robust/radius_estimate": radius_estimate(module, x, y).mean().item(),
        }
    )
