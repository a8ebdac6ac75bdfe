"""Resuming on the command line: a run goes on with its own settings, and what is changed is said."""

from pathlib import Path

import pytest
import torch
from interruptions import Killed, killed_at
from omegaconf import OmegaConf
from test_cli import QUICK, run  # noqa: F401
from test_report import rows_of

from lightning_hessian.cli.results import Results


@pytest.fixture
def interrupted(run, monkeypatch):  # noqa: F811
    """A run that was killed in its second epoch of three, in the folder `part`."""
    with killed_at(2, monkeypatch), pytest.raises(Killed):
        run(*QUICK, "seed=3", "optimizer.lr=0.05", "trainer.max_epochs=3", "logger=none", "hydra.run.dir=part")
    return run


def test_a_run_goes_on_with_its_own_settings(interrupted):
    out, err, status = interrupted("resume=part", "hydra.run.dir=rest")
    assert status == 0, err
    assert "resumed with" not in out
    ours, theirs = (OmegaConf.load(f"{name}/config.yaml") for name in ("rest", "part"))
    assert (ours.seed, ours.optimizer.lr, ours.model.width, ours.trainer.max_epochs) == (3, 0.05, 16, 3)
    assert ours.resume == str(Path("part").resolve())  # a report started in another folder finds it
    ours.resume = None
    assert ours == theirs


def test_the_best_epoch_before_the_interruption_still_counts(run, monkeypatch):  # noqa: F811
    """The learning rate grows, so the first epoch is the best one."""
    grows = ["scheduler=none", "optimizer.lr=0.3", "optimizer.weight_decay=0.5", "trainer.max_epochs=3", "tested=best"]
    whole, _, _ = run(*QUICK, *grows, "logger=none", "hydra.run.dir=whole")
    with killed_at(3, monkeypatch), pytest.raises(Killed):
        run(*QUICK, *grows, "logger=none", "hydra.run.dir=part")
    resumed, err, status = run("resume=part", "hydra.run.dir=rest")
    assert status == 0, err
    assert whole.split("files")[0] == resumed.split("files")[0]
    ends = [Results.load(Path(name)) for name in ("whole", "rest")]
    assert ends[0].objective == ends[1].objective
    assert ends[0].metrics == ends[1].metrics
    assert ends[1].epoch < 3
    assert "part" not in str(torch.load("rest/checkpoints/last.ckpt", weights_only=False)["callbacks"])


@pytest.mark.parametrize("where", ["part", "rest"])
def test_the_rows_of_a_csv_log_go_on(run, monkeypatch, where):  # noqa: F811
    with killed_at(3, monkeypatch), pytest.raises(Killed):
        run(*QUICK, "trainer.max_epochs=3", "logger=csv", "hydra.run.dir=part")
    before = rows_of(Path("part/metrics.csv"))
    _, err, status = run("resume=part", f"hydra.run.dir={where}")
    assert status == 0, err
    assert "Previous log files" not in err
    rows = rows_of(Path(where) / "metrics.csv")
    for name, steps in (("train/penalty", [*range(1, 12)]), ("val/loss", [3, 7, 11]), ("train/loss", [3, 7, 11])):
        assert [int(row["step"]) for row in rows if row[name]] == steps
    assert [row["train/penalty"] for row in rows[:12]] == [row["train/penalty"] for row in before[:12]]
    assert (
        float(next(row["final/trace"] for row in rows if row["final/trace"]))
        == Results.load(Path(where)).curvature.trace.estimate
    )


def test_what_is_overridden_is_said(interrupted):
    out, err, status = interrupted(
        "resume=part", "regularizer.strength=0.01", "trainer.gradient_clip_val=1.0", "hydra.run.dir=rest"
    )
    assert status == 0, err
    assert "resumed with regularizer.strength=0.01 (the run had 0.03)" in out
    assert "resumed with trainer.gradient_clip_val=1.0 (the run had None)" in out
    assert OmegaConf.load("rest/config.yaml").regularizer.strength == 0.01
    out, err, status = interrupted("resume=part", "regularizer=jacobian", "hydra.run.dir=other")
    assert status == 0, err
    assert "resumed with regularizer=jacobian" in out
    assert OmegaConf.load("other/config.yaml").regularizer.penalty._target_.endswith("JacobianNorm")


def test_what_is_changed_refers_to_what_the_run_has_chosen(run, monkeypatch):  # noqa: F811
    """A folder named as that of a sweep's job, and a run that is resumed twice."""
    chosen = ["logger=none", "regularizer=sam", "regularizer.start=0.25", "hydra.run.dir='a=1,b=2'"]
    with killed_at(2, monkeypatch), pytest.raises(Killed):
        run(*QUICK, "trainer.max_epochs=3", *chosen)
    with killed_at(2, monkeypatch), pytest.raises(Killed):
        run("resume=a=1,b=2", "hydra.run.dir=second")
    out, err, status = run("regularizer.penalty.rho=0.1", "resume=second", "hydra.run.dir=third")
    assert status == 0, err
    assert out.count("resumed with") == 1
    assert "resumed with regularizer.penalty.rho=0.1 (the run had 0.05)" in out
    found = Results.load(Path("third"))
    assert found.choices["regularizer"] == "sam"
    assert found.choices["model"] == "mlp"
    assert found.settings["regularizer"]["start"] == 0.25
    _, err, status = run("resume='second'", "regularizer=jacobian", "hydra.run.dir=fourth")
    assert status == 0, err
    assert Results.load(Path("fourth")).settings["regularizer"]["start"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("~regularizer", "resume=part: ~regularizer takes a part of the run away, and a run needs all of them"),
        ("trainer.max_epochs=5", "trainer.max_epochs was 3, and the schedule of the learning rate ends there"),
        ("experiment=fmnist_cnn", "sets several parts of a run. Give the settings one by one"),
        ("data.validation=100", "data.validation=100 cannot change in the middle of a run: the run has trained on"),
        ("baseline=mixup", "sets several parts of a run"),
    ],
)
def test_what_would_not_go_on_is_refused(interrupted, change, message):
    _, err, status = interrupted("resume=part", change, "hydra.run.dir=rest")
    assert status == 2
    assert message in err
    assert "Traceback" not in err


def test_a_run_with_a_constant_learning_rate_may_be_longer(run):  # noqa: F811
    short = [*QUICK, "scheduler=none", "logger=none"]
    assert run(*short, "hydra.run.dir=first")[2] == 0
    out, err, status = run("resume=first", "trainer.max_epochs=3", "hydra.run.dir=longer")
    assert status == 0, err
    assert "resumed with trainer.max_epochs=3 (the run had 2)" in out
    assert "the last weights of epoch 3" in out


def test_a_finished_run_and_one_without_a_checkpoint_are_refused(run):  # noqa: F811
    assert run(*QUICK, "logger=none", "hydra.run.dir=first")[2] == 0
    _, err, status = run("resume=first", "hydra.run.dir=rest")
    assert status == 2
    assert "that run has finished; its results are in first/results.json" in err
    Path("first/checkpoints/last.ckpt").unlink()
    _, err, status = run("resume=first", "hydra.run.dir=rest")
    assert status == 2
    assert "there is no checkpoints/last.ckpt in it, because the run stopped in its first epoch" in err
