"""python -m report.figures: curves, tables and images of runs, written by hand here."""

import csv
import json
import os

import numpy as np
import pytest
from PIL import Image

import report.figures as figures

FILES = {"curves.pdf", "curves.png", "images.png", "table.csv", "table.tex"}
TESTED = {
    "dataset": "custom", "split": "meta_test", "way": 5, "shot": 1, "episodes": 4, "pool_models": 2, "accuracy": 61.25,
    "ci95": 1.5, "accuracy_without_mix": 60, "ci95_without_mix": 1.25, "paired_difference": 1.25, "paired_ci95": 0.5,
}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    """write(name, epochs=3, images=True, **result): a run folder, with a test where there is a result."""

    def go(name, epochs=3, images=True, **result):
        place = tmp_path / "runs" / name / "pseudo" / "round00"
        place.mkdir(parents=True)
        folder = place.parent.parent
        lines = [{"epoch": e, "val_accuracy": 40.0 + e, "val_ci95": 1.0} for e in range(1, epochs + 1)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if images:
            (place / "manifest.json").write_text("{}")
            levels = np.arange(12, dtype=np.uint8).reshape(12, 1, 1, 1) * 20
            np.save(place / "images.npy", np.broadcast_to(levels, (12, 3, 8, 8)))
            np.save(place / "labels.npy", np.arange(4).repeat(3))
        if result:
            (folder / "results.json").write_text(json.dumps(result))
        return folder

    return go


def test_curves_tables_and_images(call, write, tmp_path):
    runs = (write("a_1 $x$", **TESTED), write("=b"), write("_c", **(TESTED | {"pool_models": 0})))
    out = tmp_path / "out"
    status, text, err = call(figures, *runs, "--out", out)
    assert (status, err) == (0, "") and sorted(text.split()) == sorted(str(out / name) for name in FILES)
    assert (out / "curves.pdf").read_bytes().startswith(b"%PDF")
    for name in ("curves.png", "images.png"):
        with Image.open(out / name) as image:
            assert len(np.unique(np.asarray(image.convert("L")))) > 5
    with open(out / "table.csv", newline="") as file:
        head, first, second, third = csv.reader(file)
    test = "5-way 1-shot on meta_test"
    assert first == ["a_1 $x$", test, "61.25", "1.5", "60", "1.25", "1.25", "0.5", "4"] and len(head) == len(first)
    assert second == ["'=b", "best on meta_val", "", "", "43.0", "1.0", "", "", ""]
    assert third == ["_c", test, "", "", "60", "1.25", "", "", "4"]
    tex = (out / "table.tex").read_text()
    assert (
        r"a\_1 \$x\$ & 5-way 1-shot on meta\_test & $61.25 \pm 1.50$ & $60.00 \pm 1.25$ & $+1.25 \pm 0.50$ & 4" in tex
    )


def test_every_run_has_a_line_and_images_of_its_own(write):
    folders = {name: write(name, images=name != "bare") for name in ("one", "_two", "bare")}
    runs = {name: figures.Run.read(folder) for name, folder in folders.items()}
    (axis,) = figures.curves(runs).axes
    assert [line.get_xydata().tolist() for line in axis.lines] == [[[1, 41], [2, 42], [3, 43]]] * 3
    assert [text.get_text().strip() for text in axis.get_legend().get_texts()] == [*runs]
    one, two = figures.grid(runs).axes
    shown = one.images[0].get_array()
    assert shown[0, 0].tolist() == [0] * 3 and shown[10, 10].tolist() == [80] * 3 and two.images  # row 1, column 1


def test_what_it_wrote_is_written_again(call, write, tmp_path):
    folder, out = write("a"), tmp_path / "out"
    assert call(figures, folder, "--out", out)[0] == 0
    before = (out / "table.csv").read_bytes()
    assert call(figures, write("b", images=False), "--out", out)[0] == 0
    assert {path.name for path in out.iterdir()} == FILES - {"images.png"}  # which would be of the other run
    assert (out / "table.csv").read_bytes() != before


@pytest.mark.parametrize("name", ["paper.tex", *sorted(FILES), "folder/", "table.csv -> nowhere", "pipe |"])
def test_files_of_somebody_else_stay(call, write, tmp_path, name):
    folder, out = write("a"), tmp_path / "out"
    out.mkdir()
    path = out / name.split()[0]
    if name.endswith("/"):
        path.mkdir()
    elif "->" in name:
        path.symlink_to("nowhere")
    elif "|" in name:
        os.mkfifo(path)
    else:
        path.write_text("mine")
    status, _, err = call(figures, folder, "--out", out)
    assert status == 2 and err.count("\n") == 1 and str(path) in err and "--out" in err
    assert [each.name for each in out.iterdir()] == [path.name] and (not path.is_file() or path.read_text() == "mine")


def test_errors_are_one_line(call, write, tmp_path):
    (tmp_path / "file").write_text("x")
    folder = write("a")
    for argv in ((tmp_path / "none", "--out", tmp_path / "out"), (folder, "--out", tmp_path / "file"), (folder,),
                 (write("empty", 0), "--out", tmp_path / "out")):  # fmt: skip
        status, _, err = call(figures, *argv)
        assert status == 2 and err.count("\n") == 1, err
    assert not (tmp_path / "out").exists()
