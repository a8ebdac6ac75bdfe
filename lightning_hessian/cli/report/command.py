"""The subcommand ``lightning-hessian report``."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_hessian.cli.report.runs import Found, find_runs
from lightning_hessian.cli.report.table import (
    Group,
    groups_of,
    label_of,
    markdown,
    metrics_of,
    objectives_of,
    reference_of,
    table_of,
    write_csv,
    write_runs,
)


def main(arguments: Sequence[str]) -> None:
    """Entry point of the subcommand."""
    parser = argparse.ArgumentParser(
        prog="lightning-hessian report",
        description="Compare finished runs: a table, plots, and one page (report.html) that needs no other file.",
    )
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="folders of sweeps or of single runs")
    parser.add_argument("--output", type=Path, help="where to write; by default DIR/report of the first folder")
    given = parser.parse_args(arguments)
    try:
        found = find_runs(given.directories)
        output = given.output or given.directories[0] / "report"
        print(write_report(found, output, ", ".join(map(str, given.directories))))
    except (ValueError, OSError) as error:
        print(f"lightning-hessian: {error}", file=sys.stderr)
        sys.exit(2)


def write_report(found: Found, output: Path, title: str) -> str:
    """Write report.md, table.csv, runs.csv, the plots and report.html into a folder; what to print.

    Raises:
        ValueError: the folder has files, and no report.
    """
    from lightning_hessian.cli.report.figures import draw_all
    from lightning_hessian.cli.report.page import MARK, page

    html = output / "report.html"
    if output.is_dir() and any(output.iterdir()) and not (html.is_file() and MARK in html.read_text(errors="replace")):
        raise ValueError(
            f"{output} has files that are no report's, and a report could overwrite them. Give another folder as "
            "--output."
        )
    output.mkdir(parents=True, exist_ok=True)
    html.write_text(MARK)  # the folder is a report's from now on, also if this is interrupted
    groups = groups_of(found.runs)
    header, rows = table_of(groups)
    answer = _answer(groups, len(found.runs))
    notes = {
        "Failed": [f"{job}: {reason}" for job, reason in found.failed],
        "Not finished": [str(folder) for folder in found.unfinished],
    }
    captions = draw_all(groups, output)
    write_csv(output / "table.csv", header, rows)
    write_runs(output / "runs.csv", groups)
    table = markdown(header, rows)
    lists = [
        "\n".join([f"## {name}\n", *(f"- {entry}" for entry in entries)]) for name, entries in notes.items() if entries
    ]
    images = [f"![{caption}]({name}_light.png)\n\n*{caption}*" for name, caption in captions.items()]
    parts = [f"# {title}", answer, table, "Means over the seeds ± standard error.", *images, *lists]
    (output / "report.md").write_text("\n\n".join(parts) + "\n")
    html.write_text(
        page(
            title,
            answer,
            header,
            rows,
            text_columns=len(groups[0].settings),
            figures=captions,
            directory=output,
            notes=notes,
        )
    )
    told = [f"{name}: {len(entries)}" for name, entries in notes.items() if entries]
    return "\n".join([table, "", answer, *told, f"page                {html.resolve()}"])


def _answer(groups: Sequence[Group], finished: int) -> str:
    """The best group, and how it compares with no penalty."""
    best, runs, objectives = groups[0], sum(len(group.runs) for group in groups), objectives_of(groups)
    parts = [f"{runs} runs in {len(groups)} groups."] if len(groups) > 1 else [f"{runs} runs."]
    if finished > runs:
        parts.append(f"Left out: {finished - runs} with the same settings and seed as a newer run.")
    if len(objectives) > 1:
        parts.append(f"They have different objectives ({', '.join(objectives)}), so they are in no order.")
    elif objectives and math.isinf(best.rank):
        parts.append("No run has a finite objective.")
    elif objectives:
        metric = objectives[0].partition(" ")[2]
        known = metrics_of([best])
        at_the_end = f" (at the end {best.mean(metric)})" if metric in known else ""
        told = [f"best {metric} {best.mean(f'best/{metric}')}{at_the_end}"]
        told += [f"{label_of(name)} {best.mean(name)}" for name in ("test/accuracy", "final/trace") if name in known]
        which = f"By {metric} the best is {best.label}: " if len(groups) > 1 else ""
        parts.append(f"{which}{', '.join(told)}.")
        if len(groups) > 1:
            lead = best.difference(f"best/{metric}", groups[1])
            if lead.error and abs(lead.value) < 2 * lead.error:
                parts.append(f"The next, {groups[1].label}, is within the noise: {lead} apart over the same seeds.")
    tested = sorted({run.results.tested for group in groups for run in group.runs})
    parts.append(f"The test took the {' or the '.join(tested)} weights of each run.")
    reference = reference_of(best, groups) if len(objectives) < 2 else None
    if reference is not None and "test/accuracy" in metrics_of([best]):
        difference = best.difference("test/accuracy", reference)
        parts.append(f"The test accuracy of the best less that without a penalty, over the same seeds: {difference}.")
    return " ".join(parts)
