"""The report: groups over seeds, the table of means, the files, the page."""

import csv
import dataclasses
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.axes import Axes

from lightning_hessian.__main__ import main as entry_point
from lightning_hessian.cli.report import command
from lightning_hessian.cli.report.table import Mean
from lightning_hessian.cli.results import Objective, Results
from lightning_hessian.curvature import Estimate
from lightning_hessian.monitoring.measurement import Curvature

ACCURACIES = {"0": (0.90, 0.92, 0.91), "0.01": (0.93, 0.94, 0.95), "0.1": (0.80, 0.82, 0.81)}


def finished(directory, strength, seed, accuracy, metric="val/loss", direction="minimize", given=True, **settings):
    """A finished run; `strength` None is regularizer=none, and `given` whether the strength was on the command line."""
    directory.mkdir(parents=True)
    penalty = {"_target_": "lightning_hessian.HessianTrace"}
    regularizer = {} if strength is None else {"penalty": penalty, "strength": float(strength), "seed": seed}
    zero = Estimate(0.0, 0.0, 2)
    curvature = Curvature(
        step=9,
        trace=Estimate(10 * accuracy, 0.1, 10),
        frobenius_norm=zero,
        layers={},
        largest=[(2.0, 0.0)],
        smallest=[(0.0, 0.0)],
        stability=0.1,
        learning_rate=0.1,
    )
    Results(
        metrics={"test/accuracy": accuracy, "test/loss": 1 - accuracy, "robust/pgd/accuracy": accuracy / 2},
        curvature=curvature,
        images=10,
        directory=directory,
        training_loss=0.05,
        objective=Objective(metric=metric, direction=direction, value=1 - accuracy),
        epochs=[{"epoch": epoch, "val/loss": 1 / epoch, "val/accuracy": accuracy} for epoch in (1, 2, 3)],
        seconds_per_step=0.01,
        settings={"seed": seed, "model": {"width": 16}, "regularizer": regularizer, **settings},
        overrides=["model=mlp", f"seed={seed}", *([f"regularizer.strength={strength}"] if given else [])],
        choices={"model": "mlp", "regularizer": "none" if strength is None else "hessian_trace", "experiment": None},
    ).save()
    (directory / "config.yaml").write_text("{}")


@pytest.fixture
def sweep(tmp_path):
    for strength, accuracies in ACCURACIES.items():
        for seed, accuracy in enumerate(accuracies):
            finished(tmp_path / f"sweep/strength={strength},seed={seed}", strength, seed, accuracy)
    return tmp_path / "sweep"


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_table_has_means_and_standard_errors_over_seeds_best_objective_first(sweep, capsys):
    command.main([str(sweep)])
    rows = rows_of(sweep / "report/table.csv")
    assert [row["regularizer.strength"] for row in rows] == ["0.01", "0", "0.1"]
    assert "model" not in rows[0]  # the same in all
    best = rows[0]
    assert best["runs"] == "3"
    error = math.sqrt(((0.01**2) * 2) / 2) / math.sqrt(3)
    assert best["test accuracy"] == f"0.9400 ± {error:.4f}"
    assert best["test accuracy - without penalty"] == "0.0300 ± 0.0058"  # 0.03, 0.02, 0.04
    assert best["ms per step"] == "10"
    assert float(best["generalization gap"].split()[0]) == pytest.approx(1 - 0.94 - 0.05, abs=1e-4)
    assert best["pgd/accuracy"].startswith("0.47")
    runs = rows_of(sweep / "report/runs.csv")
    assert len(runs) == 9
    assert {float(row["test/accuracy"]) for row in runs} == {x for values in ACCURACIES.values() for x in values}
    out, _ = capsys.readouterr()
    assert "By val/loss the best is regularizer.strength=0.01" in out
    assert "9 runs in 3 groups" in out
    assert "within the noise" not in out  # the lead is 0.03 ± 0.006
    text = (sweep / "report/report.md").read_text()
    assert {path.name for path in (sweep / "report").glob("*.png")} == {
        f"{name}_{mode}.png" for name in ("strength", "epochs", "sharpness") for mode in ("light", "dark")
    }
    assert all(f"({name}_light.png)" in text for name in ("strength", "epochs", "sharpness"))


def test_a_lead_within_the_noise_is_called_so(tmp_path, capsys):
    for strength, accuracies in {"0": (0.90, 0.92), "0.01": (0.93, 0.90)}.items():
        for seed, accuracy in enumerate(accuracies):
            finished(tmp_path / f"sweep/strength={strength},seed={seed}", strength, seed, accuracy)
    command.main([str(tmp_path / "sweep")])
    out, _ = capsys.readouterr()
    assert "The next, regularizer.strength=0, is within the noise: -0.005 ± 0.025 apart over the same seeds." in out


def test_groups_are_told_apart_by_their_resolved_settings(sweep, capsys):
    """The default strength is one that another run was given, and an own config changes without an override."""
    finished(sweep / "default", "0.1", 3, 0.83, given=False)
    finished(sweep / "none", None, 0, 0.7, given=False)
    finished(sweep / "edited", "0.1", 0, 0.6, given=False, model={"width": 32})
    finished(sweep / "elsewhere", "1", 0, 0.5, data={"root": "/data"}, logger={"save_dir": "x"})
    finished(sweep / "one", "1.0", 1, 0.5, data={"root": "/home"}, trainer={"enable_progress_bar": False})
    command.main([str(sweep)])
    rows = rows_of(sweep / "report/table.csv")
    shown = [(row["regularizer"], row["regularizer.strength"], row["model.width"], row["runs"]) for row in rows]
    assert shown == [
        ("hessian_trace", "0.01", "16", "3"),
        ("hessian_trace", "0", "16", "3"),
        ("hessian_trace", "0.1", "16", "4"),
        ("none", "-", "16", "1"),
        ("hessian_trace", "0.1", "32", "1"),
        ("hessian_trace", "1", "16", "2"),
    ]
    assert [*rows[0]][:4] == ["regularizer", "model.width", "regularizer.strength", "runs"]
    assert "regularizer=hessian_trace, model.width=16, regularizer.strength=0.01" in capsys.readouterr().out


def test_runs_without_a_penalty_are_a_line_across_the_strengths(sweep, monkeypatch):
    finished(sweep / "none", None, 0, 0.7, given=False)
    drawn = []
    monkeypatch.setattr(Axes, "axhline", lambda axis, y, label, **style: drawn.append((round(y, 6), label)))
    command.main([str(sweep)])
    assert drawn[:2] == [(0.7, "regularizer=none"), (7.0, "regularizer=none")]  # accuracy and trace
    assert "Dashed: no penalty." in (sweep / "report/report.md").read_text()


def test_a_resumed_run_that_chose_its_strength_is_with_the_others(tmp_path):
    for seed, strength in enumerate((0.012, "auto", "auto")):
        regularizer = {"penalty": {"_target_": "lightning_hessian.HessianTrace"}, "strength": strength}
        finished(tmp_path / str(seed), "1", seed, 0.9, regularizer=regularizer)
        path = tmp_path / str(seed) / "results.json"
        path.write_text(path.read_text().replace("regularizer.strength=1", "regularizer.strength=auto"))
    finished(tmp_path / "other", "1", 0, 0.9)
    command.main([str(tmp_path)])
    rows = rows_of(tmp_path / "report/table.csv")
    assert [(row["regularizer.strength"], row["runs"]) for row in rows] == [("auto", "3"), ("1", "1")]


def test_what_follows_from_a_choice_is_no_column(tmp_path):
    for regularizer, strength in (("none", None), ("sam", "1")):
        for seed in (0, 1):
            finished(tmp_path / f"{regularizer}{seed}", strength, seed, 0.9, given=False)
    command.main([str(tmp_path)])
    rows = rows_of(tmp_path / "report/table.csv")
    assert [[*row.values()][:2] for row in rows] == [["none", "2"], ["hessian_trace", "2"]]


class Links(HTMLParser):
    """What a page refers to."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "srcset", "href", "action")]


def test_the_page_needs_nothing_else(sweep):
    command.main([str(sweep), "--output", str(sweep / "elsewhere")])
    page = (sweep / "elsewhere/report.html").read_text()
    parser = Links()
    parser.feed(page)
    assert len(parser.found) == 6
    assert all(value.startswith("data:image/png;base64,") for value in parser.found)
    assert not re.search(r"@import|url\(|https?:", page)
    assert "prefers-color-scheme: dark" in page


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="needs a Chromium")
def test_in_a_browser_the_table_sorts_and_fits_a_phone(sweep, tmp_path):
    command.main([str(sweep)])
    page = (sweep / "report/report.html").read_text()
    probe = """
    <script>addEventListener("load", () => {
      const column = [...document.querySelectorAll("th")].findIndex(head => head.textContent === "test accuracy");
      const button = document.querySelectorAll("th button")[column];
      const rows = () => [...document.querySelectorAll("tbody tr")];
      const read = () => rows().map(row => parseFloat(row.cells[column].textContent));
      button.click(); const rising = read(); button.click(); const falling = read();
      const wide = document.documentElement.scrollWidth;
      document.title = JSON.stringify({rising, falling, wide, window: innerWidth});
    });</script>"""
    (tmp_path / "probed.html").write_text(page.replace("</body>", probe + "</body>"))
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=500,800",
        f"--user-data-dir={tmp_path / 'own'}",
    ]
    command_line = [BROWSER, *flags, "--dump-dom", f"file://{tmp_path / 'probed.html'}"]
    dump = subprocess.run(command_line, capture_output=True, text=True, timeout=120).stdout
    found = json.loads(re.search(r"<title>(.*?)</title>", dump).group(1))
    assert found["rising"] == sorted(found["rising"])
    assert found["falling"] == found["rising"][::-1]
    assert found["wide"] <= found["window"]  # the table scrolls by itself


def test_a_folder_with_other_files_is_refused_and_a_report_is_renewed(sweep, tmp_path, capsys):
    (tmp_path / "thesis").mkdir()
    for name in ("report.md", "report.html"):
        (tmp_path / "thesis" / name).write_text("mine")
        with pytest.raises(SystemExit) as stop:
            command.main([str(sweep), "--output", str(tmp_path / "thesis")])
        assert stop.value.code == 2
        _, err = capsys.readouterr()
        assert "has files that are no report's" in err
        assert len(err.splitlines()) == 1
        assert (tmp_path / "thesis" / name).read_text() == "mine"
    (tmp_path / "empty").mkdir()
    for _ in range(2):
        command.main([str(sweep), "--output", str(tmp_path / "empty")])


def test_several_sweeps_and_different_objectives(sweep, tmp_path, capsys):
    finished(tmp_path / "other/a", "1", 0, 0.99, metric="val/accuracy", direction="maximize")
    command.main([str(sweep), str(tmp_path / "other"), "--output", str(tmp_path / "both")])
    out, _ = capsys.readouterr()
    objectives = "(minimize val/loss, maximize val/accuracy)"
    assert f"10 runs in 4 groups. They have different objectives {objectives}, so they are in no order." in out
    assert "best" not in out.split("no order")[1]
    assert len(rows_of(tmp_path / "both/runs.csv")) == 10
    found = [row["regularizer.strength"] for row in rows_of(tmp_path / "both/table.csv")]
    assert found == ["0", "0.01", "0.1", "1"]  # the order of the folders' names


def test_a_run_that_was_run_again_counts_once(sweep, tmp_path, capsys):
    finished(tmp_path / "again/a", "0", 0, 0.5)
    command.main([str(tmp_path / "again"), str(sweep)])
    assert "9 runs in 3 groups. Left out: 1 with the same settings and seed as a newer run." in capsys.readouterr().out
    (group,) = [row for row in rows_of(tmp_path / "again/report/runs.csv") if row["directory"] == f"{tmp_path}/again/a"]
    assert (group["regularizer.strength"], group["seed"], float(group["test/accuracy"])) == ("0", "0", 0.5)


def test_what_follows_the_seed_makes_no_group_whichever_way_it_was_given(tmp_path, capsys):
    for seed in (0, 1):
        finished(tmp_path / f"plain{seed}", "0.1", seed, 0.9, data={"seed": seed})
        finished(tmp_path / f"given{seed}", "0.2", seed, 0.8, data={"seed": seed})
        results = Results.load(tmp_path / f"given{seed}")
        dataclasses.replace(results, overrides=[*results.overrides, f"data.seed={seed}"]).save()
    command.main([str(tmp_path)])
    assert "4 runs in 2 groups" in capsys.readouterr().out
    assert "data.seed" not in rows_of(tmp_path / "report/table.csv")[0]


def test_the_reference_is_the_one_with_the_same_seeds(tmp_path, capsys):
    finished(tmp_path / "a", "0", 0, 0.99)
    finished(tmp_path / "b", None, 1, 0.7)
    finished(tmp_path / "c", "0.1", 1, 0.9)
    command.main([str(tmp_path)])
    capsys.readouterr()
    row = next(row for row in rows_of(tmp_path / "report/table.csv") if row["regularizer.strength"] == "0.1")
    assert float(row["test accuracy - without penalty"]) == pytest.approx(0.2)


def test_what_did_not_finish_is_said(sweep, tmp_path, capsys):
    (sweep / "stopped/.hydra").mkdir(parents=True)
    (sweep / "stopped/config.yaml").write_text("{}")
    (sweep / "broken").mkdir()
    (sweep / "broken/failure.json").write_text(json.dumps({"job": "job 3 (lr=-1)", "reason": "why", "status": 2}))
    (sweep / "strength=0,seed=0/results.json").write_text("{")
    command.main([str(sweep)])
    out, err = capsys.readouterr()
    assert "Failed: 2" in out
    assert "Not finished: 1" in out
    assert "left out:" in err
    assert "results.json cannot be read" in err
    page = (sweep / "report/report.html").read_text()
    assert "job 3 (lr=-1): why" in page
    assert str(sweep / "stopped") in page


def test_a_run_that_finished_in_another_folder_is_finished(sweep, capsys):
    for name, before in (("first", None), ("second", "first")):
        (sweep / name / "checkpoints").mkdir(parents=True)
        (sweep / name / "config.yaml").write_text(f"resume: {sweep / before if before else 'null'}")
    finished(sweep / "third", "1", 0, 0.9, resume=str(sweep / "second"))
    command.main([str(sweep)])
    assert "Not finished" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda path: None, "is not a folder. Give the folder of a sweep, or of a run"),
        (lambda path: path.mkdir(), "there is no finished run in"),
    ],
)
def test_a_folder_without_runs_gives_one_line(tmp_path, capsys, monkeypatch, prepare, message):
    prepare(tmp_path / "sweep")
    monkeypatch.setattr("sys.argv", ["lightning-hessian", "report", str(tmp_path / "sweep")])
    with pytest.raises(SystemExit) as stop:
        entry_point()
    assert stop.value.code == 2
    _, err = capsys.readouterr()
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_results_survive_their_file_and_a_move(tmp_path):
    finished(tmp_path / "a", "0", 0, 0.9)
    shutil.move(tmp_path / "a", tmp_path / "b")
    found = Results.load(tmp_path / "b")
    assert found.directory == Path(tmp_path / "b")
    assert found.curvature.trace.estimate == pytest.approx(9)
    assert found.objective.number == pytest.approx(0.1)


def test_a_mean_of_diverged_runs_is_none():
    assert math.isnan(Mean.of([1.0, math.nan]).value)
    assert str(Mean.of([math.inf])) == "-"
