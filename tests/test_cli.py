"""The command line, in this process: a run, its files, its errors, sweeps, resuming, every config."""

import importlib
import json
import re
import shlex
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from interruptions import Killed, killed_at
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lightning_hessian as lh
from lightning_hessian.__main__ import main as entry_point
from lightning_hessian.cli import command
from lightning_hessian.cli.data import DEBIAN_FASHION_MNIST, Digits, FashionMNIST, _random_crop
from lightning_hessian.cli.robustness import PixelAdversarialAccuracy

QUICK = [
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
    "trainer.enable_model_summary=false",
    "model=mlp",
    "model.width=16",
    "data.batch_size=256",
    "trainer.max_epochs=2",
    "trainer.log_every_n_steps=1",
    "trace.samples=64",
]
CONF = Path(__file__).parents[1] / "conf"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the command in an empty folder; give back what it printed and its exit status."""
    monkeypatch.chdir(tmp_path)

    def run_it(*arguments):
        monkeypatch.setattr(sys, "argv", ["lightning-hessian", *arguments])
        status = 0
        try:
            command.main()
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return out, err, status

    return run_it


def scalars(directory):
    events = EventAccumulator(str(directory)).Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_run_leaves_events_a_checkpoint_and_its_config_and_prints_its_end(run, tmp_path):
    out, _, status = run(*QUICK, "hydra.run.dir=here")
    assert status == 0
    assert re.search(r"test accuracy +0\.\d+", out)
    assert re.search(r"test loss +\d+\.\d+", out)
    assert re.search(r"Hessian trace +\S+ \+- \S+ \(10 probes, 64 training samples, evaluation mode\)", out)
    eigenvalue, residual = re.search(r"largest eigenvalue +(\S+) \(residual (\S+)\)", out).groups()
    stability = re.search(r"stability +(\S+) \(learning rate 0.1 x largest eigenvalue / 2", out).group(1)
    assert float(stability) == pytest.approx(0.05 * float(eigenvalue), rel=0.01)
    assert float(residual) < 0.1 * float(eigenvalue)
    assert re.search(r"TensorBoard +\S*tensorboard --logdir '.*here'", out)
    logged = scalars(tmp_path / "here")
    assert {
        "curvature/gauss_newton_trace",
        "train/penalty",
        "train/loss",
        "train/accuracy",
        "val/loss",
        "val/accuracy",
    } <= (set(logged))
    # Both were recorded in float32, at every step but the first, where the warm-up begins with 0.
    ramp = torch.arange(1, 8) / 200
    torch.testing.assert_close(
        torch.tensor(logged["train/penalty"]), 3e-2 * ramp * torch.tensor(logged["curvature/gauss_newton_trace"])
    )
    assert (tmp_path / "here/checkpoints/last.ckpt").is_file()
    assert OmegaConf.load(tmp_path / "here/config.yaml").regularizer.strength == 3e-2


def test_the_monitor_logs_beside_the_penalty_and_changes_nothing(run, tmp_path):
    plain, _, _ = run(*QUICK)
    watched, err, status = run(*QUICK, "monitor=curvature", "monitor.density_runs=1", "hydra.run.dir=here")
    assert status == 0, err
    assert plain.split("files")[0] == watched.split("files")[0]
    logged = scalars(tmp_path / "here")
    assert {
        "curvature/gauss_newton_trace",
        "curvature/trace",
        "curvature/largest_eigenvalue",
        "curvature/stability",
    } <= set(logged)
    assert len(logged["curvature/trace"]) == 3


def test_same_seed_same_numbers_and_another_seed_others(run):
    def numbers(*arguments):
        return run(*QUICK, *arguments)[0].split("files")[0]

    first = numbers()
    assert first == numbers()
    assert first != numbers("seed=1")


def test_a_resumed_run_equals_an_uninterrupted_one(run, monkeypatch):
    whole, _, _ = run(*QUICK, "hydra.run.dir=whole")
    with killed_at(2, monkeypatch), pytest.raises(Killed):
        run(*QUICK, "hydra.run.dir=part")
    for number, there in enumerate(("part", "part/checkpoints/last.ckpt")):
        resumed, err, status = run(f"hydra.run.dir=rest{number}", f"resume={there}")
        assert status == 0, err
        assert whole.split("files")[0] == resumed.split("files")[0]
        epochs = [json.loads(Path(name, "results.json").read_text())["epochs"] for name in ("whole", f"rest{number}")]
        assert epochs[0][1:] == epochs[1][1:]


def test_a_sweep_over_the_strength(run, tmp_path):
    out, _, status = run("-m", *QUICK, "regularizer.strength=0,1e-2,3e-2", "hydra.sweep.dir=sweep")
    assert status == 0
    assert out.count("test accuracy") == 3
    first, _, last = sorted(path for path in (tmp_path / "sweep").iterdir() if path.is_dir())
    assert re.search(r"regularizer\.strength=0(,|$)", first.name)
    assert re.search(r"regularizer\.strength=0.03(,|$)", last.name)
    assert "curvature/gauss_newton_trace" not in scalars(first)
    assert "curvature/gauss_newton_trace" in scalars(last)


def test_auto_chooses_a_strength_saves_it_and_trains_as_with_that_number(run):
    # Random crops: what chooses the strength must draw none of the numbers that training draws.
    auto, _, status = run(*QUICK, "data.augment=true", "regularizer.strength=auto", "hydra.run.dir=auto")
    assert status == 0
    line, _, rest = auto.partition("\n")
    chosen = OmegaConf.load("auto/config.yaml").regularizer.strength
    assert isinstance(chosen, float)
    assert re.fullmatch(
        rf"strength +{chosen:.4g} \(\S+ to \S+ over 4 batches\), .* of gauss_newton_trace is 10 % of the task loss's",
        line,
    )
    given, _, _ = run(*QUICK, "data.augment=true", f"regularizer.strength={chosen}", "hydra.run.dir=given")
    assert rest.split("files")[0] == given.split("files")[0]
    ends = [torch.load(f"{run}/checkpoints/last.ckpt", weights_only=False)["state_dict"] for run in ("auto", "given")]
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)


def test_auto_for_several_penalties_in_a_sweep(run):
    small = [*QUICK[:3], "model=mlp", "model.width=8", "trainer.fast_dev_run=1", "trace.samples=16"]
    both = ["regularizer=input_gradient_hessian", "regularizer.strength=auto,[auto,0.5]"]
    out, err, status = run("-m", *small, *both, "hydra.sweep.dir=sweep")
    assert status == 0, err
    assert [out.count(f"of {name} is 10 %") for name in ("input_gradient_norm", "input_hessian_norm")] == [2, 1]
    configs = [OmegaConf.load(path) for path in Path("sweep").glob("*/config.yaml")]
    second, first = sorted((one.regularizer.strength for one in configs), key=lambda pair: pair[1] != 0.5)
    assert first[0] == second[0] > 0
    assert first[1] not in (first[0], 0.5)
    assert second[1] == 0.5


@pytest.fixture(scope="module")
def plain_accuracies():
    return {}


@pytest.mark.parametrize(
    ("model", "regularizer"),
    [
        *(("cnn", regularizer) for regularizer in ("input_gradient", "input_hessian", "jacobian")),
        *(("softplus_cnn", regularizer) for regularizer in ("hessian_norm", "input_gradient_hessian")),
        ("mlp", "hessian_trace"),
        ("vit", "input_gradient"),
    ],
)
def test_auto_trains_about_as_well_as_no_penalty(run, plain_accuracies, model, regularizer):
    # The other pairs, and longer: benchmarks/auto_strengths.py.
    small = [*QUICK[:3], f"model={model}", "model.width=16", "trainer.max_epochs=4", "trace.samples=16", "logger=none"]
    small += ["model.depth=1", "trainer.max_epochs=2", "optimizer.lr=0.02"] if model == "vit" else []

    def accuracy(*arguments):
        out, err, status = run(*small, *arguments)
        assert status == 0, err
        return float(re.search(r"test accuracy +(\S+)", out).group(1))

    if model not in plain_accuracies:
        plain_accuracies[model] = accuracy("regularizer=none")
    found = accuracy(f"regularizer={regularizer}", "regularizer.strength=auto")
    assert found > plain_accuracies[model] - 0.02


def test_auto_where_training_diverges_by_itself(run):
    _, err, status = run(*QUICK, "regularizer.strength=auto", "optimizer.lr=1e20")
    assert status == 3
    assert "without a penalty: training has diverged, so no strength can be chosen" in err
    assert "Lower optimizer.lr" in err


def test_auto_without_a_penalty_gives_one_line(run):
    _, err, status = run(*QUICK, "regularizer=none", "regularizer.strength=auto")
    assert status == 2
    assert err.strip() == "lightning-hessian: there is no option regularizer.strength; regularizer=none has no settings"


@pytest.mark.parametrize(
    "arguments",
    [
        ["regularizer=none"],
        ["logger=csv"],
        ["logger=none"],
        ["model=mlp", "model.width=8"],
        ["model=cnn", "model.width=4"],
        ["model=vit", "model.width=8", "model.depth=1", "model.heads=2"],
        [
            "model=resnet18",
            "data.batch_size=4",
            "regularizer.penalty.method=two_pass",
            "trace.probes=2",
            "trace.samples=4",
        ],
        ["model=mlp", "model.width=8", "regularizer.penalty.method=autograd", "regularizer.penalty.keep=0.5"],
        ["model=cnn", "model.width=4", "regularizer=hessian_norm"],
        ["model=mlp", "model.width=8", "regularizer=sam", "regularizer.penalty.adaptive=true"],
        ["model=mlp", "model.width=8", "regularizer.strength=share:0.1"],
        ["regularizer=hessian_norm", "regularizer.strength=stability:0.5"],
        ["regularizer.strength=trace:5", "monitor=curvature", "monitor.every_n_steps=2"],
        ["model=softplus_cnn", "model.width=4", "regularizer=input_hessian"],
        ["model=softplus_cnn", "model.width=4", "regularizer=input_gradient"],
        ["model=softplus_cnn", "model.width=4", "regularizer=jacobian"],
        ["model=softplus_cnn", "model.width=4", "regularizer=input_gradient_hessian"],
        ["model=cnn", "model.width=4", "regularizer=input_hessian", "regularizer.penalty.method=finite_difference"],
        ["data.augment=true", "trainer.accumulate_grad_batches=2"],
        ["trainer=ddp", "trainer.strategy=ddp_fork", "model=mlp"],
    ],
    ids=" ".join,
)
def test_every_config_runs(run, arguments):
    # One step, with the whole penalty in it.
    at_once = [] if "regularizer=none" in arguments else ["regularizer.warmup_steps=0"]
    quick = ["data.batch_size=32", "trainer.fast_dev_run=1", "trace.samples=16", *at_once]
    _, err, status = run(*QUICK[:3], *quick, *arguments)
    assert status == 0, err


@pytest.mark.parametrize("normalize", ["true", "false"])
@pytest.mark.parametrize("robustness", ["pgd", "study"])
def test_the_summary_tells_the_accuracy_under_attack(run, robustness, normalize):
    small = ["model=mlp", "model.width=8", f"data.normalize={normalize}", "trainer.fast_dev_run=1"]
    out, err, status = run(
        *QUICK[:3], *small, "robustness.max_samples=8", "trace.samples=16", f"robustness={robustness}"
    )
    assert status == 0, err
    assert "clean/accuracy" in out
    assert "pgd_linf_0.1/accuracy" in out
    assert ("radius_estimate" in out) == (robustness == "study")


def test_radii_mean_pixels_where_the_data_are_normalized():
    class Net(torch.nn.Module):  # class 0 where a normalized pixel is above what 0.5 becomes
        trainer = None

        def forward(self, x):
            above = x.mean(dim=(1, 2, 3)) - (0.5 - 0.305) / 0.376
            return torch.stack([above, -above], dim=1)

    net, data = Net(), Digits()
    net.trainer = type("Trainer", (), {"datamodule": data})
    attacks = PixelAdversarialAccuracy(lh.PGD(0.1, bounds=(0, 1)))
    pixels = torch.full((3, 1, 8, 8), 0.5) + torch.tensor([0.0, 0.09, 0.11]).view(3, 1, 1, 1)
    model, x = attacks.attacked(net, data._scaled(255 * pixels))
    torch.testing.assert_close(x, pixels)
    y = torch.tensor([0, 0, 0])
    assert model(attacks.attacks[0](model, x, y)).argmax(1).tolist() == [1, 1, 0]
    torch.testing.assert_close(lh.radius_estimate(model, x, y)[1:], torch.tensor([0.09, 0.11]) * 8)
    data.normalize = False
    assert attacks.attacked(net, x)[0] is net


@pytest.mark.parametrize("experiment", [path.stem for path in (CONF / "experiment").glob("*.yaml")])
def test_every_experiment_composes(run, experiment):
    out, _, status = run(f"experiment={experiment}", "--cfg", "job", "--resolve")
    assert status == 0
    assert OmegaConf.create(out).data._target_.startswith("lightning_hessian")


def commands_of_the_pages():
    """The arguments of every `lightning-hessian ...` in a block of the README and the pages."""
    pages = [CONF.parent / "README.md", *sorted((CONF.parent / "docs").glob("*.md"))]
    blocks = [
        block for page in pages for block in re.findall(r"^```\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    ]
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("lightning-hessian")]
    return sorted({line.partition(" #")[0].removeprefix("lightning-hessian").strip() for line in lines})


@pytest.mark.parametrize(
    "arguments", [one for one in commands_of_the_pages() if "DATE" not in one and "--config-dir" not in one]
)
def test_every_command_of_the_pages_composes(run, arguments):
    # test_report, test_resume and test_own_model run those that need a folder.
    first_values = [re.sub(r"=([^\[(,]+),.*", r"=\1", one) for one in shlex.split(arguments) if one != "-m"]
    out, err, status = run(*first_values, "--cfg", "job", "--resolve")
    assert status == 0, err
    assert OmegaConf.create(out).data._target_.startswith("lightning_hessian")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("regularizer.strenght=1", "no option regularizer.strenght; did you mean regularizer.strength?"),
        ("regularizer.strength=-1", "regularizer: strength=-1 must be a finite number of at least 0"),
        ("regularizer.strength=abc", "regularizer: strength='abc'"),
        ("regularizer.strength=share:2", "strength='share:2' is none of share:0.1"),
        ("regularizer.strength=stability:-1", "strength='stability:-1' is none of"),
        ("regularizer.strength=budget:1", "strength='budget:1' is none of"),
        ("regularizer.strength=share", "strength='share' is none of share:0.1"),
        ("loss.label_smoothing=2", "loss.label_smoothing=2 must be a number from 0 to 1"),
        ("data.mix=abc", "mix='abc' must be a function of images"),
        (
            "regularizer.strength=stability:0.5",
            "(on the command line monitor=curvature",
        ),
        ("regularizer.strength=[auto,auto]", "has 2 factors for 1 penalties"),
        ("regularizer.penalty.keep=2", "regularizer.penalty: keep=2 is a probability"),
        ("regularizer.penalty.parameters=net.O.*", "Near names: net."),
        ("model=resnt18", "Available options in 'model': cnn gpt lstm mlp resnet18 softplus_cnn vit"),
        ("modle=cnn", "no option modle; did you mean model?"),
        ("model.width=0", "model: width=0"),
        ("data.batch_size=0", "data: batch_size=0"),
        ("optimizer.lr=abc", "optimizer.lr='abc' must be a number"),
        ("optimizer.lr=-1", "optimizer: Invalid learning rate: -1"),
        ("optimizer.momentum=0", "optimizer: Nesterov momentum requires a momentum"),
        ("objective.metric=test/loss", "test data must not choose anything"),
        ("objective.metric=val/f1", "val/f1"),
        ("objective.direction=up", "objective.direction=up is none of minimize, maximize"),
        ("tested=first", "tested=first is none of last, best"),
        ("seed=abc", "seed: Value 'abc'"),
        ("seed=-5", "seed=-5 must be a whole number from 0 to 4294967295"),
        ("seed=4294967296", "seed=4294967296 must be"),
        (
            "compare=hesian_trace",
            "compare=hesian_trace is not a regularizer to compare with. Choose one of",
        ),
        ("hydra.run.dir=/dev/null/run", "hydra.run.dir (in a sweep hydra.sweep.dir) cannot be written"),
        ("hydra.run.dir=/proc", "hydra.run.dir (in a sweep hydra.sweep.dir) cannot be written"),
        ("trainer.max_epochs=abc", "trainer.max_epochs='abc' is not what Trainer takes"),
        ("trainer.precision=7", "trainer: Precision 7 is invalid"),
        ("trace.probes=1", "trace.probes=1"),
        ("resume=nothing", "resume=nothing: there is no such folder. Give the folder of a run"),
        (f"resume={__file__}", "Give the folder of the run"),
        ("trainer.deterministic=true", "add this argument of Lightning's Trainer by +trainer.deterministic=..."),
        ("data.augment=maybe", "data: augment='maybe'"),
        ("regularizer.penalty.parameters=[]", "chooses none"),
    ],
)
def test_a_wrong_option_gives_one_line_that_names_it(run, argument, message):
    _, err, status = run(*QUICK, argument)
    lines = [line for line in err.splitlines() if line.startswith("lightning-hessian: ")]
    assert status == 2
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in err


def test_a_sweep_that_cannot_be_written_gives_one_line(run):
    _, err, status = run("-m", *QUICK, "seed=0,1", "hydra.sweep.dir=/dev/null/sweep")
    assert status == 2
    assert "hydra.sweep.dir) cannot be written" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("directory", ["/dev/null/png", "/proc"])
def test_a_png_directory_that_cannot_be_written_gives_one_line(run, directory):
    _, err, status = run(*QUICK, "monitor=curvature", f"monitor.png_directory={directory}")
    assert status == 2
    assert f"lightning-hessian: png_directory={directory!r} cannot be written" in err
    assert "Traceback" not in err


TRAINERS = "is not a checkpoint of Lightning's Trainer: "


def foreign_zip(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.txt", "a")


def truncated(path):
    torch.save({"state_dict": {"weight": torch.ones(1000)}}, path)
    path.write_bytes(path.read_bytes()[:2000])


def damaged(path):
    torch.save({"state_dict": {"weight": torch.ones(1000)}}, path)
    content = path.read_bytes()
    path.write_bytes(content[:60] + bytes(400) + content[460:])


def weights_only(path):
    torch.save({"state_dict": {"weight": torch.ones(3)}}, path)


def not_a_dictionary(path):
    torch.save([1, 2, 3], path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (foreign_zip, "is not a checkpoint that can be read"),
        (truncated, "is not a checkpoint, or is cut off"),
        (damaged, "is not a checkpoint that can be read"),
        (weights_only, "it has no loops, optimizer_states, lr_schedulers, pytorch-lightning_version"),
        (not_a_dictionary, "it has no state_dict, loops"),
        (lambda path: None, "there is no checkpoints/last.ckpt in it"),
    ],
)
def test_what_is_no_checkpoint_gives_one_line(run, tmp_path, write, message):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    write(tmp_path / "run/checkpoints/last.ckpt")
    out, _, _ = run(*QUICK, "--cfg", "job")
    (tmp_path / "run/config.yaml").write_text(out.replace("${hydra:runtime.output_dir}", "run"))
    _, err, status = run("resume=run")
    assert status == 2
    assert message in err.replace(TRAINERS, "")
    assert "last.ckpt" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            "model.width=8",
            "It has 'net.1.weight' of shape (16, 64), and the model here has 'net.1.weight' of shape (8,",
        ),
    ],
)
def test_a_checkpoint_of_another_model_gives_one_line(run, other, message):
    run(*QUICK, "hydra.run.dir=first", "trainer.max_epochs=1", "trainer.limit_train_batches=1")
    Path("first/results.json").unlink()
    _, err, status = run(other, "resume=first")
    assert status == 2
    assert "the checkpoint is of another model" in err
    assert message in err
    assert "Traceback" not in err


DIVERGES = "optimizer.lr=1e10"


def test_a_run_that_diverges_says_so_and_fails(run):
    out, err, status = run(*QUICK, DIVERGES)
    assert status == 3
    assert re.search(r"test loss +nan", out)
    assert err.strip().splitlines()[-1] == (
        "lightning-hessian: the test loss of this run is nan: training has diverged, and the numbers above are "
        "worthless. Lower optimizer.lr or regularizer.strength, or set trainer.gradient_clip_val."
    )


def test_a_sweep_goes_on_after_jobs_that_fail(run):
    jobs = "optimizer.lr=1e10,-1,0.1"
    out, err, status = run("-m", *QUICK, jobs, "logger=none", "hydra.sweep.dir=sweep")
    assert status == 3
    assert out.count("test accuracy") == 2
    told = [line for line in err.splitlines() if line.startswith("lightning-hessian: ")]
    assert len(told) == 2
    assert re.match(r"lightning-hessian: job 0 \(.*lr=10000000000.0.*\): the test loss of this run is nan", told[0])
    assert re.match(r"lightning-hessian: job 1 \(.*lr=-1.*\): optimizer: Invalid learning rate: -1", told[1])
    assert "Traceback" not in err
    # The next command of this process has failed in nothing.
    assert run("-m", *QUICK, "logger=none", "seed=1")[2] == 0


def test_optuna_survives_a_trial_that_diverges(run):
    sweep = ["hydra/sweeper=optuna", "hydra/sweeper/sampler=grid", "hydra.sweeper.n_jobs=1", "hydra.sweep.dir=sweep"]
    out, err, status = run("-m", *sweep, *QUICK, "logger=none", "optimizer.lr=1e10,0.1")
    assert status == 3
    assert out.count("test accuracy") == 2
    assert len([line for line in err.splitlines() if line.startswith("lightning-hessian: job ")]) == 1
    best = OmegaConf.load("sweep/optimization_results.yaml")
    assert float(best.best_params["optimizer.lr"]) == 0.1
    assert 0 < best.best_value < 10


@pytest.mark.parametrize("sweeper", ["basic", "optuna"])
def test_a_sweep_may_be_described_in_the_settings_of_the_sweeper(run, sweeper):
    own = [f"hydra/sweeper={sweeper}", "hydra.sweep.dir=sweep", "+hydra.sweeper.params={optimizer.lr:'0.1,0.2'}"]
    own += ["hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1"] if sweeper == "optuna" else []
    out, err, status = run("-m", *own, *QUICK, "logger=none", "trainer.max_epochs=1")
    assert status == 0, err
    assert out.count("test accuracy") == 2


def test_compare_trains_once_more_without_the_penalty_and_shows_both(run, tmp_path):
    monitor = ["monitor=curvature", "monitor.png_directory=png"]
    strong = ["regularizer.strength=1", "regularizer.warmup_steps=0"]
    out, err, status = run(*QUICK, *monitor, *strong, "compare=none", "hydra.run.dir=here")
    assert status == 0, err
    plain, _, _ = run(*QUICK, *monitor, "regularizer=none", "hydra.run.dir=plain")
    first, table = out.split("\n\n")
    rows = {line[:18].strip(): re.split(r"  +", line[20:]) for line in table.splitlines()}
    assert rows[""] == ["this run", "compare=none"]
    for column, told in ((0, first), (1, plain)):
        for name in ("test accuracy", "test loss", "Hessian trace", "largest eigenvalue"):
            number = re.search(rf"{name} +(\S+(?: \+- \S+)?)", told).group(1)
            assert rows[name][column] == number
    assert rows["test loss"][0] != rows["test loss"][1]
    assert rows["files"][1].endswith("here/compare_none")
    assert "train/penalty" in scalars(tmp_path / "here")
    assert "train/penalty" not in scalars(tmp_path / "here/compare_none")
    assert (tmp_path / "here/compare_none/checkpoints/last.ckpt").is_file()
    assert OmegaConf.load("here/compare_none/config.yaml").regularizer == {}
    assert sorted(path.name for path in Path("png").glob("*.png")) == sorted(
        path.name for path in Path("png/compare_none").glob("*.png")
    )


def test_the_comparison_of_a_diverged_run_and_of_a_sweep(run):
    # Of this run alone is the objective.
    sweep = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=1", "hydra.sweeper.n_jobs=1", "hydra.sweep.dir=sweep"]
    quick = [*QUICK, "logger=none", "trainer.max_epochs=1"]
    out, _, status = run("-m", *sweep, *quick, "compare=jacobian", "seed=choice(0,1)")
    assert status == 0
    assert "compare=jacobian" in out
    told = float(re.search(r"best val/loss ([\d.]+)", out).group(1))
    assert OmegaConf.load("sweep/optimization_results.yaml").best_value == pytest.approx(told, abs=1e-4)
    out, err, status = run(*quick, "compare=none", DIVERGES)
    assert status == 3
    assert "the test loss of this run is nan" in err
    assert "compare=none" in out


def test_without_the_extra_the_command_names_it(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("lightning_hessian.cli")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "hydra", None)
    with pytest.raises(SystemExit) as stop:
        entry_point()
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("lightning-hessian: ")
    assert 'pip install "lightning-hessian[train]"' in message
    assert "hydra-core" in message
    assert message.count("\n") == 1
    with pytest.raises(ModuleNotFoundError, match=r"lightning-hessian\[train\]"):
        importlib.import_module("lightning_hessian.cli.command")


@pytest.mark.parametrize(
    ("arguments", "kind", "name"),
    [(["+sweep=optuna"], "sweeper", "optuna"), (["-m", "seed=0,1", "hydra/launcher=joblib"], "launcher", "joblib")],
)
def test_without_the_extra_sweep_the_command_names_it(run, monkeypatch, arguments, kind, name):
    Plugins.instance()  # loads the plugins, which store their settings
    monkeypatch.delitem(ConfigStore.instance().repo["hydra"][kind], f"{name}.yaml")  # as if it were not installed
    _, err, status = run(*arguments, *QUICK)
    assert status == 2
    assert f"Could not find 'hydra/{kind}/{name}'" in err
    assert err.endswith('Install it: pip install "lightning-hessian[sweep]"\n')
    assert len(err.splitlines()) == 1


def test_data_that_cannot_be_had_give_one_line(run, monkeypatch):
    import torchvision

    def no_network(*_, **__):
        raise RuntimeError("no network")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", no_network)
    _, err, status = run(*QUICK, "data=cifar10")
    assert status == 2
    assert "CIFAR10 is not in" in err
    assert "use data=digits" in err


def test_digits_are_split_without_overlap_and_in_the_same_way_for_every_seed():
    parts = {}
    for seed in (0, 1):
        data = Digits(seed=seed)
        data.setup("fit")
        assert set(data._sets) == {"train", "val"}
        data.test_dataloader()
        parts[seed] = data._sets
        assert [len(data._sets[part]) for part in ("train", "val", "test")] == [1247, 200, 350]
    assert torch.equal(parts[0]["train"].inputs, parts[1]["train"].inputs)
    images, _ = next(iter(data.val_dataloader()))
    assert images.shape[1:] == (1, 8, 8)
    normalized = torch.cat([batch for batch, _ in data.training_samples(1247)])
    assert abs(normalized.mean()) < 0.02
    assert abs(normalized.std() - 1) < 0.02


def test_random_crop_shifts_each_image_by_itself():
    images = torch.arange(64.0).view(1, 1, 8, 8).repeat(50, 2, 1, 1)
    cropped = _random_crop(images, padding=1)
    assert cropped.shape == images.shape
    assert len({tuple(image.flatten().tolist()) for image in cropped}) > 5
    padded = torch.nn.functional.pad(images[0], [1] * 4)
    windows = [padded[:, i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    assert all(any(torch.equal(image, window) for window in windows) for image in cropped)


@pytest.mark.skipif(not DEBIAN_FASHION_MNIST.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_fashion_mnist_from_debians_package(tmp_path):
    data = FashionMNIST(root=str(tmp_path), train_samples=100, validation=5000)
    data.prepare_data()
    data.setup("fit")
    data.test_dataloader()
    assert [len(data._sets[part]) for part in ("train", "val", "test")] == [100, 5000, 10000]
    assert data._sets["test"].inputs.shape[1:] == (1, 28, 28)
    normalized = torch.cat([batch for batch, _ in data.training_samples(100)])
    assert abs(normalized.mean()) < 0.1


@pytest.mark.skipif(not DEBIAN_FASHION_MNIST.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_fashion_mnist_on_the_command_line(run):
    quick = ["trainer.fast_dev_run=1", "trace.samples=16", "trace.probes=2", "model.width=8"]
    _, err, status = run(*QUICK[:3], "experiment=fmnist_cnn", *quick)
    assert status == 0, err


@pytest.mark.parametrize("group", ["data", "model", "regularizer", "monitor", "robustness", "trainer", "logger"])
def test_an_unknown_choice_of_a_group_is_said_with_those_that_there_are(run, group):
    _, err, status = run(f"{group}=foo")
    assert status == 2
    assert len(err.strip().splitlines()) == 1
    assert f"Could not find '{group}/foo'" in err
    assert "Available options" in err
    assert "cannot be written" not in err
    assert "search path" not in err


def test_a_model_has_its_own_strength_in_comparisons_too(run):
    vit = ["model=vit", "model.width=8", "model.depth=1", "model.heads=2", "trainer.fast_dev_run=1", "trace.samples=16"]
    _, err, status = run(*vit, "trace.probes=2", "regularizer=none", "compare=hessian_trace", "hydra.run.dir=here")
    assert status == 0, err
    assert OmegaConf.load("here/compare_hessian_trace/config.yaml").regularizer.strength == 3e-3
    assert OmegaConf.load("here/config.yaml").optimizer.lr == 0.05
