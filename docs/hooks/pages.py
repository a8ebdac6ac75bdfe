"""The site's pages from the files of the repository: the README is the start page, and formulas become MathML."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]


def on_files(files: Files, config: Any) -> Files:
    """The README as the start page, and the examples and notebooks as files."""
    readme = (ROOT / "README.md").read_text()
    readme = re.sub(r"\]\((?!docs/|\w+:|#)", "](../", readme)
    readme = re.sub(r"\]\(docs/", "](", readme)
    files.append(File.generated(config, "index.md", content=readme))
    for path in sorted([*ROOT.glob("examples/*.py"), *ROOT.glob("notebooks/*.ipynb")]):
        files.append(File.generated(config, str(path.relative_to(ROOT)), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to the README lead to the start page. What the site has no file of is named without a link."""
    markdown = re.sub(r"\]\(\.\./README\.md(#[\w-]+)?\)", r"](index.md\1)", markdown)
    markdown = re.sub(r"\]\(\.\./((?:examples|notebooks)/[^)]+)\)", r"](\1)", markdown)
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)]+\)", r"\1", markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML, which browsers show by themselves."""
    found = r'<(span|div) class="arithmatex">(.*?)</\1>'
    return re.sub(found, _mathml, content, flags=re.DOTALL)


def _mathml(found: re.Match[str]) -> str:
    formula = html.unescape(found[2]).strip()[2:-2]  # without the delimiters
    return convert(formula, display="block" if found[1] == "div" else "inline")
