"""Docstrings are reStructuredText; mkdocstrings reads Markdown."""

from __future__ import annotations

import re
import textwrap
from typing import Any

from griffe import Extension, Object


def markdown(text: str) -> str:
    """The text in Markdown: formulas, code, and names as links to their reference."""
    text = re.sub(r"^( *)\.\. math::(.*(?:\n(?:\1 +.*| *))*)", _display, text, flags=re.MULTILINE)
    text = re.sub(r":math:`([^`]+)`", r"$\1$", text)
    text = re.sub(r":[a-z]+:`~?([\w.]+)`", lambda found: f"`{found[1].rpartition('.')[2]}`", text)
    text = re.sub(r"``([^`]+)``", r"`\1`", text)
    return re.sub(r"^(?: *>>> .*\n)(?: *\S.*\n?)*", _session, text + "\n", flags=re.MULTILINE)


def _display(found: re.Match[str]) -> str:
    formula = textwrap.dedent(found[2]).strip()
    lines = ["$$", *formula.splitlines(), "$$", ""]
    return "\n".join(found[1] + line if line else "" for line in lines) + "\n"


def _session(found: re.Match[str]) -> str:
    """A session with the interpreter as a block of code."""
    lines = found[0].rstrip("\n").split("\n")
    indent = " " * (len(lines[0]) - len(lines[0].lstrip()))
    return "\n".join([f"{indent}```pycon", *lines, f"{indent}```", ""])


class MarkdownDocstrings(Extension):
    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
