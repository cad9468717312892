"""What the documents say is there is there: functions by name, files, flags of commands."""

import importlib
import re
import shlex

import pytest

from config import parse
from guided_diffusion import image_train
from tests.conftest import ROOT

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]


def commands(text):
    """Lines that begin with python or torchrun and name a script, continued lines joined, variables filled in."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    known = {name: value for line in lines for name, value in re.findall(r'^\s*([A-Z_]+)="(.*)"$', line)}
    for line in lines:
        words = line.strip()
        if re.match(r"(python|torchrun) .*\.py", words):
            for name, value in known.items():
                words = words.replace(f"${name}", value)
            yield shlex.split(words.partition(" #")[0].replace("...", "").replace("[", "").replace("]", ""))


ALL = [(path.name, words) for path in DOCUMENTS for words in commands(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("name, words", ALL, ids=[f"{name}: {' '.join(words)[:60]}" for name, words in ALL])
def test_flags_of_commands(name, words):
    script = next(word for word in words if word.endswith(".py"))
    flags = words[words.index(script) + 1 :]
    assert (ROOT / script).exists()
    if script.endswith("image_train.py"):
        image_train.create_argparser().parse_args(flags)
    else:
        parse(flags, description="")


def test_there_are_commands_in_the_readme():
    assert [words[:2] for name, words in ALL if name == "README.md"][:2] == [
        ["python", "main.py"],
        ["python", "diffusionmix.py"],
    ]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_names_in_documents(path):
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:config|main|guided_diffusion|models|datasets|utils|benchmarks)\.[\w.]+)`", text):
        if name.endswith((".py", ".json")):
            continue
        parts = name.split(".")
        for cut in range(len(parts), 0, -1):
            try:
                found = importlib.import_module(".".join(parts[:cut]))
            except ModuleNotFoundError:
                continue
            for part in parts[cut:]:
                found = getattr(found, part)
            break
        else:
            raise AssertionError(name)
    for place in re.findall(r"`((?:docs|tests|utils|models|datasets|benchmarks|guided_diffusion)/[\w./]*)`", text):
        assert (ROOT / place).exists(), place
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (path.parent / link).exists(), link
