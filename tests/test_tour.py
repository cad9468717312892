"""docs/tour.ipynb: its cells run, at a small size; its stored outputs are whole."""

import base64
import io
import json
import re
import sys
import types
from itertools import combinations

import pytest
import torch
from PIL import Image

from tests.conftest import ROOT
from utils import progress

pytestmark = pytest.mark.slow
PATH = ROOT / "docs" / "tour.ipynb"
SMALL = dict(
    sample_steps=2, unguided=5, guided=3, epochs=2, epoch_steps=2, episodes=2, real=20, draws=2, columns=2
)  # fmt: skip


def code_cells():
    return [cell for cell in json.loads(PATH.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def source(cell):
    return "".join(cell["source"])


def sizes(cell):
    return "sizes" in cell["metadata"].get("tags", ())


@pytest.fixture
def shown(monkeypatch):
    """The pictures that the notebook displays, with IPython or without."""
    pictures = []
    stub = types.ModuleType("IPython.display")
    stub.Image, stub.display = lambda data: Image.open(io.BytesIO(data)), pictures.append
    package = types.ModuleType("IPython")
    package.version_info = (9, 0)  # matplotlib asks
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", stub)
    return pictures


@pytest.mark.parametrize("start", [".", "docs"])
def test_it_finds_the_root(start, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(ROOT / start)
    names = {}
    exec(source(code_cells()[1]), names)
    assert names["root"] == ROOT
    assert sys.path[0] == str(ROOT)


def test_it_runs(monkeypatch, shown, capsys):
    monkeypatch.setattr(progress, "_quiet", progress.is_quiet())  # as it was, after the notebook has hushed it
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(PATH.parent)
    names, cells = {"__name__": "tour"}, code_cells()
    exec(source(cells[0]), names)
    assert sizes(cells[0]) and names["SIZE"].keys() == SMALL.keys()
    names["SIZE"] = SMALL
    for number, cell in enumerate(cells[1:], 1):
        exec(compile(source(cell), f"cell {number}", "exec"), names)

    classes = sum(names["counts"])
    assert len(names["unguided"]) == SMALL["unguided"] * classes
    assert len(names["pseudo"]) == SMALL["guided"] * classes
    starts = torch.tensor([sum(names["counts"][:m]) for m, n in enumerate(names["counts"]) for _ in range(n)])
    for labels in (names["clusters"], names["relabelled"]):  # each image keeps to its model's classes
        assert torch.equal(starts[labels], names["by_model"])
    assert torch.equal(starts[names["wanted"]], names["second"].first_of(names["places"]))
    assert len(names["images"]) == len(names["labels"]) == (SMALL["unguided"] + SMALL["guided"]) * classes
    trained = [names[name].model.classifier.weight for name in ("teller", "guide", "meta")]  # from the same weights
    assert not any(torch.equal(*pair) for pair in combinations(trained, 2))
    assert 0 <= names["hit_rate_unguided"] <= 100 and 0 <= names["hit_rate"] <= 100
    rows = names["steered"]  # from the same noise
    assert not torch.equal(rows["unguided"], rows["to class 1"])
    assert not torch.equal(rows["to class 1"], rows["to class 2"])
    assert len(names["curve"]) == 1 + SMALL["epochs"]
    assert all(0 <= mean <= 100 for mean, _ in names["curve"])
    assert [len(found) for found in names["results"].values()] == [SMALL["draws"]] * 2
    assert all(0 <= accuracy <= 100 for found in names["results"].values() for accuracy in found)
    assert all(picture.width > 200 for picture in shown)
    assert len(shown) == sum(figures(cell) for cell in cells)
    assert "minutes" in capsys.readouterr().out


def figures(cell):
    return sum(output["output_type"] == "display_data" for output in cell["outputs"])


def test_stored_outputs():
    cells = code_cells()
    assert PATH.stat().st_size < 600_000
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(map(figures, cells)) >= 7
    for number, cell in enumerate(cells):
        assert bool(cell["outputs"]) == (number > 2)  # after sizes, root and imports
        for output in cell["outputs"]:
            assert output["output_type"] in ("stream", "display_data") and output.get("name") != "stderr"
            if output["output_type"] == "display_data":
                Image.open(io.BytesIO(base64.b64decode(output["data"]["image/jpeg"]))).load()


def test_no_path_of_a_machine():
    notebook = json.loads(PATH.read_text(encoding="utf-8"))
    texts = ["".join(cell["source"]) for cell in notebook["cells"]]
    for cell in code_cells():
        texts += ["".join(output.get("text", "")) for output in cell["outputs"]]
    texts.append(json.dumps(notebook["metadata"]))
    for text in texts:
        assert not re.search(r"""(^|[\s'"(=])(/|~/|[A-Z]:\\)\w+""", text), text
