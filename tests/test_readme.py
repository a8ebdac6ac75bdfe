"""README and the pages in docs/: their Python blocks run and print what the pages show; their links lead somewhere.

The blocks of a page run one after the other, in an empty folder and a namespace of the page's own. For a page in docs/
the first block of the README has run before, as these pages say.
"""

import re
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml
from nets import CPU

import lightning_hessian

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_BLOCKS = {
    "README": 2,
    "start": 3,
    "recipes": 10,
    "methods": 2,
    "inputs": 2,
    "watching": 2,
    "correctness": 1,
    "plain-pytorch": 3,
    "huggingface": 2,
    "extending": 5,
    "taylor": 2,
}
"""How many Python blocks a page has; none of them may get lost."""


def python_blocks(page):
    """Each block with what is shown as its output, the text block after it (empty where there is none)."""
    text = page.read_text()
    blocks = re.findall(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```$)?", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == text.count("```python")
    assert sum(bool(shown) for _, shown in blocks) == text.count("```text")
    return blocks


def measured(text):
    """A printed result without the digits that differ between machines."""
    return re.sub(r"\d\.\de-\d+", "*", re.sub(r"(\d\.\d\d)\d+", r"\1", text))


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run all blocks of a page, compare what they print, and return its namespace."""

    def run_page(page):
        monkeypatch.chdir(tmp_path)
        namespace = {}
        if page.stem != "README" and python_blocks(page):
            exec(python_blocks(ROOT / "README.md")[0][0], namespace)
        for block, shown in python_blocks(page):
            capsys.readouterr()
            exec(block, namespace)
            assert measured(shown) in measured(capsys.readouterr().out)
        return namespace

    return run_page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_blocks_run(page, run):
    assert len(python_blocks(page)) >= WITH_BLOCKS.get(page.stem, 0)
    run(page)


def test_no_page_with_blocks_is_lost():
    assert {page.stem for page in PAGES} >= set(WITH_BLOCKS)


def test_what_the_page_on_plain_pytorch_trains(run):
    namespace = run(ROOT / "docs" / "plain-pytorch.md")
    for net in (namespace["net"], namespace["images"]):
        assert all(parameter.grad is not None for parameter in net.parameters())
    manual = namespace["Manual"]()
    before = torch.cat([p.detach().flatten() for p in manual.parameters()])
    trainer = namespace["L"].Trainer(**CPU, max_epochs=1)
    trainer.fit(manual, namespace["data"])
    assert not torch.equal(before, torch.cat([p.detach().flatten() for p in manual.parameters()]))


def test_results_of_the_tools_are_shown():
    shown = {page.stem: "".join(text for _, text in python_blocks(page)) for page in PAGES}
    for page in ("README", "methods"):
        assert "% of the task loss's" in shown[page]
    for page in ("README", "correctness"):
        assert "the gradient is right" in shown[page]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def heading_anchors(page):
    """The anchors that GitHub gives a page's headings."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *ROOT.glob("C*.md")], ids=lambda page: page.stem)
def test_relative_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"`[^`\n]*`", "", prose)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in heading_anchors(target), f"{page.name} links to {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_scripts_that_a_page_runs_are_there(page):
    for script in re.findall(r"(?:python|per-node 2) ((?:benchmarks|examples)/\S+?\.py)", page.read_text()):
        assert (ROOT / script).is_file(), f"{page.name} runs {script}"


def test_the_readme_links_to_every_page():
    linked = re.findall(r"\]\(docs/([\w-]+)\.md\)", (ROOT / "README.md").read_text())
    assert {page.stem for page in PAGES} - {"README"} == set(linked)


def test_every_choice_in_the_table_of_groups_is_a_file():
    conf = ROOT / "conf"
    table = (ROOT / "docs" / "command-line.md").read_text()
    for group in ("data", "model", "regularizer", "monitor", "robustness", "trainer", "logger", "experiment"):
        (row,) = re.findall(rf"^\| `{group}` \| (.*) \|$", table, re.MULTILINE)
        named = set(re.findall(r"`(\w+)`", row))
        assert {path.stem for path in (conf / group).glob("*.yaml")} == named


def test_the_version_is_the_same_everywhere():
    version = lightning_hessian.__version__
    assert metadata.version("lightning-hessian") == version
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    newest = re.search(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest.group(1) == version
