"""The scripts of examples/ run on tiny models, train what they say, and stay short."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from ranks import handed_over, needs_fsdp2, on_two_processes

import lightning_hessian as lh

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def main_of(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda name: main_of(name)(["--tiny"])


def logged(trainer, name):
    return trainer.callback_metrics[name].item()


def test_every_example_is_tested_and_short():
    here = Path(__file__).read_text()
    for path in EXAMPLES:
        text = path.read_text()
        assert f'run("{path.stem}")' in here
        assert len(text.splitlines()) <= 85
        assert re.search(rf"(python|torchrun .*) examples/{path.name} +#", text), "says how to run it"
        assert path.name in (ROOT / "docs" / "extending.md").read_text()


def test_a_vision_transformer_with_mixup(run):
    trainer = run("timm_vit_mixup")
    assert trainer.global_step == 2
    assert torch.isfinite(trainer.callback_metrics["curvature/hessian_trace"])
    assert 0 <= logged(trainer, "val/accuracy") <= 1


def test_a_text_classifier_with_dictionaries_as_batches(run):
    trainer = run("text_classifier")
    assert logged(trainer, "curvature/gauss_newton_trace") > 0
    assert logged(trainer, "train/strength") > 0


def test_a_penalty_on_the_adapters_changes_them_alone(run):
    trainer = run("lora")
    module = trainer.lightning_module
    (regularizer,) = (one for one in trainer.callbacks if isinstance(one, lh.HessianRegularizer))
    chosen = regularizer.penalty.selected(lh.StepContext(torch.zeros(()), dict(module.named_parameters())))
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert set(chosen) == trained
    assert all("lora_" in name for name in trained)
    assert logged(trainer, "train/penalty") != 0


def test_a_segmentation_network(run):
    trainer = run("segmentation")
    assert logged(trainer, "curvature/largest_eigenvalue") > 0
    assert logged(trainer, "curvature/sharpness") > 0
    assert 0 <= logged(trainer, "val/overlap") <= 1


@needs_fsdp2
def test_sharded_parameters(run, tmp_path):
    def work(rank):
        torch.save(run("fsdp2").callback_metrics, tmp_path / f"{rank}.pt")

    on_two_processes(work)
    first, second = handed_over(tmp_path)
    assert torch.isfinite(first["curvature/hessian_trace"])
    assert first == second
