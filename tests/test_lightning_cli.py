"""LightningCLI: what a config file says is what runs, and the config that it saves says the same again."""

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from nets import CPU, Classifier, data, weights
from torch import Tensor, nn

import lightning_hessian as lh


class Net(Classifier):
    def __init__(self):
        super().__init__(middle=nn.LayerNorm(6))

    def forward(self, x):
        return self.net(x)

    def train_dataloader(self):
        return data()

    val_dataloader = train_dataloader


def spec(name, **arguments):
    return {"class_path": f"lightning_hessian.{name}", "init_args": arguments}


TRACE = spec("HessianTrace", probes=2, keep=0.5, drop="element", parameters=["net.0.*", "*.bias"], clamp=0.0)
PENALTIES = {
    "trace": TRACE,
    "trace by differences": spec("HessianTrace", method="central_difference", step=1e-2, parameters="*.weight"),
    "scaled trace": spec("HessianTrace", scale="parameter"),
    "norm": spec("HessianNorm", iterations=2, parameters="net.0.*"),
    "norm by differences": spec("HessianNorm", method="central_difference", step=1e-2, parameters=["*.weight"]),
    "input gradient": spec("InputGradientNorm", inputs=0),
    "input Hessian": spec("InputHessianNorm", iterations=2, search="lanczos", squared=True, layer="net.0"),
    "input Hessian by differences": spec("InputHessianNorm", method="finite_difference", step=1e-3),
    "Jacobian": spec("JacobianNorm", projections=-1, inputs=[0]),
    "sharpness": spec("SharpnessAware", rho=0.1, adaptive=True, ascent="global", parameters="*.weight"),
    "confidence": spec("ConfidencePenalty"),
    "a list": [TRACE, spec("JacobianNorm")],
}
PGD = spec("PGD", radius=0.1, norm="l2", steps=2, step_size=0.05, loss="cw", restarts=2, bounds=[-100, 100], seed=3)
CALLBACKS = {
    **{name: spec("HessianRegularizer", penalty=penalty) for name, penalty in PENALTIES.items()},
    "all of a regularizer": spec(
        "HessianRegularizer",
        penalty=TRACE,
        strength=0.02,
        every_n_steps=2,
        warmup_steps=3,
        on_nonfinite="raise",
        seed=4,
        allow_fp16=True,
    ),
    "strengths": spec("HessianRegularizer", penalty=[TRACE, spec("JacobianNorm")], strength=[0.02, 1]),
    "one strength for two": spec("HessianRegularizer", penalty=[TRACE, spec("JacobianNorm")], strength=1),
    "monitor": spec("CurvatureMonitor"),
    "all of a monitor": spec(
        "CurvatureMonitor",
        every_n_epochs=2,
        every_n_steps=3,
        batches="val",
        n_batches=2,
        mode="train",
        probes=3,
        eigenvalues=2,
        iterations=5,
        density_runs=1,
        layers=["net.0.*"],
        overlap={"net.0.*": 2, "net.3.*": 1},
        parameters=["net.0.*", "net.3.*"],
        figures=False,
        png_directory="png",
        seed=5,
    ),
    "no layers": spec("CurvatureMonitor", layers=[], parameters="net.*", figures=False),
    "FGSM": spec("AdversarialAccuracy", attacks=spec("FGSM", radius=0.1)),
    "all of FGSM": spec("AdversarialAccuracy", attacks=spec("FGSM", radius=1, norm="l2", loss="dlr", bounds=[-99, 99])),
    "PGD": spec("AdversarialAccuracy", attacks=PGD),
    "attacks": spec(
        "AdversarialAccuracy",
        attacks=[PGD, spec("FGSM", radius=0.2), spec("PGD", radius=0.1)],
        every_n_epochs=2,
        max_samples=5,
        radius_estimate=True,
        inputs=0,
        targets=1,
    ),
}


def told(thing):
    """Everything that an object holds, in a form that can be compared."""
    if isinstance(thing, dict):
        return {key: told(value) for key, value in thing.items()}
    if isinstance(thing, list | tuple | set):
        return [type(thing), *map(told, thing)]
    if isinstance(thing, str | int | float | None | Path):
        return thing
    assert not isinstance(thing, Tensor)
    fields = dataclasses.asdict(thing) if dataclasses.is_dataclass(thing) else vars(thing)
    return [type(thing), told(fields)]


def ours(cli):
    return [one for one in cli.trainer.callbacks if type(one).__module__.startswith("lightning_hessian")]


def write(path, *callbacks):
    Path(path).write_text(yaml.safe_dump({"trainer": {**CPU, "max_steps": 1, "callbacks": list(callbacks)}}))


@pytest.mark.parametrize("name", CALLBACKS)
def test_the_saved_config_gives_the_same_objects_again(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("given.yaml", CALLBACKS[name])
    cli = LightningCLI(Net, args=["--config", "given.yaml"], run=False)
    cli.parser.save(cli.config, "config.yaml", skip_none=False, multifile=False)  # as LightningCLI does
    (given,) = ours(cli)
    (again,) = ours(LightningCLI(Net, args=["--config", "config.yaml"], run=False))
    assert told(given) == told(again)
    for argument, value in CALLBACKS[name]["init_args"].items():
        if isinstance(value, str):
            assert str(getattr(again, argument)) == value
        elif isinstance(value, int | float):
            assert getattr(again, argument) == value
    if name == "strengths":
        assert again.strength == [0.02, 1]
    if name == "attacks":
        pgd, fgsm, _ = again.attacks
        assert type(pgd) is lh.PGD
        assert dataclasses.asdict(pgd) == PGD["init_args"] | {"bounds": (-100, 100)}
        assert type(fgsm) is lh.FGSM


def test_a_fit_saves_a_config_that_fits_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("given.yaml", CALLBACKS["strengths"], CALLBACKS["monitor"], CALLBACKS["attacks"])
    first = LightningCLI(Net, args=["fit", "--config", "given.yaml"])
    Path("config.yaml").rename("saved.yaml")
    second = LightningCLI(Net, args=["fit", "--config", "saved.yaml"])
    assert [type(one) for one in ours(first)] == [type(one) for one in ours(second)]
    assert torch.equal(weights(first.model), weights(second.model))
