"""Models, data and optimizers of the user's own on the command line: the page in docs/, as it is written."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from test_cli import run  # noqa: F401

PAGE = (Path(__file__).parents[1] / "docs/own-model.md").read_text()
QUIET = [
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
    "trainer.enable_model_summary=false",
    "logger=none",
]


@pytest.fixture
def project(run, monkeypatch, tmp_path):  # noqa: F811
    """The files of the page, in the folder where the command is started."""
    for name, content in re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", PAGE, flags=re.DOTALL):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_project", raising=False)
    return run


COMMANDS = [shlex.split(line)[1:] for line in re.findall(r"^lightning-hessian .*", PAGE, flags=re.MULTILINE)]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[3])
def test_the_commands_of_the_page_run(project, command):
    _, err, status = project(*command, *QUIET, "hydra.run.dir=here")
    assert status == 0, err
    results = json.loads(Path("here/results.json").read_text())
    assert results["images"] >= 400
    metric = "test/mse" if "model=regression" in command else "test/accuracy"
    assert metric in results["metrics"]
    assert results["curvature"]["stability"] is not None
    assert results["objective"]["value"] is not None


def test_what_others_can_do_these_can_too(project):
    own = ["--config-dir", "my_conf", "data=blobs", "trainer.max_epochs=2", *QUIET]
    network, regression = [*own, "model=net"], [*own, "model=regression", "objective.metric=val/mse"]
    for command in (
        [
            *network,
            "regularizer=jacobian",
            "regularizer.strength=share:0.1",
            "baseline=label_smoothing",
            "compare=none",
        ],
        [*network, "scheduler=none", "optimizer=adamw", "monitor=curvature", "hydra.run.dir=short"],
        ["resume=short", "trainer.max_epochs=3"],
        [*network, "scheduler=one_cycle", "tested=best"],
        [*regression, "regularizer=sam", "objective.metric=null"],
        ["-m", *regression, "regularizer=hessian_norm,none", "hydra.sweep.dir=sweep"],
    ):
        _, err, status = project(*command)
        assert status == 0, err
    assert len(list(Path("sweep").glob("*/results.json"))) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model=net", "model._target_=my_project.nothing"], "nothing"),
        (["model=net", "model._target_=no_such_module.net"], "no_such_module"),
        (["model=net", "model._target_=builtins.dict"], "is neither a LightningModule nor an nn.Module"),
        (["model=net", "data._target_=my_project.net", "+data.width=1", "+data.classes=2", "~data.batch_size"],
         "is not a LightningDataModule"),
        (["model=regression"], "val/loss"),
        (["model=regression", "objective.metric=null", "regularizer.strength=auto"], "take share:0.1"),
        (["model=net", "optimizer.lr=abc"], "optimizer.lr='abc' must be a number"),
        (["model=net", "model._target_=nope.Net"], "model._target_=nope.Net cannot be imported"),
        (["model=net", "data._target_=my_project.Nope"], "data._target_=my_project.Nope cannot be imported"),
        (["model=net", "optimizer._target_=torch.optim.No"], "optimizer._target_=torch.optim.No cannot be imported"),
        (["model=net", "optimizer=adam", "+optimizer.momentum=0.9"], "optimizer: "),
    ],
)  # fmt: skip
def test_what_cannot_work_gives_one_line(project, arguments, message):
    _, err, status = project("--config-dir", "my_conf", "data=blobs", "trainer.max_epochs=1", *QUIET, *arguments)
    told = [line for line in err.splitlines() if line.startswith("lightning-hessian: ")]
    assert status == 2, err
    assert len(told) == 1
    assert message in told[0]
    assert "Traceback" not in err
    assert "[ERROR]" not in err


def test_data_without_the_number_of_classes_is_refused_for_a_classifier(project):
    Path("my_project.py").write_text(Path("my_project.py").read_text().replace("    classes = 3\n", ""))
    _, err, status = project("--config-dir", "my_conf", "data=blobs", "model=net", "+model.classes=3", *QUIET)
    assert status == 2
    assert "does not tell the number of classes" in err


def test_a_module_without_a_test_has_its_curvature_all_the_same(project):
    text = Path("my_project.py").read_text()
    Path("my_project.py").write_text(text.replace("def test_step", "def no_test_step"))
    own = ["--config-dir", "my_conf", "data=blobs", "model=regression", "trainer.max_epochs=1", *QUIET]
    out, err, status = project(*own, "objective.metric=val/mse", "hydra.run.dir=here")
    assert status == 0, err
    assert json.loads(Path("here/results.json").read_text())["metrics"] == {}
    assert "Hessian trace" in out
    _, err, status = project(*own, "objective.metric=val/other")
    assert status == 2
    assert "val/other" in err
    assert "Traceback" not in err
