"""Imports run one way, and one module loads and saves checkpoints."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "config": {"datasets", "models", "utils"},  # of models its backbones, which have no settings
    "utils": {"utils"},
    "guided_diffusion": {"guided_diffusion", "utils"},
    "models": {"config", "datasets", "models", "utils"},
    "datasets": {"datasets", "utils"},
    "report": {"report", "config", "utils"},
}
COMMANDS = {"guided_diffusion/image_train.py": {"report"}}  # which no module imports; it closes with a report
PROJECT = {*MAY_IMPORT} | set(
    "main diffusionmix few_shot own_images dry_run schedule bookkeeping benchmarks tests".split()
)


def sources(part):
    return [ROOT / f"{part}.py"] if (ROOT / f"{part}.py").exists() else sorted((ROOT / part).rglob("*.py"))


def imported(source, package):
    """The first words of every import, also of those inside functions."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(package if node.level else node.module.split(".")[0])
    return names


def torch_io(source):
    """The lines that name torch.load, torch.save or torch.jit.load."""
    tree = ast.parse(source)
    calls = ("torch.load", "torch.save", "torch.jit.load")
    lines = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node) in calls]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            lines += [node.lineno for alias in node.names if alias.name in ("load", "save")]
    return lines


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_run_one_way(part):
    files = sources(part)
    assert files or part == "config", f"no sources of {part} under {ROOT}"
    for file in files:
        may = MAY_IMPORT[part] | COMMANDS.get(file.relative_to(ROOT).as_posix(), set())
        wrong = imported(file.read_text(encoding="utf-8"), part) & PROJECT - may
        assert not wrong, f"{file.relative_to(ROOT)} imports {sorted(wrong)}, may import {sorted(may)}"


def test_one_module_loads_and_saves():
    for part in sorted(PROJECT - {"tests"}):
        for file in sources(part):
            if file != ROOT / "utils" / "checkpoint.py":
                lines = torch_io(file.read_text(encoding="utf-8"))
                assert not lines, f"{file.relative_to(ROOT)}:{lines}: use utils.checkpoint"


def test_the_reader_sees_every_form():
    source = "import models.x as y\ndef f():\n    from datasets import folder\nfrom .a import b\nfrom main import c"
    assert imported(source, "utils") == {"models", "datasets", "utils", "main"}
    assert torch_io("import torch\ntorch.load(1)\nfrom torch import save") == [2, 3]
