"""Sweeps: folders, what goes on after an interruption, failed jobs, launchers, Optuna, TensorBoard's HParams."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from interruptions import Killed, killed_at
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_cli import QUICK, run, scalars  # noqa: F401

from lightning_hessian.cli import sweeps
from lightning_hessian.cli.classifier import Classifier
from lightning_hessian.cli.data import Digits

SMALL = [*QUICK, "logger=none", "trace.samples=16", "trace.probes=2"]


def folders(sweep="sweep"):
    return sorted(path.parent for path in Path(sweep).glob("*/config.yaml"))


def results_in(folder):
    return json.loads((folder / "results.json").read_text())


def test_folders_are_named_by_what_was_overridden(run):  # noqa: F811
    _, err, status = run("-m", *SMALL, "trainer.max_epochs=1", "regularizer.strength=0,1e-2", "hydra.sweep.dir=sweep")
    assert status == 0, err
    assert [re.search(r"regularizer\.strength=([\d.]+)", folder.name).group(1) for folder in folders()] == ["0", "0.01"]
    assert all("model=mlp" in folder.name for folder in folders())


@pytest.mark.parametrize("overrides", ["a.b=" + "x" * 300, "data.root=/a/b:c", ""])
def test_folder_names_are_names_of_one_folder(overrides):
    name = sweeps.folder_name(overrides)
    assert 0 < len(name) < 255
    assert "/" not in name
    assert name == sweeps.folder_name(overrides)


def test_started_again_finished_jobs_are_skipped_and_an_interrupted_one_goes_on(run, monkeypatch):  # noqa: F811
    sweep = ["-m", *SMALL, "regularizer.warmup_steps=2", "seed=0,1,2", "hydra.sweep.dir=sweep"]
    run(*[one.replace("sweep.dir=sweep", "sweep.dir=whole") for one in sweep])
    with killed_at(4, monkeypatch), pytest.raises(Killed):
        run(*sweep)
    assert [(folder / "results.json").is_file() for folder in folders()] == [True, False]
    epochs = []
    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "on_train_epoch_start", lambda module: epochs.append(module.current_epoch))
        out, err, status = run(*sweep)
    assert status == 0, err
    assert epochs == [1, 0, 1]  # the rest of the second job, and the third
    assert out.count("finished before") == 1
    assert out.count("goes on from") == 1
    for ours, theirs in zip(folders("sweep"), folders("whole"), strict=True):
        for name in ("metrics", "training_loss", "objective"):
            assert results_in(ours)[name] == results_in(theirs)[name]


def test_a_run_goes_on_from_its_last_epoch_not_from_its_best(run, monkeypatch):  # noqa: F811
    grows = [*SMALL, "scheduler=none", "optimizer.lr=0.3", "optimizer.weight_decay=0.5", "trainer.max_epochs=4"]
    sweep = ["-m", *grows, "seed=0", "hydra.sweep.dir=sweep"]
    with killed_at(4, monkeypatch) as epochs:
        with pytest.raises(Killed):
            run(*sweep)
        losses = torch.load(folders()[0] / "checkpoints/last.ckpt", weights_only=False)["callbacks"]["History"][
            "epochs"
        ]
        assert losses[-1]["val/loss"] > losses[0]["val/loss"]
        _, err, status = run(*sweep)
    assert status == 0, err
    assert epochs == [0, 1, 2, 3, 3]


def test_a_sweep_does_not_resume_another_run(run):  # noqa: F811
    _, err, status = run("-m", *SMALL, "seed=0", "resume=somewhere", "hydra.sweep.dir=sweep")
    assert status == 2
    assert "a sweep does not resume another run" in err


def test_a_folder_with_a_run_of_other_settings_is_refused(run):  # noqa: F811
    sweep = ["-m", *SMALL, "trainer.max_epochs=1", "hydra.sweep.dir=sweep", "hydra.sweep.subdir=same"]
    assert run(*sweep, "seed=0")[2] == 0
    _, err, status = run(*sweep, "seed=1")
    assert status == 2
    assert "the folder" in err
    assert "has a run with other settings (data.seed: 0 there, 1 now)" in err


def test_a_checkpoint_that_is_cut_off_starts_the_job_anew(run):  # noqa: F811
    sweep = ["-m", *SMALL, "trainer.max_epochs=1", "seed=0", "hydra.sweep.dir=sweep"]
    run(*sweep)
    (folder,) = folders()
    before = results_in(folder)
    (folder / "results.json").unlink()
    last = folder / "checkpoints/last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    _, err, status = run(*sweep)
    assert status == 0
    assert "is cut off: the job starts anew" in err
    assert results_in(folder)["metrics"] == before["metrics"]


def test_failed_jobs_are_named_at_the_end_with_the_reason_and_run_again(run, monkeypatch):  # noqa: F811
    def fails(self, train):
        raise ZeroDivisionError("a bug")

    jobs = ["-m", *SMALL, "trainer.max_epochs=1", "hydra.sweep.dir=sweep"]
    with monkeypatch.context() as patch:
        patch.setattr(Digits, "load", fails)
        out, err, status = run(*jobs, "seed=0")
    assert status == 1
    assert "Traceback" in err
    assert re.search(r"1 of the jobs failed:\n  job 0 \(.*seed=0.*\): a bug", err)
    out, err, status = run(*jobs, "optimizer.lr=-1,0.1")
    assert status == 2
    assert re.search(r"2 of the jobs failed:\n(.*\n)?  job 0 \(.*lr=-1.*\): optimizer: Invalid learning rate", err)
    assert "1 runs have finished.\nCompare them: lightning-hessian report 'sweep'" in out
    out, err, status = run(*jobs, "seed=0")
    assert status == 0, err  # of the jobs that have run now
    assert "2 runs have finished" in out
    assert "1 of the jobs failed" in err  # what failed before is not forgotten


def test_a_job_waits_while_another_process_runs_it(run):  # noqa: F811
    folder = Path("sweep/defaults").resolve()
    folder.mkdir(parents=True)
    held, release = threading.Event(), threading.Event()

    def other():
        with FileLock(folder / ".lock"):
            held.set()
            release.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    held.wait()
    timer = threading.Timer(3.0, release.set)
    timer.start()
    started = time.monotonic()
    out, err, status = run("-m", *SMALL, "trainer.max_epochs=1", "hydra.sweep.dir=sweep", "hydra.sweep.subdir=defaults")
    thread.join()
    assert status == 0, err
    assert "another process runs the job in" in out
    assert time.monotonic() - started >= 3.0
    assert (folder / "results.json").is_file()


def test_the_objective_is_the_best_validation_metric_and_tests_may_take_its_weights(run):  # noqa: F811
    common = [*SMALL, "trainer.max_epochs=3", "optimizer.lr=0.5", "objective.metric=val/accuracy"]
    out, err, status = run(*common, "objective.direction=maximize", "tested=best", "hydra.run.dir=here")
    assert status == 0, err
    found = results_in(Path("here"))
    accuracies = [epoch["val/accuracy"] for epoch in found["epochs"]]
    assert found["objective"] == {"metric": "val/accuracy", "direction": "maximize", "value": max(accuracies)}
    assert found["epoch"] == accuracies.index(max(accuracies)) + 1
    assert f"the best weights of epoch {found['epoch']} (best val/accuracy {max(accuracies):.4f})" in out
    best = torch.load("here/checkpoints/best.ckpt", weights_only=False)
    assert best["epoch"] + 1 == found["epoch"]


def test_if_the_best_weights_were_deleted_the_last_are_tested(run, monkeypatch):  # noqa: F811
    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "on_fit_end", lambda self: Path("here/checkpoints/best.ckpt").unlink())
        out, err, status = run(*SMALL, "tested=best", "hydra.run.dir=here")
    assert status == 0, err
    assert "here/checkpoints/best.ckpt was deleted: the last weights are tested instead." in err
    assert "the last weights of epoch 2" in out


def test_the_test_images_are_not_read_before_the_end(run, monkeypatch):  # noqa: F811
    order = []
    load, test_step = Digits.load, Classifier.test_step

    def loads(self, train):
        order.append("train" if train else "test")
        return load(self, train)

    monkeypatch.setattr(Digits, "load", loads)
    monkeypatch.setattr(Classifier, "on_train_end", lambda self: order.append("trained"))
    monkeypatch.setattr(
        Classifier, "test_step", lambda self, *args: (order.append("tested"), test_step(self, *args))[1]
    )
    _, err, status = run(*SMALL, "regularizer.strength=auto", "monitor=curvature")
    assert status == 0, err
    assert order[:3] == ["train", "trained", "test"]
    assert set(order[3:]) == {"tested"}


def test_optuna_searches_by_validation_and_goes_on_after_an_interruption(run, monkeypatch):  # noqa: F811
    import optuna

    sweep = ["+sweep=optuna", *SMALL, "trainer.max_epochs=1", "hydra.sweep.dir=sweep", "sweep.trials=4"]
    with killed_at(3, monkeypatch), pytest.raises(Killed):
        run(*sweep)
    _, err, status = run(*sweep)
    assert status == 0, err
    study = optuna.load_study("lightning_hessian", "sqlite:///sweep/optuna.db")
    complete = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]
    assert len(complete) == 4
    assert all({"regularizer.strength", "regularizer.penalty.method"} <= set(trial.params) for trial in complete)
    found = [results_in(folder) for folder in folders() if (folder / "results.json").is_file()]
    assert study.best_value == min(one["objective"]["value"] for one in found)
    assert OmegaConf.load("sweep/optimization_results.yaml").best_value == study.best_value
    others = {
        "optimizer.lr=0.01": "optimizer.lr: 0.1 there, 0.01 now",
        "objective.direction=maximize": "objective.direction: minimize there, maximize now",
    }
    for other, told in others.items():
        _, err, status = run(*sweep, "sweep.trials=5", other)
        assert status == 2
        assert f"sweep has trials of a sweep with other settings ({told}), and Optuna would mix them" in err
        assert len(err.splitlines()) == 1


def test_tensorboards_hparams_has_the_settings_and_the_final_numbers(run):  # noqa: F811
    quick = [one for one in SMALL if one != "logger=none"]
    run("-m", *quick, "trainer.max_epochs=1", "regularizer=none,hessian_trace", "hydra.sweep.dir=sweep")
    for folder in folders():
        events = EventAccumulator(str(folder)).Reload()
        plugins = [events.summary_metadata[tag].plugin_data.plugin_name for tag in events.summary_metadata]
        assert "hparams" in plugins
        logged = scalars(folder)
        assert {"final/trace", "final/largest_eigenvalue", "test/accuracy", "best/val/loss"} <= set(logged)
        assert logged["final/trace"][-1] == pytest.approx(results_in(folder)["curvature"]["trace"]["estimate"])


def test_a_sweep_on_two_cores_that_is_killed_goes_on(tmp_path):
    """As a user types it: four strengths, three seeds, joblib, kill -9, the same command again, the report."""
    command = [sys.executable, "-m", "lightning_hessian", "+sweep=strength", "hydra/launcher=joblib"]
    command += ["hydra.launcher.n_jobs=2", "hydra.sweep.dir=sweep", *SMALL, "trainer.max_epochs=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    settings = {
        "cwd": tmp_path,
        "env": environment,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
    }
    first = subprocess.Popen(command, **settings, start_new_session=True)
    until = time.monotonic() + 240
    while len(list(tmp_path.glob("sweep/*/results.json"))) < 3:
        assert first.poll() is None, first.stdout.read()
        assert time.monotonic() < until
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("sweep/*/results.json")}
    assert 3 <= len(finished) < 12
    again = subprocess.run(command, **settings, timeout=300)
    assert again.returncode == 0, again.stdout
    assert again.stdout.count("finished before") == len(finished)
    assert len(list(tmp_path.glob("sweep/*/results.json"))) == 12
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    report = [sys.executable, "-m", "lightning_hessian", "report", "sweep"]
    shown = subprocess.run(report, **settings, timeout=120)
    assert shown.returncode == 0, shown.stdout
    assert "12 runs in 4 groups" in shown.stdout
    assert (tmp_path / "sweep/report/report.html").is_file()


def test_submitit_on_this_machine(run):  # noqa: F811
    launcher = ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"]
    out, err, status = run("-m", *SMALL, "trainer.max_epochs=1", "seed=0,1", "hydra.sweep.dir=sweep", *launcher)
    assert status == 0, err
    assert "2 runs have finished" in out


def test_weights_and_biases_and_mlflow_get_the_numbers_and_the_figures(run, monkeypatch):  # noqa: F811
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    quick = [one for one in SMALL if one != "logger=none"] + ["monitor=curvature"]
    _, err, status = run("-m", *quick, "logger=wandb", "seed=0,1", "hydra.sweep.dir=sweep")
    assert status == 0, err
    runs = list(Path("sweep").glob("*/wandb/offline-run-*"))
    assert len(runs) == 2  # one for each job
    assert all(list(one.glob("files/media/images/curvature/eigenvalues_*.png")) for one in runs)
    _, err, status = run(*quick, "logger=mlflow", "logger.artifact_location=images")
    assert status == 0, err
    client = MlflowClient("sqlite:///mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'lightning-hessian'")
    (found,) = client.search_runs([experiment.experiment_id])
    assert {"final/trace", "test/accuracy", "curvature/largest_eigenvalue"} <= set(found.data.metrics)
    assert found.data.params["regularizer.strength"] == "0.03"
    assert list(Path("images").rglob("curvature/eigenvalues/step_*.png"))
