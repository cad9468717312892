"""--tensorboard: the scalars and sheets that a run writes otherwise, too."""

import json
import sys
import types

import pytest
from PIL import Image

import config
import diffusionmix
import main
from tests.conftest import NO_IMAGES, TINY
from utils.tensorboard import FOLDER, Board


class Writer:
    """Stands in for TensorBoard's, which is not among the packages that the project needs."""

    written: list[tuple] = []

    def __init__(self, folder, purge_step):
        self.written.append(("open", str(folder), purge_step))

    def add_scalar(self, tag, value, step):
        self.written.append((tag, value, step))

    def add_image(self, tag, image, step, dataformats):
        self.written.append((tag, image.shape, step))

    def flush(self):
        pass


@pytest.fixture
def written(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setattr(config, "find_spec", lambda name: True)
    monkeypatch.setattr(Writer, "written", [])
    return Writer.written


def test_board(written, tmp_path):
    board = Board(tmp_path, done=3)
    board.scalars({"loss": 0.5, "levels": [1.0, None], "note": "x", "flag": True, "by": {"a": 1}}, 4)
    Image.new("RGB", (6, 4)).save(tmp_path / "sheet.png")
    for _ in range(2):  # what is labelled anew has the same pictures
        board.image("sheet", tmp_path / "sheet.png", 4)
    assert written == [
        ("open", str(tmp_path / FOLDER), 4), ("loss", 0.5, 4), ("levels/0", 1.0, 4), ("sheet", (4, 6, 3), 4),
    ]  # fmt: skip


def test_a_test_hides_no_training(written, call, few_glyphs, two_models, trained, tmp_path):
    flags = (
        "--pool",
        two_models,
        "--resume",
        trained / "best_model.pt",
        "--save-dir",
        tmp_path / "run",
        "--mix",
        "False",
    )
    assert call(diffusionmix, *flags, "--episodes", 2, "--nTestNovel", 10, "--tensorboard")[0] == 0
    assert written[0] == ("open", str(tmp_path / "run" / FOLDER), None)
    assert [each[0] for each in written[1:]] == ["test/accuracy", "test/accuracy_without_mix", "test/paired_difference"]


def test_not_wanted(written, tmp_path):
    board = Board(tmp_path, wanted=False)
    board.scalars({"loss": 0.5}, 1)
    board.image("sheet", tmp_path / "none.png", 1)
    assert not written and not list(tmp_path.iterdir())


def test_a_run_writes_what_its_log_has(written, call, few_glyphs, two_models, tmp_path):
    folder = tmp_path / "run"
    flags = (*TINY, "--pool", two_models, "--data-root", NO_IMAGES, "--save-dir", folder)
    assert call(main, *flags, "--tensorboard")[0] == 0
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        entries = json.loads(line)
        for name in ("loss", "val_accuracy", "class_learner_loss"):
            assert (name, entries[name], entries["epoch"]) in written
    assert [each[0] for each in written if isinstance(each[1], tuple)] == ["images", "images"]  # a sheet a round


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(config, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        config.Settings(tensorboard=True)
