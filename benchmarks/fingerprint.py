"""Check that two versions of the code train bitwise equal weights. Prints a hash of the weights for each penalty.

    python benchmarks/fingerprint.py > before.txt     # on the other version: > after.txt; then diff the two

Each run is twelve steps of the command line's classifier on digits, with a small network, one thread and a fixed seed.
The runs cover every method of every penalty, gradient accumulation, warm-up and batch norm. Then follow runs of the
command line with every regularizer in `conf/`.
"""

from __future__ import annotations

import hashlib
import logging
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

import lightning as L  # noqa: E402
from hydra import compose, initialize_config_dir  # noqa: E402

import lightning_hessian as lh  # noqa: E402
from lightning_hessian.cli import command, data, models  # noqa: E402
from lightning_hessian.cli.classifier import Classifier  # noqa: E402

PENALTIES = {
    "none": (),
    "trace": (lh.HessianTrace(),),
    "trace, two probes, keep 0.5": (lh.HessianTrace(probes=2, keep=0.5),),
    "trace, elements": (lh.HessianTrace(keep=0.5, drop="element", scale="parameter", clamp=0.0),),
    "two_pass": (lh.HessianTrace(method="two_pass", probes=2),),
    "central_difference": (lh.HessianTrace(method="central_difference", parameters="*.weight"),),
    "gauss_newton": (lh.HessianTrace(method="gauss_newton", scale="parameter"),),
    "norm": (lh.HessianNorm(iterations=2),),
    "norm, central_difference": (lh.HessianNorm(method="central_difference"),),
    "input gradient": (lh.InputGradientNorm(),),
    "input Hessian": (lh.InputHessianNorm(2, "lanczos"),),
    "input Hessian, finite_difference": (lh.InputHessianNorm(method="finite_difference"),),
    "Jacobian": (lh.JacobianNorm(),),
    "several": (lh.HessianTrace(), lh.InputGradientNorm(), lh.HessianTrace(method="central_difference")),
}


def weights_of(penalties: tuple[lh.Penalty, ...], model: str, accumulate: int) -> str:
    L.seed_everything(0, verbose=False)
    source = data.Digits(batch_size=16, train_samples=200, seed=0)
    module = Classifier(getattr(models, model)(source.shape, source.classes, width=8), source.classes)
    callbacks = [lh.HessianRegularizer(list(penalties), 1e-4, warmup_steps=3)] if penalties else []
    trainer = L.Trainer(
        accelerator="cpu", max_steps=12, callbacks=callbacks, accumulate_grad_batches=accumulate, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, source)
    return fingerprint(module.state_dict())


def weights_of_command_line(regularizer: str) -> str:
    few = ["model=cnn", "logger=none", "+trainer.max_steps=12", "trainer.enable_progress_bar=false", "trace.probes=2"]
    config = compose("config", [f"regularizer={regularizer}", "regularizer.warmup_steps=3", *few])
    with tempfile.TemporaryDirectory() as directory:
        command.train(config, Path(directory))
        return fingerprint(torch.load(Path(directory) / "checkpoints" / "last.ckpt")["state_dict"])


def fingerprint(state: dict[str, Any]) -> str:
    flat = torch.cat([value.double().flatten() for value in state.values()])
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()[:16]


def main() -> None:
    torch.set_num_threads(1)
    for name, penalties in PENALTIES.items():
        for model, accumulate in (("cnn", 1), ("mlp", 2)):
            print(f"{name:<34}{model:<6}{weights_of(penalties, model, accumulate)}", flush=True)
    with initialize_config_dir(str(command.config_directory()), version_base="1.3"):
        for path in sorted((command.config_directory() / "regularizer").glob("*.yaml")):
            if path.stem != "none":
                print(f"{'lightning-hessian':<20}{path.stem:<26}{weights_of_command_line(path.stem)}", flush=True)


if __name__ == "__main__":
    main()
