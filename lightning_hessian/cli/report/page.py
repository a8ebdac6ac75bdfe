"""The page of a report: one HTML file without references to anything outside of it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

MARK = '<meta name="generator" content="lightning-hessian report">'
"""Tells that a page, and so its folder, is a report's."""
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --quiet: #5b6570; --line: #d8dde3;
  --tint: #f3f5f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ea; --paper: #15181c; --quiet: #9aa5b1; --line: #333a42; --tint: #1e2329; }
}
body { margin: 0 auto; max-width: 80rem; padding: 1.5rem 1rem 3rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.answer { font-size: 1.05rem; } .quiet, figcaption { color: var(--quiet); font-size: .9rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .45rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; } tbody tr:hover { background: var(--tint); }
th.text, td.text { text-align: left; }
th button { all: unset; cursor: pointer; font-weight: 600; } th button:focus-visible { outline: 2px solid; }
th[aria-sort=ascending] button::after { content: " \\25B4"; }
th[aria-sort=descending] button::after { content: " \\25BE"; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; border-radius: 6px; }
h1, p, li { overflow-wrap: anywhere; }
"""

_SCRIPT = """
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, column = head.cellIndex, body = head.closest("table").tBodies[0];
    const rising = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", rising ? "ascending" : "descending");
    const key = row => { const text = row.cells[column].textContent.trim(); const x = parseFloat(text);
      return Number.isNaN(x) ? text : x; };
    const order = (a, b) => { const x = key(a), y = key(b);
      if (typeof x !== typeof y) return typeof x === "number" ? -1 : 1;
      const sign = typeof x === "number" ? x - y : x.localeCompare(y); return rising ? sign : -sign; };
    body.append(...[...body.rows].sort(order));
  });
}
"""


def page(
    title: str,
    answer: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    text_columns: int,
    figures: Mapping[str, str],
    directory: Path,
    notes: Mapping[str, Sequence[str]],
) -> str:
    """The page.

    Args:
        title: its title.
        answer: what comes out, in a sentence.
        header: of the table.
        rows: of the table.
        text_columns: how many columns are settings; the others are numbers.
        figures: the captions of the plots by name; they are ``<name>_light.png`` and ``<name>_dark.png`` in the folder.
        directory: where the plots are.
        notes: lists by their headings, such as the jobs that failed. Empty ones are left out.
    """
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
{MARK}
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<p class="answer">{escape(answer)}</p>
<h2>Results</h2>
<div class="scroll">{_table(header, rows, text_columns)}</div>
<p class="quiet">Means over the seeds ± standard error. Sort by a click on a column's name.</p>
{"".join(_figure(name, caption, directory) for name, caption in figures.items())}
{"".join(_list(heading, entries) for heading, entries in notes.items() if entries)}
<script>{_SCRIPT}</script>
</body>
</html>
"""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int) -> str:
    def cells(row: Sequence[str], tag: str) -> str:
        found = []
        for index, cell in enumerate(row):
            inner = f'<button type="button">{escape(cell)}</button>' if tag == "th" else escape(cell)
            found.append(f"<{tag}{' class=text' if index < text_columns else ''}>{inner}</{tag}>")
        return f"<tr>{''.join(found)}</tr>"

    return (
        f"<table><thead>{cells(header, 'th')}</thead><tbody>{''.join(cells(row, 'td') for row in rows)}</tbody></table>"
    )


def _figure(name: str, caption: str, directory: Path) -> str:
    def data(mode: str) -> str:
        content = base64.b64encode((directory / f"{name}_{mode}.png").read_bytes()).decode()
        return f"data:image/png;base64,{content}"

    return (
        f'<figure><picture><source srcset="{data("dark")}" media="(prefers-color-scheme: dark)">'
        f'<img src="{data("light")}" alt="{escape(caption)}"></picture>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _list(heading: str, entries: Sequence[str]) -> str:
    return f"<h2>{escape(heading)}</h2><ul>{''.join(f'<li>{escape(entry)}</li>' for entry in entries)}</ul>"
