"""Imports point one way: a module imports from its own layer or from lower ones, and never in a circle."""

import ast
from pathlib import Path

import pytest

NAME = "lightning_hessian"
ROOT = Path(__file__).parents[1] / NAME
LAYERS = "arguments", "curvature", "step", "penalties", "regularization monitoring robustness", "cli huggingface"
HEIGHT = {part: height for height, layer in enumerate(LAYERS) for part in layer.split()}
ABOVE_ALL = {NAME, f"{NAME}.__main__"}  # may import anything


def modules():
    """Each module's file by its dotted name."""
    parts = {path: [NAME, *path.relative_to(ROOT).with_suffix("").parts] for path in ROOT.rglob("*.py")}
    return {".".join(names[:-1] if names[-1] == "__init__" else names): path for path, names in parts.items()}


FILES = modules()


def imports(module):
    """The package's modules that a module imports: at its top, in a function, or for the type checker."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}, line {node.lineno}: write the whole name of what is imported"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else node.module for name in names}
    return (found & FILES.keys()) - {module}


def part(module):
    """The folder, or the file, that has a place in the layers."""
    return module.split(".")[1]


@pytest.mark.parametrize("module", sorted(FILES.keys() - ABOVE_ALL))
def test_a_module_imports_from_its_own_layer_or_lower_ones(module):
    here = part(module)
    assert here in HEIGHT, f"{module} is in no layer"
    wrong = [
        other
        for other in imports(module)
        if other in ABOVE_ALL or (part(other) != here and HEIGHT[part(other)] >= HEIGHT[here])
    ]
    assert not wrong, f"{module} ({here}) imports from another folder of its layer or a higher one: {sorted(wrong)}"


def test_no_import_cycle():
    def reached(start):
        found, waiting = set(), [start]
        while waiting:
            new = direct[waiting.pop()] - found
            found |= new
            waiting += new
        return found

    direct = {module: imports(module) for module in FILES}
    circle = [
        f"{module} -> {other}" for module in sorted(direct) for other in direct[module] if module in reached(other)
    ]
    assert not circle, f"these imports lie on a circle: {', '.join(circle)}"
