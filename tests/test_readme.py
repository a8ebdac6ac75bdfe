"""The Python blocks of the README run, one after the other, in an empty folder."""

import re
from pathlib import Path

import torch
from nets import CPU

README = (Path(__file__).parents[1] / "README.md").read_text()


def measured(text):
    """A printed result without the digits that differ between machines."""
    return re.sub(r"\d\.\de-\d+", "*", re.sub(r"(\d\.\d\d)\d+", r"\1", text))


def test_python_blocks_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 8
    for block in blocks:
        exec(block, namespace)
    printed = measured(capsys.readouterr().out)
    for shown in re.findall(r"```\n(HessianTrace.*?)```", README, re.DOTALL):
        assert measured(shown) in printed
    assert all(parameter.grad is not None for parameter in namespace["net"].parameters())
    manual = namespace["Manual"]()
    before = torch.cat([p.detach().flatten() for p in manual.parameters()])
    trainer = namespace["L"].Trainer(**CPU, max_epochs=1)
    trainer.fit(manual, namespace["data"])
    assert not torch.equal(before, torch.cat([p.detach().flatten() for p in manual.parameters()]))


def test_every_choice_in_the_table_of_groups_is_a_file():
    conf = Path(__file__).parents[1] / "conf"
    for group in ("data", "model", "regularizer", "monitor", "robustness", "trainer", "logger", "experiment"):
        (row,) = re.findall(rf"^\| `{group}` \| (.*) \|$", README, re.MULTILINE)
        named = set(re.findall(r"`(\w+)`", row))
        assert {path.stem for path in (conf / group).glob("*.yaml")} == named
