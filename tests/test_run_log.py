"""The files of a run folder, its plots, and the one-line errors of a command."""

import io
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from utils import cli
from utils import images as images_module
from utils import progress as progress_module
from utils.plots import contact_sheet, curves
from utils.run_log import RunLog, write_json


def test_files_of_a_run(tmp_path, capsys):
    log = RunLog(tmp_path / "a" / "run")
    log.line("epoch 1")
    log.record({"epoch": 1, "loss": torch.tensor(0.5), "rate": np.float32(0.25), "bad": float("nan")})
    log.settings({"pool": Path("ckpt/pools"), "shape": (3, 4)})
    RunLog(tmp_path / "a" / "run").line("epoch 2")
    assert capsys.readouterr().out == "epoch 1\nepoch 2\n"
    assert (log.folder / "log_train.txt").read_text() == "epoch 1\nepoch 2\n"
    assert json.loads(log.metrics_path.read_text()) == {"epoch": 1, "loss": 0.5, "rate": 0.25, "bad": None}
    assert json.loads((log.folder / "config.json").read_text()) == {"pool": "ckpt/pools", "shape": [3, 4]}


def test_half_a_line_of_a_killed_run_is_ended(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n{"epo')
    RunLog(tmp_path).record({"epoch": 2})
    assert (tmp_path / "metrics.jsonl").read_text().splitlines()[-1] == '{"epoch": 2}'


def test_write_json_is_all_or_nothing(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError, match="JSON cannot hold"):
        write_json(tmp_path / "a.json", {"x": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_contact_sheet_places_pixels(tmp_path):
    images = torch.zeros(3, 3, 4, 5, dtype=torch.uint8)
    images[0, 0], images[1, 1], images[2, 2] = 200, 150, 100
    contact_sheet(images, 2, tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (2 * 6 + 2, 2 * 7 + 2, 3)
    assert (sheet[2:6, 2:7] == (200, 0, 0)).all()
    assert (sheet[2:6, 9:14] == (0, 150, 0)).all()
    assert (sheet[8:12, 2:7] == (0, 0, 100)).all()
    assert (sheet[8:12, 9:14] == 255).all()
    contact_sheet(images, 2, tmp_path / "labelled.png", ["a", 1, ""])
    assert Image.open(tmp_path / "labelled.png").size == (16, 2 * 18 + 2)
    with pytest.raises(ValueError, match="2 labels for 3 images"):
        contact_sheet(images, 2, tmp_path / "x.png", ["a", "b"])


def test_curves_reads_what_a_run_records(tmp_path):
    log = RunLog(tmp_path)
    for epoch in range(4):
        log.record({"epoch": epoch, "round": epoch // 2, "loss": 1.0 / (epoch + 1), "val_accuracy": 20.0 + epoch})
    with open(log.metrics_path, "a") as file:
        file.write('{"half')
    curves(log.metrics_path, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size == (960, 480)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("got 3,\n expected 4"), 2, "error: got 3, expected 4\n"),
        (FileNotFoundError(2, "No such file or directory", "a.pt"), 2, "error: a.pt: No such file or directory\n"),
        (PermissionError("no"), 2, "error: no\n"),
        (KeyboardInterrupt(), 130, "interrupted; the same command again goes on from the last save\n"),
    ],
)
def test_cli_says_one_line(error, status, line, capsys, monkeypatch):
    def main():
        raise error

    monkeypatch.delenv("TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as caught:
        cli.run(main)
    assert caught.value.code == status
    assert capsys.readouterr().err == line
    monkeypatch.setenv("TRACEBACK", "1")
    with pytest.raises(type(error)):
        cli.run(main)


def test_cli_keeps_the_traceback_of_a_fault(monkeypatch):
    monkeypatch.delenv("TRACEBACK", raising=False)
    with pytest.raises(KeyError):
        cli.run(lambda: {}["x"])


def test_a_bar_of_epochs(tmp_path, monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress_module, "_SOON", 0.0)
    log = RunLog(tmp_path, done=1, epochs=3)
    for epoch, entries in ((2, {"val_accuracy": 61.26}), (3, {})):
        log.record({"epoch": epoch, **entries})
        log.bar.refresh()
    log.line("the end", closing=True)
    shown = stream.getvalue()
    assert "2/3" in shown and "meta_val=61.3 %" in shown and "3/3" in shown and log.bar.disable
    assert RunLog(tmp_path, done=3, epochs=3).bar is None  # nothing to do


def test_as_many_threads_as_were_asked_for(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(images_module, "ThreadPoolExecutor", lambda n: asked.append(n) or ThreadPoolExecutor(n))
    for workers in (None, 0, 3):
        images_module.read_images([], 8, workers=workers)
    assert asked == [None, 1, 3]
