"""What the documents name is there: functions, files. Their commands: tests/test_commands.py."""

import importlib
import re

import pytest

from tests.test_commands import DOCUMENTS, ROOT

PACKAGES = "guided_diffusion|models|datasets|report|utils|benchmarks"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_names_in_documents(path):
    text = path.read_text(encoding="utf-8")
    for name in re.findall(rf"`((?:config|main|schedule|few_shot|{PACKAGES})\.[\w.]+)`", text):
        if name.endswith((".py", ".json", ".html")):
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
    for place in re.findall(rf"`((?:docs|tests|{PACKAGES})/[\w./]*)`", text):
        assert (ROOT / place).exists(), place
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (path.parent / link).exists(), link
